#include "machine.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <numeric>
#include <sstream>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

uint3 place(uint64_t rank, dim3 extent) {
  return {static_cast<unsigned>(rank % extent.x), static_cast<unsigned>(rank / extent.x % extent.y),
          static_cast<unsigned>(rank / extent.x / extent.y)};
}

template <typename T>
void arrange(std::vector<T>& order, const Schedule& schedule, std::mt19937_64& random) {
  std::iota(order.begin(), order.end(), T(0));
  if (schedule.order == Schedule::Order::kReverse) {
    std::reverse(order.begin(), order.end());
  } else if (schedule.order == Schedule::Order::kRandom) {
    // Not std::shuffle, whose use of the generator is the library's own affair: a seed means the same everywhere.
    for (size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[random() % i]);
    }
  }
}

}  // namespace

std::string Schedule::text() const {
  return order == Order::kForward   ? "forward"
         : order == Order::kReverse ? "reverse"
                                    : "random, seed " + std::to_string(seed);
}

Machine& machine() {
  static Machine instance;
  return instance;
}

void fail(const std::string& what) { machine().fail(what); }

Thread& Machine::here(const char* what) {
  if (!current_) {
    throw Error(std::string("simt: ") + what + " outside of a kernel");
  }
  return *current_;
}

std::string Machine::thread_text(const Thread& thread) const { return text(thread.index); }

void Machine::fail(const std::string& what) {
  if (!current_) {
    throw Error("simt: " + what);
  }
  fail(*current_, what);
}

void Machine::fail(const Thread& culprit, const std::string& what) {
  error_ = function_of(job_.kernel) + ": block " + text(blockIdx) + " thread " + text(culprit.index) + ": " + what +
           " (schedule " + schedule.text() + ")";
  if (!current_) {
    throw Error(error_);
  }
  // Not an exception: the calls that g++ puts in front of loads are declared never to throw. The fibre is left as it
  // is; device code owns nothing that would have to be given back.
  Fibre::change(current_->fibre, scheduler_);
  __builtin_unreachable();
}

void Machine::run(dim3 grid, dim3 block, size_t shared_bytes, const Job& job) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  job_ = job;
  if (threads == 0 || threads > kMostThreads || blocks == 0 || blocks > UINT32_MAX || block.z > 64 || grid.y > 65535 ||
      grid.z > 65535) {
    throw Error(function_of(job.kernel) + ": a grid of " + text(grid) + " blocks of " + text(block) +
                " threads cannot be launched");
  }
  grid_ = gridDim = grid;
  block_ = blockDim = block;
  error_.clear();
  random_.seed(schedule.seed);
  stacks_.reserve(threads);
  memory.begin_launch(job.bound, job.bytes, shared_bytes, epoch_ + 1);
  std::vector<uint32_t> order(blocks);
  arrange(order, schedule, random_);
  for (const uint32_t rank : order) {
    begin_block(rank);
    run_block();
  }
}

void Machine::begin_block(unsigned rank) {
  block_rank_ = rank;
  blockIdx = place(rank, grid_);
  memory.begin_block(++epoch_);
  const unsigned count = block_.x * block_.y * block_.z;
  threads_.clear();
  threads_.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads_[i];
    thread.index = place(i, block_);
    thread.rank = i, thread.lane = i % kWarp, thread.warp = i / kWarp;
    thread.stack = stacks_.stack(i);
    thread.fibre.prepare(thread.stack, StackPool::kStackBytes, &Machine::entry);
  }
  order_.resize(count);
  operations_.assign((count + kWarp - 1) / kWarp, {});
  std::fill(std::begin(barriers_), std::end(barriers_), Barrier{});
  exited_ = 0;
  joined_ = false;
  known_ = {};
}

void Machine::run_block() {
  while (exited_ < threads_.size()) {
    if (!sweep()) {
      report_deadlock();
    }
  }
}

