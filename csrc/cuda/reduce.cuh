// Sums of a block's threads, and of blocks: always in an order that depends on nothing but the launch.
//
// Blocks leave partial sums in global memory and call arrive(); the last one of them adds the partial sums in the order
// of their numbers. No block waits for another, and there is no atomic float.
#pragma once

#include "device.h"

namespace fastgan {

// The sum over the lanes of a warp, in every lane.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, lanes);
  }
  return value;
}

// Replaces each of the values by its sum over all kThreads threads of the block, in every thread. All threads call it.
template <int kThreads, typename T, int kCount>
__device__ inline void block_sums(T (&values)[kCount]) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kThreads % 32 == 0);
  FASTGAN_SHARED(T, sums, [kCount][kWarps]);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    values[k] = warp_sum(values[k]);
  }
  // Whoever still reads the sums of the call before.
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      sums[k][threadIdx.x / 32] = values[k];
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    T total = 0;
    for (int i = 0; i < kWarps; ++i) {
      total += sums[k][i];
    }
    values[k] = total;
  }
}

// The sum of one value of all kThreads threads of the block, in every thread.
template <int kThreads, typename T>
__device__ inline T block_sum(T value) {
  T values[1] = {value};
  block_sums<kThreads>(values);
  return values[0];
}

// Whether this block is the last one of `expected` to come here: then it sees what the others wrote before, past the
// first-level cache (__ldcg), and the counter is 0 again. All threads call it.
__device__ inline bool arrive(unsigned* counter, unsigned expected) {
  FASTGAN_SHARED(bool, last, );
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) == expected - 1;
    __threadfence();
    if (last) {
      atomicExch(counter, 0u);
    }
  }
  __syncthreads();
  return last;
}

}  // namespace fastgan
