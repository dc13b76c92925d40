// The memory that a kernel may use, and the shadow in which its accesses are checked.
//
// g++ -fsanitize=thread puts a call in front of every load and store of a kernel, __tsan_read4(address) and its like.
// hooks.cpp defines them: they end in Memory::access below. ThreadSanitizer's own run-time library is not linked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "error.h"

namespace simt {

struct Thread;

enum class Access : uint8_t { kRead, kWrite, kAtomic };

// Who touched a granule, and when: `epoch` counts the barriers of all blocks and launches, `clock` what orders this
// thread before others within an epoch.
struct Touch {
  uint32_t epoch = 0, clock = 0, block = 0, place = 0;
  uint16_t thread = 0;
  Access kind = Access::kRead;
  bool in_flight = false;
};

// What is remembered of a granule, the smallest piece that threads write separately: the last write, and two reads of
// different warps or at least of different threads, so that whoever writes next meets one that is not its own.
struct Cell {
  Touch write, read[2];
};

struct Region {
  enum class Kind : uint8_t { kShared, kGlobal, kArgument };

  uintptr_t begin = 0;
  size_t size = 0;
  Kind kind = Kind::kGlobal;
  bool writable = true;
  bool fresh = false;    // memory of nobody's before: what has not been written may not be read
  unsigned granule = 1;  // bytes, a power of two
  std::string name;
  std::unique_ptr<Cell[]> cells;  // none where nothing can be written
  uint64_t read_bytes = 0, written_bytes = 0;

  uintptr_t end() const { return begin + size; }
  std::string text(uintptr_t address) const;
};

// What a thread knows to be over in other blocks: of `block` everything before `epoch`, and of that epoch what `thread`
// did up to `clock`.
struct Release {
  uint32_t block, epoch, clock;
  uint16_t thread;
};

class Known {
 public:
  void add(const Release& release);
  void add(const Known& other);
  bool covers(const Touch& touch) const;
  bool empty() const { return blocks_.empty(); }

 private:
  std::unordered_map<uint32_t, std::vector<Release>> blocks_;
};

class Memory {
 public:
  // CUDA's limits: of static shared memory, and of all that a block of the largest GPU can ask for.
  static constexpr size_t kStaticShared = 48 * 1024;
  static constexpr size_t kMostShared = 227 * 1024;

  Memory();

  // The buffers of the caller: what else a kernel touches is an error.
  Region& add_buffer(const void* data, size_t bytes, unsigned granule, bool writable, std::string name);
  void* workspace(size_t bytes, unsigned granule, std::string name, bool zeros);
  void clear_buffers();
  const std::vector<std::unique_ptr<Region>>& buffers() const { return buffers_; }
  // The arguments of the launch, and its dynamic shared memory; those of the launch before are gone.
  void begin_launch(const void* arguments, size_t bytes, size_t dynamic_bytes, uint32_t first_epoch);
  // Shared memory of a new block: nothing of it has been written.
  void begin_block(uint32_t first_epoch);

  void* shared(const void* function, Site site, const char* name, size_t bytes, size_t alignment, unsigned granule);
  void* dynamic_shared(size_t alignment, unsigned granule);

  void access(Thread& thread, uintptr_t address, size_t bytes, Access kind, const void* code);
  // cp.async: the destination between its issue and its completion, when it counts as written.
  void set_in_flight(Thread& thread, uintptr_t address, size_t bytes, const void* code);
  void land(Thread& thread, uintptr_t address, size_t bytes);

  // An atomic operation orders its thread behind the fences that came before the operations on the same address.
  std::unordered_map<uintptr_t, Known> released;

 private:
  struct Key {
    const void* function;
    unsigned line;
    std::string name;
    auto operator<=>(const Key&) const = default;
  };

  Region* find(uintptr_t address);
  Region& region_of(Thread& thread, uintptr_t address, size_t bytes, Access kind, const void* code);
  void check(Thread& thread, Region& region, Cell& cell, uintptr_t address, Access kind, const void* code);
  void report(const Region& region, uintptr_t address, Access kind, const void* code, const Touch& other);
  bool ordered(const Thread& thread, const Touch& touch) const;
  Touch touch(const Thread& thread, Access kind, const void* code) const;
  [[noreturn]] void fail_outside(Access kind, uintptr_t address, size_t bytes, const void* code);

  std::vector<std::unique_ptr<Region>> buffers_;
  std::vector<std::unique_ptr<char[]>> workspaces_;
  std::map<uintptr_t, Region*> regions_;  // all of them by their beginning
  Region* last_ = nullptr;
  Region arguments_;
  uint32_t launch_epoch_ = 0, block_epoch_ = 0;
  uintptr_t image_begin_ = 0, image_end_ = 0;  // this module's own code and constants

  std::unique_ptr<char[]> arena_;
  size_t arena_used_ = 0, static_bytes_ = 0, dynamic_bytes_ = 0;
  std::map<Key, std::unique_ptr<Region>> shared_;
  std::unique_ptr<Region> dynamic_;
};

}  // namespace simt
