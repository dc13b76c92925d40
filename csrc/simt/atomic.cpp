#include "atomic.h"

#include "machine.h"

namespace simt {

void touch_atomically(const void* address, unsigned bytes, const void* code) {
  Machine& m = machine();
  Thread& thread = m.here("an atomic operation");
  const auto place = reinterpret_cast<uintptr_t>(address);
  if (place % bytes != 0) {
    fail("misaligned atomic operation of " + std::to_string(bytes) + " bytes [" + source_of(code) + "]");
  }
  m.memory.access(thread, place, bytes, Access::kAtomic, code);
  m.synchronise(place);
}

}  // namespace simt
