// Device code of spectral_sigma: a power iteration of all layers of a network in one launch, one read of each weight.
//
//   u <- n(W v),  v <- n(W^T u),  sigma = u^T W v,  n(x) = x / max(|x|, eps)          the hook's order: v first
//
// A block owns some consecutive indices of one layer (spectral_sigma_plan.h) and sees all of W that belongs to them,
// tile by tile in shared memory: first[a] = sum_b W[a, b] x[b] is final before first[a] W[a, :] is added to the block's
// partial sum of the second product, so one read serves both. Nothing is normalised before the end: both products are
// linear, so the norms are divided out afterwards, and sigma = |second|^2 / max(|second|, eps) needs no third product.
//
// The last block to arrive of each group of some sqrt(blocks) adds its group's partial sums, the last of the groups
// adds those: all sums are in an order that depends on the shapes alone.
//
// Source: Miyato et al., Spectral Normalization for GANs (2018), algorithm 1 and equation 11.
#pragma once

#include "device.h"
#include "reduce.cuh"
#include "spectral_sigma_plan.h"

namespace fastgan {

__device__ inline int64_t sigma_offset(const SigmaAxis& axis, int i) {
  if (axis.inner == axis.extent) {
    return i * axis.inner_stride;
  }
  return i / axis.inner * axis.outer_stride + i % axis.inner * axis.inner_stride;
}

__device__ inline int sigma_position(const SigmaAxis& axis, int i) {
  if (axis.inner == axis.extent) {
    return i * axis.inner_step;
  }
  return i / axis.inner * axis.outer_step + i % axis.inner * axis.inner_step;
}

// max(sqrt(squares), eps), written so that a NaN stays one.
__device__ inline float sigma_norm(float squares, float eps) {
  const float norm = sqrtf(squares);
  return norm < eps ? eps : norm;
}

// W at owned indices begin ... begin + count and spanned ones chunk ... chunk + width, as rows of the tile.
template <typename T>
__device__ inline void load_sigma_tile(const SigmaLayer& layer, int begin, int count, int chunk, int width, T* tile) {
  constexpr int kVector = 16 / sizeof(T);
  const T* weight = static_cast<const T*>(layer.weight);
  const int vector = layer.vector, fast = layer.owned_fast ? count : width, slow = layer.owned_fast ? width : count;
  const int loads = (fast + vector - 1) / vector;
  for (int i = threadIdx.x; i < loads * slow; i += kSigmaThreads) {
    const int along = i % loads * vector, across = i / loads;
    const int row = layer.owned_fast ? along : across, column = layer.owned_fast ? across : along;
    const T* source = weight + sigma_offset(layer.owned, begin + row) + sigma_offset(layer.spanned, chunk + column);
    T* target = tile + row * layer.pitch + column;
    if (vector == 1) {
      *target = *source;
      continue;
    }
    const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(source));
    if (!layer.owned_fast) {
      *reinterpret_cast<uint4*>(target) = loaded;
      continue;
    }
    const T* elements = reinterpret_cast<const T*>(&loaded);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      target[k * layer.pitch] = elements[k];
    }
  }
}

