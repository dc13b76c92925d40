// Fetching what a product reads next while it multiplies: between blocks of a matrix the processor does not foresee it,
// and waits for a further cache as long as it multiplies. It must come evenly: a processor has few places for what is
// on its way, and waits for them as well.
#pragma once

#include <algorithm>

#include "product.h"

namespace fastgan {

// Fetches what `ahead` says for one of a panel's tiles of sums, its place among them being `tile`, and calls
// multiply(k) for k < depth.
template <typename F>
FASTGAN_INLINE void fetch_and_multiply(const Ahead& ahead, int64_t tile, int64_t depth, F&& multiply) {
  const auto* const panel = static_cast<const char*>(ahead.panel);
  const char* weights = ahead.weights + tile * ceil_div(depth, kFetchSteps) * ahead.lines * kFetchBytes;
  for (int64_t first = 0; first < depth; first += kFetchSteps) {
    for (int64_t r = 0; r < kPanelRows; ++r) __builtin_prefetch(panel + (r * kPanelStride + first) * sizeof(float));
    for (int64_t line = 0; line < ahead.lines; ++line, weights += kFetchBytes) __builtin_prefetch(weights, 0, 2);
    const int64_t end = std::min(first + kFetchSteps, depth);
#pragma GCC unroll 2
    for (int64_t k = first; k < end; ++k) multiply(k);
  }
}

}  // namespace fastgan
