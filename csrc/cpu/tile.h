// Tiles, tasks and memory order of the losses: how their elements are split and laid out.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common.h"
#include "convert.h"
#include "empty.h"

namespace fastgan {

// Elements whose sum stays in the compute type before it goes to a double: a vector register's lane adds at most 64 of
// them in float, so its rounding stays below that of the elements. Four such buffers fit the first-level cache.
constexpr int64_t kTile = 512;

// Elements of one task. Fixed: sums are formed per task and then added in order, whatever the number of threads.
constexpr int64_t kTaskElements = 16384;

// Elements below which one thread does everything: torch's own grain, under which a fork costs more than it saves.
constexpr int64_t kParallelElements = 32768;

// Calls f(start, count) for consecutive tiles of a run of `total` elements.
template <typename F>
void for_tiles(int64_t total, const F& f) {
  for (int64_t start = 0; start < total; start += kTile) {
    f(start, std::min(kTile, total - start));
  }
}

inline bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4) {
    return false;
  }
  const auto size = x.sizes();
  const auto stride = x.strides();
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (size[dim] != 1 && stride[dim] != expected) {
      return false;
    }
    expected *= size[dim];
  }
  return true;
}

// Dense with the samples outermost, so that every sample is one run of consecutive elements.
inline void check_dense(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous() || is_channels_last(x), op, ": ", name, " must be contiguous or channels_last");
}

inline bool same_order(const Tensor& a, const Tensor& b) {
  return (a.is_contiguous() && b.is_contiguous()) || (is_channels_last(a) && is_channels_last(b));
}

inline Tensor empty_vector(int64_t count, ScalarType dtype) {
  const int64_t stride = 1;
  return empty_cpu(&count, &stride, 1, dtype);
}
inline Tensor empty_scalar(ScalarType dtype) { return empty_cpu(nullptr, nullptr, 0, dtype); }

// Like torch::stable::empty_like for a dense tensor.
inline Tensor empty_dense_like(const Tensor& x) {
  return empty_cpu(x.sizes().data(), x.strides().data(), x.dim(), x.scalar_type());
}

// `x` in the order of `like`: itself if it has that already, else a copy.
inline Tensor in_order_of(const Tensor& x, const Tensor& like) {
  if (same_order(x, like)) {
    return x;
  }
  Tensor copy = empty_dense_like(like);
  return torch::stable::copy_(copy, x);
}

}  // namespace fastgan
