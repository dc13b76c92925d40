// Kernels that use one instruction each, for test_simt_semantics.py to compare with what CUDA's manuals say of it.

#include "cuda/groups.h"
#include "cuda/ptx.h"
#include "simt/export.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void shuffle(const int* x, int* y, int kind, int argument, int width) {
  const int value = x[threadIdx.x];
  y[threadIdx.x] = kind == 0   ? __shfl_sync(kAll, value, argument, width)
                   : kind == 1 ? __shfl_up_sync(kAll, value, argument, width)
                   : kind == 2 ? __shfl_down_sync(kAll, value, argument, width)
                               : __shfl_xor_sync(kAll, value, argument, width);
}

// Lanes of every third place vote apart from the others.
__global__ void votes(const int* x, unsigned* y) {
  const unsigned lane = threadIdx.x;
  const unsigned mask = lane % 3 == 0 ? 0x49249249u : ~0x49249249u;
  const int value = x[lane];
  unsigned* row = y + 12 * lane;
  row[0] = __ballot_sync(mask, value & 1);
  row[1] = static_cast<unsigned>(__any_sync(mask, value > 6));
  row[2] = static_cast<unsigned>(__all_sync(mask, value > -6));
  row[3] = __match_any_sync(mask, value);
  row[4] = static_cast<unsigned>(__reduce_add_sync(mask, value));
  row[5] = static_cast<unsigned>(__reduce_min_sync(mask, value));
  row[6] = static_cast<unsigned>(__reduce_max_sync(mask, value));
  const unsigned bits = static_cast<unsigned>(value);
  row[7] = __reduce_min_sync(mask, bits);
  row[8] = __reduce_max_sync(mask, bits);
  row[9] = __reduce_and_sync(mask, bits);
  row[10] = __reduce_or_sync(mask, bits);
  row[11] = __reduce_xor_sync(mask, bits);
}

__global__ void block_votes(const int* x, int* y) {
  const unsigned i = threadIdx.x;
  y[3 * i] = __syncthreads_count(x[i] > 0);
  y[3 * i + 1] = __syncthreads_and(x[i] > -9);
  y[3 * i + 2] = __syncthreads_or(x[i] > 9);
}

__global__ void indices(int* y) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int* row = y + 6 * (thread + blockDim.x * blockDim.y * blockDim.z * block);
  row[0] = static_cast<int>(threadIdx.x), row[1] = static_cast<int>(threadIdx.y),
  row[2] = static_cast<int>(threadIdx.z);
  row[3] = static_cast<int>(blockIdx.x), row[4] = static_cast<int>(blockIdx.y), row[5] = static_cast<int>(blockIdx.z);
}

// y [16, 8] = a [16, 16] b [16, 8], through shared memory and ldmatrix.
template <typename T>
__global__ void product(const T* a, const T* b, float* y) {
  FASTGAN_SHARED(T, a_tile, [16][24]);
  FASTGAN_SHARED(T, b_tile, [16][8]);
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 256; i += 32) {
    a_tile[i / 16][i % 16] = a[i];
  }
  for (unsigned i = lane; i < 128; i += 32) {
    b_tile[i / 8][i % 8] = b[i];
  }
  __syncwarp();
  uint32_t left[4], right[2];
  fastgan::load_matrices(left, &a_tile[lane % 16][lane / 16 * 8]);
  fastgan::load_matrices<2, true>(right, &b_tile[lane % 16][0]);
  float sums[4] = {0, 0, 0, 0};
  fastgan::mma_16816<T>(sums, left, right);
  for (unsigned i = 0; i < 4; ++i) {
    y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
}

// The fragments that ldmatrix gives, without and with transposition: y [2, 32, 2].
__global__ void matrices(const uint16_t* x, unsigned* y) {
  FASTGAN_SHARED(uint16_t, tile, [8][8]);
  const unsigned lane = threadIdx.x;
  tile[lane / 4][2 * (lane % 4)] = x[2 * lane];
  tile[lane / 4][2 * (lane % 4) + 1] = x[2 * lane + 1];
  __syncwarp();
  uint32_t fragments[1];
  fastgan::load_matrices(fragments, tile[lane % 8]);
  y[lane] = fragments[0];
  fastgan::load_matrices<1, true>(fragments, tile[lane % 8]);
  y[32 + lane] = fragments[0];
}

// Sums of tiles that are copied two steps ahead: y[i] = sum over steps of x[step, 63 - i], the last step half there.
__global__ void pipeline(const float* x, float* y, int steps) {
  FASTGAN_SHARED(float4, tiles, [3][16]);
  const unsigned i = threadIdx.x;
  const auto load = [&](int step) {
    if (i < 16 && step < steps) {
      fastgan::copy_async_or_zero<16>(&tiles[step % 3][i], x + 64 * step + 4 * i, step < steps - 1 || i < 8);
    }
    fastgan::commit_copies();
  };
  load(0);
  load(1);
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    fastgan::wait_copies<1>();
    __syncthreads();
    load(step + 2);
    const float4 v = tiles[step % 3][(63 - i) / 4];
    sum += (63 - i) % 4 == 0 ? v.x : (63 - i) % 4 == 1 ? v.y : (63 - i) % 4 == 2 ? v.z : v.w;
  }
  y[i] = sum;
}

