// Kernels with a planted bug, each beside its corrected twin, for test_simt_checks.py: with kBug they must be found
// out, without it they must pass.
//
// One block of 64 threads unless said otherwise; x and y are float32 [64] or more.

#include "cuda/ptx.h"
#include "simt/export.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

template <bool kBug>
__global__ void missing_barrier(const float* x, float* y) {
  FASTGAN_SHARED(float, tile, [64]);
  const unsigned i = threadIdx.x;
  tile[i] = 0;
  __syncthreads();
  tile[i] = x[i];
  if (!kBug) {
    __syncthreads();
  }
  y[i] = tile[63 - i];
}

// The next round overwrites what slower threads still read.
template <bool kBug>
__global__ void missing_second_barrier(const float* x, float* y) {
  FASTGAN_SHARED(float, tile, [64]);
  const unsigned i = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile[i] = x[i] * static_cast<float>(round);
    __syncthreads();
    sum += tile[63 - i];
    if (!kBug) {
      __syncthreads();
    }
  }
  y[i] = sum;
}

template <bool kBug>
__global__ void missing_warp_barrier(const float* x, float* y) {
  FASTGAN_SHARED(float, tile, [64]);
  const unsigned i = threadIdx.x;
  tile[i] = 0;
  __syncthreads();
  tile[i] = x[i];
  if (!kBug) {
    __syncwarp();
  }
  y[i] = tile[i ^ 1];
}

// A shuffle is no barrier for memory.
template <bool kBug>
__global__ void shuffle_as_barrier(const float* x, float* y) {
  FASTGAN_SHARED(float, tile, [64]);
  const unsigned i = threadIdx.x;
  tile[i] = x[i];
  const float other = __shfl_xor_sync(kAll, x[i], 1);
  if (!kBug) {
    __syncwarp();
  }
  y[i] = tile[i ^ 1] + other;
}

// A row beyond the last, which no array lies behind; the index runs over in the second dimension first.
template <bool kBug>
__global__ void shared_index(const float* x, float* y) {
  FASTGAN_SHARED(float, tile, [8][9]);
  const unsigned row = threadIdx.x / 8, column = threadIdx.x % 8;
  tile[row][column + (kBug ? 2 : 1)] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[row][column + (kBug ? 2 : 1)];
}

template <bool kBug>
__global__ void shared_pointer(const float* x, float* y) {
  FASTGAN_SHARED(float, tile, [64]);
  float* moved = tile + (kBug ? 1 : 0);
  moved[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = moved[threadIdx.x];
}

template <bool kBug>
__global__ void dynamic_shared_memory(const float* x, float* y) {
  FASTGAN_DYNAMIC_SHARED(float, memory);
  memory[threadIdx.x + (kBug ? 1 : 0)] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = memory[threadIdx.x + (kBug ? 1 : 0)];
}

template <bool kBug>
__global__ void uninitialised(const float* x, float* y) {
  FASTGAN_SHARED(float, tile, [65]);
  const unsigned i = threadIdx.x;
  tile[i + 1] = x[i];
  if (!kBug && i == 0) {
    tile[0] = 0;
  }
  __syncthreads();
  y[i] = tile[i] + tile[i + 1];
}

template <bool kBug>
__global__ void global_overrun(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x + (kBug ? 1 : 0)];
}

template <bool kBug>
__global__ void write_to_input(const float* x, float* y) {
  float* target = kBug ? const_cast<float*>(x) : y;
  target[threadIdx.x] = x[threadIdx.x] + 1;
}

template <bool kBug>
__global__ void misaligned_vector(const float* x, float* y) {
  if (threadIdx.x < 15) {
    const float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + (kBug ? 1 : 0));
    y[threadIdx.x] = v.x + v.y + v.z + v.w;
  }
}

template <bool kBug>
__global__ void mask_without_own_lane(const float* x, float* y) {
  y[threadIdx.x] = __shfl_down_sync(kBug ? kAll << 1 : kAll, x[threadIdx.x], 1);
}

template <bool kBug>
__global__ void shuffle_from_unnamed_lane(const float* x, float* y) {
  const unsigned lane = threadIdx.x % 32;
  if (lane < 16) {
    y[threadIdx.x] = __shfl_down_sync(0x0000ffffu, x[threadIdx.x], kBug ? 4 : 1, 16);
    if (kBug) {
      y[threadIdx.x] += __shfl_sync(0x0000ffffu, x[threadIdx.x], 20);
    }
  }
}