bool Machine::sweep() {
  arrange(order_, schedule, random_);
  bool progress = false;
  for (const unsigned rank : order_) {
    Thread& thread = threads_[rank];
    if (thread.state != Thread::State::kReady) {
      continue;
    }
    progress = true;
    current_ = &thread;
    threadIdx = thread.index;
    Fibre::change(scheduler_, thread.fibre);
    current_ = nullptr;
    if (!error_.empty()) {
      throw Error(error_);
    }
  }
  return progress;
}

void Machine::entry() {
  Machine& m = machine();
  Thread& thread = *m.current_;
  Fibre::arrived(thread.fibre, m.scheduler_);
  m.job_.call(m.job_.bound);
  m.check_exit(thread);
  thread.state = Thread::State::kExited;
  ++m.exited_;
  Fibre::change(thread.fibre, m.scheduler_);
  __builtin_unreachable();
}

void Machine::suspend(const char* waits_for, Site site) {
  Thread& thread = *current_;
  thread.waits_for = waits_for;
  thread.site = site;
  thread.state = Thread::State::kWaiting;
  Fibre::change(thread.fibre, scheduler_);
}

void Machine::check_exit(Thread& thread) {
  const Barrier& whole = barriers_[0];
  if (whole.arrived && whole.expected == threads_.size()) {
    fail("divergent barrier: it exits while " + std::to_string(whole.arrived) + " threads wait at " + whole.name +
         " [" + whole.site.text() + "]");
  }
  for (const WarpOperation& operation : operations_[thread.warp]) {
    if (operation.mask >> thread.lane & 1) {
      fail("it exits while lanes of its warp wait for it at " + std::string(operation.name) + " [" +
           operation.site.text() + "]");
    }
  }
}

void Machine::report_deadlock() {
  std::map<std::string, std::vector<const Thread*>> waiting;
  const Thread* first = nullptr;
  for (const Thread& thread : threads_) {
    if (thread.state == Thread::State::kWaiting) {
      first = first ? first : &thread;
      waiting[std::string("at ") + thread.waits_for + " [" + thread.site.text() + "]"].push_back(&thread);
    } else {
      waiting["exited"].push_back(&thread);
    }
  }
  std::ostringstream text;
  text << "deadlock:";
  for (const auto& [where, threads] : waiting) {
    text << (where == waiting.begin()->first ? " " : ", ") << threads.size() << " threads ("
         << thread_text(*threads.front()) << (threads.size() > 1 ? ", ..." : "") << ") " << where;
  }
  fail(*first, text.str());
}

int Machine::barrier(unsigned id, unsigned count, bool predicate, const char* name, bool waits, Site site) {
  Thread& thread = here(name);
  const unsigned all = threads_.size(), expected = count ? count : all;
  if (id >= kNamedBarriers || (count && (count % kWarp != 0 || count > (all + kWarp - 1) / kWarp * kWarp))) {
    fail(std::string(name) + " [" + site.text() + "] of barrier " + std::to_string(id) + " for " +
         std::to_string(count) +
         " threads: barriers are 0 ... 15, and the count is a multiple of 32 that the block has");
  }
  if (!count && exited_) {
    fail("divergent barrier: " + std::string(name) + " [" + site.text() + "] after " + std::to_string(exited_) +
         " threads of the block have exited");
  }
  Barrier& barrier = barriers_[id];
  if (!barrier.arrived) {
    barrier.name = name, barrier.site = site, barrier.expected = expected;
  } else if (barrier.expected != expected ||
             (!count && !(std::strcmp(barrier.name, name) == 0 && barrier.site == site))) {
    fail("divergent barrier: it is at " + std::string(name) + " [" + site.text() + "], " +
         std::to_string(barrier.arrived) + " threads wait at " + barrier.name + " [" + barrier.site.text() + "]");
  }
  barrier.sum += predicate;
  if (count) {
    tell(thread, barrier.past);
  }
  if (waits) {
    barrier.waiting.push_back(thread.rank);
  }
  if (++barrier.arrived == barrier.expected) {
    finish_barrier(barrier);
  } else if (waits) {
    suspend(name, site);
  }
  return thread.barrier_sum;
}