// Two halves of the block, each with a barrier of its own, a different number of times.
__global__ void named_barriers(const float* x, float* y) {
  FASTGAN_SHARED(float, tile, [128]);
  const unsigned half = threadIdx.x / 64, i = threadIdx.x % 64;
  float value = x[threadIdx.x];
  for (unsigned round = 0; round < 2 + half; ++round) {
    tile[threadIdx.x] = value;
    fastgan::barrier_sync(1 + half, 64);
    value += tile[half * 64 + 63 - i];
    fastgan::barrier_sync(1 + half, 64);
  }
  y[threadIdx.x] = value;
}

__global__ void atomics(const int* x, int* y, unsigned* z) {
  const int value = x[threadIdx.x];
  atomicAdd(y, value);
  atomicMax(y + 1, value);
  atomicMin(y + 2, value);
  atomicOr(y + 3, value);
  atomicAnd(y + 4, value);
  atomicXor(y + 5, value);
  atomicInc(z, 9);
  unsigned expected = 0, found;
  while ((found = atomicCAS(z + 1, expected, expected + 2)) != expected) {
    expected = found;
  }
}

__global__ void vectors(const float* x, float* y) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(x) + threadIdx.x);
  reinterpret_cast<float2*>(y)[threadIdx.x] = make_float2(max(v.x, v.y), min(v.z, v.w));
}

template <typename T>
__global__ void convert(const float* x, T* y, float* z) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = static_cast<T>(x[i]);
  z[i] = static_cast<float>(y[i]);
}

__global__ void group_sums(const float* x, float* y) {
  namespace cg = cooperative_groups;
  const auto block = cg::this_thread_block();
  const auto tile = cg::tiled_partition<8>(block);
  const float sum = cg::reduce(tile, x[block.thread_rank()], cg::plus<float>());
  const unsigned yes = tile.ballot(x[block.thread_rank()] > 0);
  block.sync();
  if (tile.thread_rank() == 0) {
    y[2 * tile.meta_group_rank()] = sum;
    y[2 * tile.meta_group_rank() + 1] = static_cast<float>(yes);
  }
}

template <typename T>
using In = simt::Buffer<const T>;
template <typename T>
using Out = simt::Buffer<T>;

SIMT_EXPORT(
    "shuffle", +[](In<int> x, Out<int> y, int kind, int argument, int width) {
      simt::launch(1, 32, 0, shuffle, x.data, y.data, kind, argument, width);
    });
SIMT_EXPORT("votes", +[](In<int> x, Out<unsigned> y) { simt::launch(1, 32, 0, votes, x.data, y.data); });
SIMT_EXPORT(
    "block_votes",
    +[](In<int> x, Out<int> y) { simt::launch(1, static_cast<unsigned>(x.size), 0, block_votes, x.data, y.data); });
SIMT_EXPORT("indices", +[](Out<int> y) { simt::launch(dim3(2, 3, 2), dim3(4, 3, 2), 0, indices, y.data); });
SIMT_EXPORT(
    "product_f16",
    +[](In<__half> a, In<__half> b, Out<float> y) { simt::launch(1, 32, 0, product<__half>, a.data, b.data, y.data); });
SIMT_EXPORT(
    "product_bf16", +[](In<__nv_bfloat16> a, In<__nv_bfloat16> b, Out<float> y) {
      simt::launch(1, 32, 0, product<__nv_bfloat16>, a.data, b.data, y.data);
    });
SIMT_EXPORT("matrices", +[](In<uint16_t> x, Out<unsigned> y) { simt::launch(1, 32, 0, matrices, x.data, y.data); });
SIMT_EXPORT(
    "pipeline", +[](In<float> x, Out<float> y) {
      simt::launch(1, 64, 0, pipeline, x.data, y.data, static_cast<int>(x.size / 64));
    });
SIMT_EXPORT(
    "named_barriers", +[](In<float> x, Out<float> y) { simt::launch(1, 128, 0, named_barriers, x.data, y.data); });
SIMT_EXPORT(
    "atomics", +[](In<int> x, Out<int> y, Out<unsigned> z) {
      simt::launch(1, static_cast<unsigned>(x.size), 0, atomics, x.data, y.data, z.data);
    });
SIMT_EXPORT(
    "vectors",
    +[](In<float> x, Out<float> y) { simt::launch(1, static_cast<unsigned>(x.size / 4), 0, vectors, x.data, y.data); });
SIMT_EXPORT(
    "convert_f16", +[](In<float> x, Out<__half> y, Out<float> z) {
      simt::launch(static_cast<unsigned>(x.size / 256), 256, 0, convert<__half>, x.data, y.data, z.data);
    });
SIMT_EXPORT(
    "convert_bf16", +[](In<float> x, Out<__nv_bfloat16> y, Out<float> z) {
      simt::launch(static_cast<unsigned>(x.size / 256), 256, 0, convert<__nv_bfloat16>, x.data, y.data, z.data);
    });
SIMT_EXPORT(
    "group_sums",
    +[](In<float> x, Out<float> y) { simt::launch(1, static_cast<unsigned>(x.size), 0, group_sums, x.data, y.data); });

}  // namespace