// Half of each warp takes the other branch.
template <bool kBug>
__global__ void lane_missing(const float* x, float* y) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    value += __shfl_xor_sync(kBug ? kAll : 0x0000ffffu, value, 1);
  }
  __syncwarp();
  y[threadIdx.x] = value;
}

template <bool kBug>
__global__ void exited_lane(const float* x, float* y) {
  if (kBug && threadIdx.x % 32 == 31) {
    return;
  }
  const unsigned votes = __ballot_sync(kAll, x[threadIdx.x] > 0);
  y[threadIdx.x] = static_cast<float>(votes & 1);
}

template <bool kBug>
__global__ void exit_before_barrier(const float* x, float* y) {
  FASTGAN_SHARED(float, tile, [64]);
  tile[threadIdx.x] = x[threadIdx.x];
  if (kBug && threadIdx.x > 40) {
    return;
  }
  __syncthreads();
  y[threadIdx.x] = tile[0];
}

template <bool kBug>
__global__ void divergent_barrier(const float* x, float* y) {
  FASTGAN_SHARED(float, tile, [64]);
  tile[threadIdx.x] = x[threadIdx.x];
  if (kBug && threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

// The barrier waits for warps that never come.
template <bool kBug>
__global__ void barrier_of_too_many(const float* x, float* y) {
  if (threadIdx.x < 32) {
    fastgan::barrier_sync(1, kBug ? 64 : 32);
  }
  y[threadIdx.x] = x[threadIdx.x];
}

// The first warp produces what the second one consumes.
template <bool kBug>
__global__ void producer_and_consumer(const float* x, float* y) {
  FASTGAN_SHARED(float, tile, [32]);
  const unsigned lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    if (kBug) {
      fastgan::barrier_arrive(2, 64);
    }
    tile[lane] = x[lane];
    if (!kBug) {
      fastgan::barrier_arrive(2, 64);
    }
  } else {
    fastgan::barrier_sync(2, 64);
    y[lane] = tile[31 - lane];
  }
}

template <bool kBug>
__global__ void copy_not_awaited(const float* x, float* y) {
  FASTGAN_SHARED(float4, tile, [2][16]);
  const unsigned i = threadIdx.x;
  if (i < 16) {
    fastgan::copy_async<16>(&tile[0][i], x + 4 * i);
    fastgan::commit_copies();
    fastgan::copy_async<16>(&tile[1][i], x + 4 * i);
    fastgan::commit_copies();
    fastgan::wait_copies<kBug ? 1 : 0>();
  }
  __syncthreads();
  y[i] = tile[1][i / 4].x;
}

// Waiting makes a thread's own copies visible to itself alone.
template <bool kBug>
__global__ void copy_without_barrier(const float* x, float* y) {
  FASTGAN_SHARED(float, tile, [64]);
  const unsigned i = threadIdx.x;
  tile[i] = 0;
  __syncthreads();
  fastgan::copy_async<4>(&tile[i], x + i);
  fastgan::commit_copies();
  fastgan::wait_copies<0>();
  if (!kBug) {
    __syncthreads();
  }
  y[i] = tile[63 - i];
}

template <bool kBug>
__global__ void misaligned_copy(const float* x, float* y) {
  FASTGAN_SHARED(float4, tile, [16]);
  const unsigned i = threadIdx.x;
  if (i < 15) {
    fastgan::copy_async<16>(&tile[i], x + 4 * i + (kBug ? 2 : 0));
    fastgan::commit_copies();
    fastgan::wait_copies<0>();
    y[i] = tile[i].y;
  }
}

template <bool kBug>
__global__ void misaligned_matrix(const float* x, float* y) {
  FASTGAN_SHARED(__half, tile, [9][8]);
  const unsigned i = threadIdx.x;
  if (i < 36) {
    tile[i / 4][2 * (i % 4)] = tile[i / 4][2 * (i % 4) + 1] = x[i];
  }
  __syncthreads();
  if (i < 32) {
    uint32_t fragments[1];
    fastgan::load_matrices<1>(fragments, &tile[i % 8][kBug ? 4 : 0]);
    y[i] = static_cast<float>(fragments[0]);
  }
}

// A pointer to what a thread has for itself.
template <bool kBug>
__global__ void local_memory_of_another(const float* x, float* y) {
  FASTGAN_SHARED(const float*, pointers, [64]);
  const unsigned i = threadIdx.x;
  volatile float own = x[i];
  pointers[i] = kBug ? const_cast<const float*>(&own) : x + i;
  __syncthreads();
  y[i] = *pointers[63 - i];
  __syncthreads();
}

template <bool kBug>
__global__ void blocks_write_the_same(const float* x, float* y) {
  y[threadIdx.x + (kBug ? 0 : blockIdx.x * blockDim.x)] = x[threadIdx.x];
}

// The sum of all blocks by the last one to arrive. kBug: 1 leaves out the fence before the arrival, 2 the one behind
// it, 3 the barrier between the other threads' writes and the fence.
template <int kBug>
__global__ void last_block(const float* x, float* y, float* partial, unsigned* counter) {
  FASTGAN_SHARED(bool, last, );
  const unsigned i = threadIdx.x;
  partial[blockIdx.x * blockDim.x + i] = x[i] * static_cast<float>(blockIdx.x + 1);
  if (kBug != 3) {
    __syncthreads();
  }
  if (i == 0) {
    if (kBug != 1) {
      __threadfence();
    }
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (kBug != 2) {
      __threadfence();
    }
  }
  __syncthreads();
  if (last) {
    float sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) {
      sum += partial[block * blockDim.x + i];
    }
    y[i] = sum;
  }
}

