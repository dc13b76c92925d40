#include "async_copy.h"

#include <cstring>

#include "machine.h"

namespace simt {

void copy_async(void* shared, const void* global, unsigned bytes, unsigned copied, const void* code) {
  Machine& m = machine();
  Thread& thread = m.here("cp.async");
  const auto target = reinterpret_cast<uintptr_t>(shared), source = reinterpret_cast<uintptr_t>(global);
  if (target % bytes != 0 || (copied && source % bytes != 0)) {
    fail("misaligned cp.async of " + std::to_string(bytes) + " bytes [" + source_of(code) + "]");
  }
  if (copied) {
    m.memory.access(thread, source, copied, Access::kRead, code);
  }
  m.memory.set_in_flight(thread, target, bytes, code);
  thread.copies.push_back({target, global, bytes, copied});
}

void commit_copies() {
  Thread& thread = machine().here("cp.async.commit_group");
  size_t committed = 0;
  for (const size_t count : thread.groups) {
    committed += count;
  }
  thread.groups.push_back(thread.copies.size() - committed);
}

void wait_copies(unsigned pending) {
  Machine& m = machine();
  Thread& thread = m.here("cp.async.wait_group");
  while (thread.groups.size() > pending) {
    const size_t count = thread.groups.front();
    thread.groups.erase(thread.groups.begin());
    for (size_t i = 0; i < count; ++i) {
      const AsyncCopy& copy = thread.copies[i];
      char* target = reinterpret_cast<char*>(copy.target);
      std::memset(target, 0, copy.bytes);
      std::memcpy(target, copy.source, copy.copied);
      m.memory.land(thread, copy.target, copy.bytes);
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(count));
  }
}

}  // namespace simt