// sums[row * parts + part] += the part's share of tile[row, :] . x[chunk ...]: a team of threads per part.
template <typename T>
__device__ inline void add_sigma_products(const SigmaLayer& layer, int count, int parts, int chunk, int width,
                                          const T* tile, float* sums) {
  const int team = layer.team, lane = threadIdx.x % team, units = count * parts;
  // The same for all lanes of a warp, which shuffle together.
  const int first_of_warp = threadIdx.x / 32 * (32 / team);
  for (int begin = 0; begin + first_of_warp < units; begin += kSigmaThreads / team) {
    const int unit = begin + threadIdx.x / team;
    float sum = 0;
    if (unit < units) {
      const T* row = tile + unit / parts * layer.pitch;
      for (int b = unit % parts * team + lane; b < width; b += parts * team) {
        sum += static_cast<float>(row[b]) * layer.other[sigma_position(layer.spanned, chunk + b)];
      }
    }
    for (int distance = team / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (lane == 0 && unit < units) {
      sums[unit] = chunk == 0 ? sum : sums[unit] + sum;
    }
  }
}

// second[b] += sum_a first[a] tile[a, b]. Where the axis is short, groups of threads share the rows, and each thread
// has a sum of its own.
template <typename T>
__device__ inline void add_sigma_rows(const SigmaLayer& layer, int count, int chunk, int width, const float* row_sums,
                                      const T* tile, bool begins, float* second) {
  const int lanes = layer.lanes, group = threadIdx.x / lanes, groups = kSigmaThreads / lanes;
  // All threads of the groups, for all their sums are added in the end.
  for (int b = threadIdx.x % lanes; b < (groups > 1 ? lanes : width); b += lanes) {
    // A sum per tile first: of many rows it is more exact.
    float sum = 0;
    for (int a = group; b < width && a < count; a += groups) {
      sum += row_sums[a] * static_cast<float>(tile[a * layer.pitch + b]);
    }
    float* target = second + (groups > 1 ? static_cast<int>(threadIdx.x) : chunk + b);
    *target = begins ? sum : *target + sum;
  }
}

// The owned indices begin ... end: writes first[begin ... end] and the partial second product, or with kRead the one
// number sum_a own[a] first[a].
template <typename T, bool kRead>
__device__ inline void sweep_sigma(const SigmaLayer& layer, int begin, int end, float* first, float* partial) {
  // As T, the smallest piece that threads write.
  FASTGAN_DYNAMIC_SHARED(T, memory);
  float* row_sums = reinterpret_cast<float*>(memory);  // [rows]
  float* sums = row_sums + kSigmaMostRows;             // [rows, parts]
  float* after = row_sums + kSigmaSums;
  const int spanned = layer.spanned.extent;
  float* second = layer.second_in_shared ? after : partial;
  T* tile = reinterpret_cast<T*>(after + (layer.second_in_shared ? sigma_second_size(layer) : 0));
  const bool whole = layer.chunk >= spanned;
  float sigma = 0;
  for (int start = begin; start < end; start += layer.rows) {
    const int count = min(layer.rows, end - start);
    // Few long rows are divided among all warps.
    const int parts = layer.team == 32 && count < kSigmaWarps ? kSigmaWarps : 1;
    float* products = parts == 1 ? row_sums : sums;
    for (int chunk = 0; chunk < spanned; chunk += layer.chunk) {
      const int width = min(layer.chunk, spanned - chunk);
      __syncthreads();
      load_sigma_tile(layer, start, count, chunk, width, tile);
      __syncthreads();
      add_sigma_products(layer, count, parts, chunk, width, tile, products);
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count) {
      const int a = threadIdx.x;
      float product = products[a * parts];
      for (int part = 1; part < parts; ++part) {
        product += products[a * parts + part];
      }
      if (kRead) {
        sigma += product * layer.own[sigma_position(layer.owned, start + a)];
      } else {
        row_sums[a] = product;
        first[start + a] = product;
      }
    }
    if (kRead) {
      continue;
    }
    __syncthreads();
    for (int chunk = 0; chunk < spanned; chunk += layer.chunk) {
      const int width = min(layer.chunk, spanned - chunk);
      if (!whole) {
        __syncthreads();
        load_sigma_tile(layer, start, count, chunk, width, tile);
        __syncthreads();
      }
      add_sigma_rows(layer, count, chunk, width, row_sums, tile, start == begin, second);
    }
  }
  if (kRead) {
    sigma = block_sum<kSigmaThreads>(sigma);
    if (threadIdx.x == 0) {
      *partial = sigma;
    }
  } else if (layer.second_in_shared) {
    // The groups' sums as a tree, which is more exact than a row of them.
    for (int half = kSigmaThreads / 2; half >= layer.lanes; half /= 2) {
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < half) {
        second[threadIdx.x] += second[threadIdx.x + half];
      }
    }
    // Each thread reads what it wrote itself.
    for (int b = threadIdx.x; b < spanned; b += kSigmaThreads) {
      partial[b] = second[b];
    }
  }
}

