// Tasks of one call, shared by the threads: each has as many neighbours as the others, whose images meet in its caches,
// and takes from the end of the others' when its own are done. So a core that another program slows down, or a slower
// one of a processor that has two kinds, does less. What a task computes must not depend on who does it.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "common.h"
#include "simd.h"

namespace fastgan {

class Tasks {
 public:
  // Tasks [begin, end) that nobody has taken, in one word.
  struct alignas(64) Range {
    std::atomic<uint64_t> left;

    static uint64_t packed(uint64_t begin, uint64_t end) { return begin << 32 | end; }
  };

  Tasks(std::vector<Range>& ranges, int64_t thread) : ranges_(ranges), thread_(thread) {}

  // The next one; nothing when all are taken.
  std::optional<int64_t> next() {
    const auto threads = static_cast<int64_t>(ranges_.size());
    for (int64_t i = 0; i < threads; ++i) {
      if (const auto task = take(ranges_[(thread_ + i) % threads], i == 0)) return task;
    }
    return std::nullopt;
  }

 private:
  static std::optional<int64_t> take(Range& range, bool first) {
    uint64_t left = range.left.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t begin = left >> 32, end = left & UINT32_MAX;
      if (begin == end) return std::nullopt;
      const uint64_t rest = first ? Range::packed(begin + 1, end) : Range::packed(begin, end - 1);
      if (range.left.compare_exchange_weak(left, rest, std::memory_order_relaxed)) {
        return static_cast<int64_t>(first ? begin : end - 1);
      }
    }
  }

  std::vector<Range>& ranges_;
  const int64_t thread_;
};

// Calls f(Tasks) in each thread, for `count` tasks < 2^32 in all.
template <typename F>
void share_tasks(int64_t count, const F& f) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::vector<Tasks::Range> ranges(threads);
  for (int64_t t = 0; t < threads; ++t) {
    ranges[t].left = Tasks::Range::packed(count * t / threads, count * (t + 1) / threads);
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    f(Tasks(ranges, thread));
    finish_streams();
  });
}

}  // namespace fastgan
