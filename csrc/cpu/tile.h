// Short runs of elements brought to the type that a kernel computes in, and back; sums that do not depend on the threads.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common.h"

namespace fastgan {

// Elements whose sum stays in the compute type before it goes to a double: a vector register's lane adds at most 64 of them in
// float, so its rounding stays below that of the elements. Four such buffers fit the first-level cache.
constexpr int64_t kTile = 512;

// Elements of one task. Fixed: sums are formed per task and then added in order, whatever the number of threads.
constexpr int64_t kTaskElements = 16384;

FASTGAN_MULTIVERSION static void widen(const Half* __restrict__ source, int64_t count, float* __restrict__ target) {
  for (int64_t i = 0; i < count; ++i) {
    target[i] = static_cast<float>(source[i]);
  }
}
FASTGAN_MULTIVERSION static void widen(const BFloat16* __restrict__ source, int64_t count, float* __restrict__ target) {
  for (int64_t i = 0; i < count; ++i) {
    target[i] = static_cast<float>(source[i]);
  }
}
FASTGAN_MULTIVERSION static void narrow(const float* __restrict__ source, int64_t count, Half* __restrict__ target) {
  for (int64_t i = 0; i < count; ++i) {
    target[i] = static_cast<Half>(source[i]);
  }
}
FASTGAN_MULTIVERSION static void narrow(const float* __restrict__ source, int64_t count, BFloat16* __restrict__ target) {
  for (int64_t i = 0; i < count; ++i) {
    target[i] = static_cast<BFloat16>(source[i]);
  }
}

// At most kTile elements in the compute type: `source` itself where it has that type, else a copy in `buffer`.
template <typename T>
const accumulate_t<T>* load_tile(const T* source, int64_t count, accumulate_t<T>* buffer) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    return source;
  } else {
    widen(source, count, buffer);
    return buffer;
  }
}

// Where to compute at most kTile elements of `target`: there itself, or in `buffer`, from which store_tile rounds them.
template <typename T>
accumulate_t<T>* tile_for(T* target, accumulate_t<T>* buffer) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    return target;
  } else {
    return buffer;
  }
}

template <typename T>
void store_tile(const accumulate_t<T>* tile, int64_t count, T* target) {
  if constexpr (!std::is_same_v<T, accumulate_t<T>>) {
    narrow(tile, count, target);
  }
}

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

// `x` in the order of `like`: itself if it has that already, else a copy.
inline Tensor in_order_of(const Tensor& x, const Tensor& like) {
  if (same_order(x, like)) {
    return x;
  }
  Tensor copy = torch::stable::empty_like(like);
  return torch::stable::copy_(copy, x);
}

}  // namespace fastgan