void Machine::finish_barrier(Barrier& barrier) {
  if (barrier.waiting.size() == threads_.size()) {
    ++epoch_;
    for (Thread& thread : threads_) {
      ++thread.clock;
      known_.add(thread.known);
      thread.known = {};
    }
  }
  for (const unsigned rank : barrier.waiting) {
    threads_[rank].state = Thread::State::kReady;
    threads_[rank].barrier_sum = barrier.sum;
    if (!barrier.past.clocks.empty()) {
      learn(threads_[rank], barrier.past);
    }
  }
  barrier = Barrier{};
}

bool Machine::ordered(const Thread& thread, unsigned other, uint32_t clock) const {
  return other == thread.rank || (joined_ && clocks_[thread.rank * threads_.size() + other] >= clock);
}

void Machine::tell(Thread& thread, Past& past) {
  const size_t count = threads_.size();
  if (!joined_) {
    clocks_.assign(count * count, 0);
    joined_ = true;
  }
  past.clocks.resize(count, 0);
  const uint32_t* own = &clocks_[thread.rank * count];
  for (size_t i = 0; i < count; ++i) {
    past.clocks[i] = std::max(past.clocks[i], own[i]);
  }
  past.clocks[thread.rank] = thread.clock++;
  past.known.add(thread.known);
}

void Machine::learn(Thread& thread, const Past& past) {
  uint32_t* own = &clocks_[thread.rank * threads_.size()];
  for (size_t i = 0; i < threads_.size(); ++i) {
    own[i] = std::max(own[i], past.clocks[i]);
  }
  thread.known.add(past.known);
}

void Machine::meet(const char* name, uint32_t mask, void* lane, void (*finish)(const WarpOperation&), Site site) {
  Thread& thread = here(name);
  const auto where = [&] { return std::string(name) + " [" + site.text() + "]"; };
  if (!(mask >> thread.lane & 1)) {
    std::ostringstream text;
    text << where() << " with mask 0x" << std::hex << mask << ", which lacks its own lane " << std::dec << thread.lane;
    fail(text.str());
  }
  for (uint32_t left = mask; left; left &= left - 1) {
    const unsigned rank = thread.warp * kWarp + std::countr_zero(left);
    if (rank >= threads_.size() || threads_[rank].state == Thread::State::kExited) {
      fail(where() + " names lane " + std::to_string(rank % kWarp) +
           (rank >= threads_.size() ? ", which the block does not have" : ", which has exited"));
    }
  }
  std::vector<WarpOperation>& open = operations_[thread.warp];
  auto found = std::find_if(open.begin(), open.end(), [&](const WarpOperation& operation) {
    return operation.mask == mask && std::strcmp(operation.name, name) == 0 && !(operation.arrived >> thread.lane & 1);
  });
  if (found == open.end()) {
    found = open.insert(open.end(), WarpOperation{name, mask, 0, site, {}});
  }
  found->arrived |= 1u << thread.lane;
  found->lane[thread.lane] = lane;
  if (found->arrived != mask) {
    suspend(name, site);
    return;
  }
  const WarpOperation operation = *found;
  open.erase(found);
  finish(operation);
  for (uint32_t left = mask; left; left &= left - 1) {
    threads_[thread.warp * kWarp + std::countr_zero(left)].state = Thread::State::kReady;
  }
}

void Machine::fence() {
  Thread& thread = here("__threadfence");
  thread.known.add(thread.seen);
  thread.seen = {};
  thread.fence_epoch = epoch_;
  thread.fence_clock = thread.clock++;
  thread.released_at_fence = known_;
  thread.released_at_fence.add(thread.known);
}

void Machine::synchronise(uintptr_t address) {
  Thread& thread = *current_;
  if (thread.fence_epoch) {
    Known& released = memory.released[address];
    released.add({block_rank_, thread.fence_epoch, thread.fence_clock, static_cast<uint16_t>(thread.rank)});
    released.add(thread.released_at_fence);
  }
  if (const auto found = memory.released.find(address); found != memory.released.end()) {
    thread.seen.add(found->second);
  }
}

}  // namespace simt
