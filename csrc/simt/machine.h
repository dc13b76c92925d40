// The machine: the threads of one block at a time, as fibres on one thread of the CPU, and what they wait for.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "error.h"
#include "fibre.h"
#include "launch.h"
#include "memory.h"
#include "types.h"

namespace simt {

constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr unsigned kNamedBarriers = 16;

// The order in which the threads of a block, and the blocks of a grid, get their turns.
struct Schedule {
  enum class Order { kForward, kReverse, kRandom };
  Order order = Order::kForward;
  uint64_t seed = 0;
  std::string text() const;
};

// A warp's lanes meet here. `lane` points to what each of them brings and takes away, on its own stack.
struct WarpOperation {
  const char* name;
  uint32_t mask, arrived = 0;
  Site site;
  void* lane[kWarp] = {};
};

// What threads had done when they came to where others are told of it: per thread the clock up to which.
struct Past {
  std::vector<uint32_t> clocks;
  Known known;
};

struct Barrier {
  const char* name = nullptr;
  unsigned expected = 0, arrived = 0;
  Site site;
  std::vector<unsigned> waiting;  // ranks
  int sum = 0;                    // of the predicates that are not 0
  Past past;                      // of a barrier of part of the block
};

struct AsyncCopy {
  uintptr_t target;
  const void* source;
  unsigned bytes, copied;
};

struct Thread {
  enum class State : uint8_t { kReady, kWaiting, kExited };

  Fibre fibre;
  State state = State::kReady;
  uint3 index;
  unsigned rank, lane, warp;
  char* stack;
  // Where it waits, for messages.
  const char* waits_for = nullptr;
  Site site;
  int barrier_sum = 0;

  uint32_t clock = 1;
  // At the last fence; epoch 0 if there was none.
  uint32_t fence_epoch = 0, fence_clock = 0;
  // Seen by atomics, which the next fence makes known.
  Known seen, known;
  Known released_at_fence;

  std::vector<AsyncCopy> copies;  // not yet landed
  std::vector<size_t> groups;     // how many of the copies each committed group has
};

class Machine {
 public:
  Memory memory;
  Schedule schedule;

  // Runs a grid; throws Error for what the kernel does wrong.
  void run(dim3 grid, dim3 block, size_t shared_bytes, const Job& job);

  // The thread that runs, nullptr outside of kernels.
  Thread* current() const { return current_; }
  Thread& here(const char* what);
  const std::vector<Thread>& threads() const { return threads_; }
  // A lane of the warp that runs.
  Thread& warp_thread(unsigned lane) { return threads_[current_->warp * kWarp + lane]; }
  const StackPool& stacks() const { return stacks_; }
  uint32_t epoch() const { return epoch_; }
  uint32_t block_rank() const { return block_rank_; }
  const Known& known() const { return known_; }
  // Whether thread `other` up to `clock` is ordered before now of `thread`, both in this epoch of this block.
  bool ordered(const Thread& thread, unsigned other, uint32_t clock) const;
  std::string thread_text(const Thread& thread) const;
  [[noreturn]] void fail(const std::string& what);
  // As above, in the name of another thread.
  [[noreturn]] void fail(const Thread& culprit, const std::string& what);

  // A barrier for `count` threads, all of the block if 0; returns the sum of the predicates. `waits`: false for
  // bar.arrive.
  int barrier(unsigned id, unsigned count, bool predicate, const char* name, bool waits, Site site);
  // Blocks until all lanes of `mask` are here with the same operation; the last one calls `finish` for all of them.
  void meet(const char* name, uint32_t mask, void* lane, void (*finish)(const WarpOperation&), Site site);
  // Adds what a thread has done and knows to `past`; and tells a thread of it.
  void tell(Thread& thread, Past& past);
  void learn(Thread& thread, const Past& past);
  // __threadfence, and what an atomic operation at `address` passes on between the fences around it.
  void fence();
  void synchronise(uintptr_t address);

 private:
  void run_block();
  void begin_block(unsigned rank);
  bool sweep();
  void suspend(const char* waits_for, Site site);
  void check_exit(Thread& thread);
  void finish_barrier(Barrier& barrier);
  [[noreturn]] void report_deadlock();
  static void entry();

  dim3 grid_, block_;
  uint32_t block_rank_ = 0, epoch_ = 0;
  StackPool stacks_;
  Fibre scheduler_;
  std::vector<Thread> threads_;
  Thread* current_ = nullptr;
  Job job_ = {};
  std::string error_;
  std::vector<unsigned> order_;
  std::mt19937_64 random_;

  Barrier barriers_[kNamedBarriers];
  std::vector<std::vector<WarpOperation>> operations_;  // those of each warp that wait for lanes
  unsigned exited_ = 0;
  std::vector<uint32_t> clocks_;  // [thread, other]: what each knows of the others in this epoch
  bool joined_ = false;
  Known known_;  // by all threads of the block
};

Machine& machine();

}  // namespace simt