// Integers add up the same in every order; floats do not.
template <bool kBug>
__global__ void sum_of_atomics(const float* x, float* y) {
  FASTGAN_SHARED(int, integers, );
  if (threadIdx.x == 0) {
    integers = 0;
  }
  __syncthreads();
  atomicAdd(&integers, static_cast<int>(threadIdx.x));
  if (kBug) {
    atomicAdd(y, x[threadIdx.x]);
  }
  __syncthreads();
  if (threadIdx.x == 1) {
    y[1] = static_cast<float>(integers);
  }
}

template <bool kBug>
__global__ void atomic_beside_write(const float* x, float* y) {
  if (kBug && threadIdx.x == 5) {
    y[0] = x[5];
  }
  atomicMax(reinterpret_cast<int*>(y), 3);
}

template <bool kBug>
__global__ void too_much_shared_memory(const float* x, float* y) {
  FASTGAN_SHARED(float, tile, [kBug ? 12289 : 12288]);
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[threadIdx.x];
}

using Kernel = void (*)(const float*, float*);

template <Kernel kWrong, Kernel kRight, int kBlocks, int kSharedBytes>
void run(simt::Buffer<const float> x, simt::Buffer<float> y, bool bug) {
  simt::launch(kBlocks, 64, kSharedBytes, bug ? kWrong : kRight, x.data, y.data);
}

void run_last_block(simt::Buffer<const float> x, simt::Buffer<float> y, simt::Buffer<float> partial,
                    simt::Buffer<unsigned> counter, int bug) {
  const auto kernel = bug == 0 ? last_block<0> : bug == 1 ? last_block<1> : bug == 2 ? last_block<2> : last_block<3>;
  simt::launch(5, 64, 0, kernel, x.data, y.data, partial.data, counter.data);
}

#define PLANTED(name, blocks, shared_bytes) SIMT_EXPORT(#name, run<name<true>, name<false>, blocks, shared_bytes>)
PLANTED(missing_barrier, 1, 0);
PLANTED(missing_second_barrier, 1, 0);
PLANTED(missing_warp_barrier, 1, 0);
PLANTED(shuffle_as_barrier, 1, 0);
PLANTED(shared_index, 1, 0);
PLANTED(shared_pointer, 1, 0);
PLANTED(dynamic_shared_memory, 1, 256);
PLANTED(uninitialised, 1, 0);
PLANTED(global_overrun, 1, 0);
PLANTED(write_to_input, 1, 0);
PLANTED(misaligned_vector, 1, 0);
PLANTED(mask_without_own_lane, 1, 0);
PLANTED(shuffle_from_unnamed_lane, 1, 0);
PLANTED(lane_missing, 1, 0);
PLANTED(exited_lane, 1, 0);
PLANTED(exit_before_barrier, 1, 0);
PLANTED(divergent_barrier, 1, 0);
PLANTED(barrier_of_too_many, 1, 0);
PLANTED(producer_and_consumer, 1, 0);
PLANTED(copy_not_awaited, 1, 0);
PLANTED(copy_without_barrier, 1, 0);
PLANTED(misaligned_copy, 1, 0);
PLANTED(misaligned_matrix, 1, 0);
PLANTED(local_memory_of_another, 1, 0);
PLANTED(blocks_write_the_same, 2, 0);
PLANTED(sum_of_atomics, 1, 0);
PLANTED(atomic_beside_write, 1, 0);
PLANTED(too_much_shared_memory, 1, 0);
SIMT_EXPORT("last_block", run_last_block);

}  // namespace
