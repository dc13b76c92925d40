// Runs of elements between memory and float32 registers, 16 bytes at a time where they are whole and aligned.
#pragma once

#include "device.h"

namespace fastgan {

// Elements of a 16-byte access.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// The kCount elements at `source` as float32; those from `inside` on are 0 and are not read. wide: they begin at a
// multiple of 16 bytes.
template <int kCount, typename T>
__device__ __forceinline__ void load_run(const T* source, int inside, bool wide, float* values) {
  static_assert(kCount % kVector<T> == 0);
  if (wide && inside >= kCount) {
#pragma unroll
    for (int v = 0; v < kCount; v += kVector<T>) {
      const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(source + v));
      const T* elements = reinterpret_cast<const T*>(&loaded);
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) {
        values[v + k] = static_cast<float>(elements[k]);
      }
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    values[k] = k < inside ? static_cast<float>(source[k]) : 0.0f;
  }
}

// Writes them, rounded to T; those from `inside` on are not written.
template <int kCount, typename T>
__device__ __forceinline__ void store_run(T* target, int inside, bool wide, const float* values) {
  static_assert(kCount % kVector<T> == 0);
  if (wide && inside >= kCount) {
#pragma unroll
    for (int v = 0; v < kCount; v += kVector<T>) {
      alignas(16) T elements[kVector<T>];
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) {
        elements[k] = static_cast<T>(values[v + k]);
      }
      // An intrinsic: a plain store of the structure may become four.
      __stcg(reinterpret_cast<uint4*>(target + v), *reinterpret_cast<const uint4*>(elements));
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (k < inside) {
      target[k] = static_cast<T>(values[k]);
    }
  }
}

}  // namespace fastgan