// Sum of `count` partial sums at index b, `stride` apart. Past the first-level cache, which does not see other blocks.
__device__ inline float add_partials(const float* partial, int64_t stride, int count, int b) {
  float total = 0;
  for (int i = 0; i < count; ++i) {
    total += __ldcg(partial + i * stride + b);
  }
  return total;
}

// Adds the groups' partial sums, normalises both vectors, writes u, v and sigma: a layer's last block.
__device__ inline void finish_sigma(const SigmaLayer& layer, const float* first, float* partial, int64_t stride,
                                    int count, float eps) {
  const int owned = layer.owned.extent, spanned = layer.spanned.extent;
  float squares = 0;
  for (int a = threadIdx.x; a < owned; a += kSigmaThreads) {
    const float product = __ldcg(first + a);
    squares += product * product;
  }
  const float first_factor = 1.0f / sigma_norm(block_sum<kSigmaThreads>(squares), eps);
  for (int a = threadIdx.x; a < owned; a += kSigmaThreads) {
    layer.own_out[sigma_position(layer.owned, a)] = __ldcg(first + a) * first_factor;
  }
  squares = 0;
  for (int b = threadIdx.x; b < spanned; b += kSigmaThreads) {
    // Normalised before it is squared: the first product alone may be as large as sigma^2 |v|.
    const float second = add_partials(partial, stride, count, b) * first_factor;
    squares += second * second;
    partial[b] = second;
  }
  const float total = block_sum<kSigmaThreads>(squares);
  const float factor = 1.0f / sigma_norm(total, eps);
  for (int b = threadIdx.x; b < spanned; b += kSigmaThreads) {
    layer.other_out[sigma_position(layer.spanned, b)] = partial[b] * factor;
  }
  if (threadIdx.x == 0) {
    *layer.sigma = total * factor;
  }
}

// One power iteration of all layers of the batch, or with kRead sigma alone; u and v are copied then.
template <typename T, bool kRead>
__global__ void __launch_bounds__(kSigmaThreads, 2) sigma_kernel(const __grid_constant__ SigmaBatch batch) {
  int number = 0;
  while (number + 1 < batch.count && static_cast<int>(blockIdx.x) >= batch.layers[number + 1].first_block) {
    ++number;
  }
  const SigmaLayer& layer = batch.layers[number];
  const int index = static_cast<int>(blockIdx.x) - layer.first_block;
  const int begin = index * layer.span, end = min(begin + layer.span, layer.owned.extent);
  const int64_t stride = (layer.spanned.extent + 3) / 4 * 4;
  float* first = batch.workspace + layer.first;
  float* partial = batch.workspace + layer.partial;
  sweep_sigma<T, kRead>(layer, begin, end, first, partial + index * stride);

  unsigned* counter = batch.counters + layer.counter;
  if (kRead) {
    if (arrive(counter, layer.blocks)) {
      float sum = 0;
      for (int i = threadIdx.x; i < layer.blocks; i += kSigmaThreads) {
        sum += __ldcg(partial + i * stride);
      }
      sum = block_sum<kSigmaThreads>(sum);
      if (threadIdx.x == 0) {
        *layer.sigma = sum;
      }
      for (int i = threadIdx.x; i < layer.owned.extent; i += kSigmaThreads) {
        layer.own_out[i] = layer.own[i];
      }
      for (int i = threadIdx.x; i < layer.spanned.extent; i += kSigmaThreads) {
        layer.other_out[i] = layer.other[i];
      }
    }
    return;
  }
  const int group = index / layer.group, groups = (layer.blocks + layer.group - 1) / layer.group;
  const int size = min(layer.group, layer.blocks - group * layer.group);
  if (!arrive(counter + 1 + group, size)) {
    return;
  }
  float* group_partial = partial + group * layer.group * stride;
  for (int b = threadIdx.x; size > 1 && b < layer.spanned.extent; b += kSigmaThreads) {
    group_partial[b] = add_partials(group_partial, stride, size, b);
  }
  if (arrive(counter, groups)) {
    finish_sigma(layer, first, partial, layer.group * stride, groups, batch.eps);
  }
}

}  // namespace fastgan
