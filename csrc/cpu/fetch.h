// Fetching what a product reads next while it multiplies: between blocks of a matrix the processor does not foresee it,
// and waits for the second-level cache as long as it multiplies.
#pragma once

#include <algorithm>

#include "product.h"

namespace fastgan {

// multiply(k) for k < depth, with a panel fetched to the first-level cache from `next`, and weights to the second-level
// one from `ahead`, of which a step reads `step` values.
template <typename P, typename W, typename F>
FASTGAN_INLINE void fetch_and_multiply(const P* next, const W* ahead, int64_t step, int64_t depth, F&& multiply) {
  constexpr int64_t kLine = 64 / sizeof(P);
  for (int64_t first = 0; first < depth; first += kLine) {
    for (int64_t r = 0; r < kPanelRows; ++r) __builtin_prefetch(next + r * kPanelStride + first);
    const int64_t end = std::min(first + kLine, depth);
#pragma GCC unroll 2
    for (int64_t k = first; k < end; ++k) {
      __builtin_prefetch(ahead + k * step, 0, 2);
      multiply(k);
    }
  }
}

}  // namespace fastgan
