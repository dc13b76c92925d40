// How spectral_sigma's layers are divided among blocks: plain C++, the same for nvcc's launches and csrc/simt's.
//
// One of an iteration's two products, the first, has one number per *owned* index (a row, or a column in the hook's
// order), the second one per *spanned* index. A block owns some consecutive indices of one layer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace fastgan {

// An axis of a layer's matrix. Index i lies (i / inner) * outer_stride + (i % inner) * inner_stride elements from the
// beginning, and at (i / inner) * outer_step + (i % inner) * inner_step in the vector u or v.
struct SigmaAxis {
  int extent, inner;
  int64_t outer_stride, inner_stride;
  int outer_step, inner_step;
};

struct SigmaLayer {
  const void* weight;
  const float *own, *other;    // u and v, or v and u in the hook's order
  float *own_out, *other_out;  // where they are written
  float* sigma;
  SigmaAxis owned, spanned;
  int first_block, blocks, span;  // its blocks, each of `span` owned indices
  int group;                      // blocks whose partial sums are added first
  int rows, chunk, pitch;         // a tile in shared memory: owned indices, spanned ones, elements between its rows
  int team;                       // threads that share a row's product, a power of two up to a warp
  int lanes;                      // threads side by side along the spanned axis, a power of two up to all
  short vector;                   // elements of a load
  bool owned_fast;                // along which axis memory runs
  bool second_in_shared;          // else the second product is summed up in global memory
  int counter;
  int64_t first, partial;  // in the workspace: the first product, and a row of the second one per block
};

// Kernel parameters have 4 KB.
constexpr int kSigmaLayers = 23;
struct SigmaBatch {
  SigmaLayer layers[kSigmaLayers];
  int count;
  float eps;
  float* workspace;
  unsigned* counters;
};
static_assert(sizeof(SigmaBatch) <= 4096);

constexpr int kSigmaThreads = 256;
constexpr int kSigmaWarps = kSigmaThreads / 32;
// Of dynamic shared memory, which with the static kind stays within what every launch may have.
constexpr int kSigmaSharedBytes = 47 * 1024;
// A block's first products and their parts, before the tile.
constexpr int kSigmaMostRows = kSigmaThreads;
constexpr int kSigmaSums = kSigmaMostRows + kSigmaWarps * kSigmaWarps;

// A weight and its vectors, as a caller has them.
struct SigmaWeight {
  const void* data;
  std::vector<int64_t> sizes, strides;
  int64_t dim;
  const float *u, *v;
  float *u_out, *v_out, *sigma;
};

// The columns' axis of a weight; nothing if they are more than two nested strides apart in memory.
inline std::optional<SigmaAxis> sigma_columns(const SigmaWeight& weight) {
  struct Run {
    int64_t stride, step, extent;
  };
  std::vector<Run> runs, merged;
  int64_t step = 1;
  for (int axis = static_cast<int>(weight.sizes.size()) - 1; axis >= 0; --axis) {
    if (axis != weight.dim) {
      if (weight.sizes[axis] > 1) {
        runs.push_back({weight.strides[axis], step, weight.sizes[axis]});
      }
      step *= weight.sizes[axis];
    }
  }
  std::stable_sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.stride < b.stride; });
  for (const Run& run : runs) {
    if (!merged.empty() && run.stride == merged.back().stride * merged.back().extent &&
        run.step == merged.back().step * merged.back().extent) {
      merged.back().extent *= run.extent;
    } else {
      merged.push_back(run);
    }
  }
  if (merged.size() > 2) {
    return std::nullopt;
  }
  merged.resize(2, {0, 0, 1});
  const Run &inner = merged[0], &outer = merged[1];
  return SigmaAxis{static_cast<int>(inner.extent * outer.extent),
                   static_cast<int>(inner.extent),
                   outer.stride,
                   inner.stride,
                   static_cast<int>(outer.step),
                   static_cast<int>(inner.step)};
}

struct SigmaPlan {
  std::vector<SigmaLayer> layers;
  int64_t workspace = 0;  // floats
  int counters = 0;       // zero before and after
};

// Floats of the second product in shared memory. Of a short one every thread has its own part.
#ifdef __CUDACC__
__host__ __device__
#endif
    inline int sigma_second_size(const SigmaLayer& layer) {
  return layer.lanes < kSigmaThreads ? kSigmaThreads : (layer.spanned.extent + 3) / 4 * 4;
}

// The tile of a layer: as many owned indices with all that they span as shared memory holds; of a longer extent pieces,
// which are then read twice.
inline void plan_sigma_tile(SigmaLayer& layer, int item_bytes) {
  const int vector = layer.vector, spanned = layer.spanned.extent;
  const auto pitch = [&](int chunk) {
    // Rows begin where vectors may; or at odd distances, where a warp stores along the other axis.
    return layer.owned_fast ? chunk | 1 : (chunk + vector - 1) / vector * vector;
  };
  const auto power_of_two = [&](int most) {
    int power = 1;
    while (power < most && power < spanned) {
      power *= 2;
    }
    return power;
  };
  layer.team = power_of_two(32);
  layer.lanes = power_of_two(kSigmaThreads);
  const int second_bytes = sigma_second_size(layer) * 4, available = kSigmaSharedBytes - kSigmaSums * 4;
  layer.second_in_shared = second_bytes + pitch(spanned) * item_bytes <= available;
  const int tile_bytes = available - (layer.second_in_shared ? second_bytes : 0);
  layer.chunk = spanned;
  if (pitch(spanned) * item_bytes > tile_bytes) {
    layer.chunk = tile_bytes / item_bytes / kSigmaThreads * kSigmaThreads - kSigmaThreads;
  }
  layer.pitch = pitch(layer.chunk);
  layer.rows = std::clamp(tile_bytes / (layer.pitch * item_bytes), 1, kSigmaMostRows);
  if (layer.rows > kSigmaWarps) {
    layer.rows = layer.rows / kSigmaWarps * kSigmaWarps;
  }
  layer.rows = std::min(layer.rows, layer.owned.extent);
  if (layer.owned_fast && layer.rows % vector != 0) {
    // Every tile has to begin where a load may.
    layer.rows = layer.rows / vector * vector;
    if (layer.rows == 0) {
      layer.rows = layer.vector = 1;
    }
  }
}

// Along which axis memory runs, and how many elements one load may have: 16 bytes of them where all is aligned so.
inline void plan_sigma_loads(SigmaLayer& layer, int item_bytes) {
  const SigmaAxis &owned = layer.owned, &spanned = layer.spanned;
  const auto nearest = [](const SigmaAxis& axis) { return axis.extent > 1 ? axis.inner_stride : INT64_MAX; };
  layer.owned_fast = nearest(owned) < nearest(spanned);
  const SigmaAxis &fast = layer.owned_fast ? owned : spanned, &slow = layer.owned_fast ? spanned : owned;
  const int vector = 16 / item_bytes;
  const bool wide = reinterpret_cast<uintptr_t>(layer.weight) % 16 == 0 && fast.inner_stride == 1 &&
                    fast.inner % vector == 0 && fast.outer_stride % vector == 0 && slow.outer_stride % vector == 0 &&
                    slow.inner_stride % vector == 0;
  layer.vector = static_cast<short>(wide ? vector : 1);
}

// Divides all layers among blocks. Every weight must have its columns; hook: v first; read: no iteration, sigma alone.
inline SigmaPlan plan_sigma(const std::vector<SigmaWeight>& weights, int item_bytes, bool hook, bool read) {
  // Four blocks for each of some 128 multiprocessors, but not less than 16384 elements each, nor so many that the last
  // one runs alone for long.
  constexpr int64_t kBlocks = 512, kLeast = 16384, kMost = 65536;
  hook = hook && !read;
  int64_t elements = 0;
  for (const SigmaWeight& weight : weights) {
    elements += weight.sizes[weight.dim] * sigma_columns(weight).value().extent;
  }
  const int64_t share = std::clamp(elements / kBlocks, kLeast, kMost);
  SigmaPlan plan;
  int blocks = 0;
  for (const SigmaWeight& weight : weights) {
    const int rows = static_cast<int>(weight.sizes[weight.dim]);
    const SigmaAxis row_axis{rows, rows, 0, weight.strides[weight.dim], 0, 1},
        column_axis = sigma_columns(weight).value();
    SigmaLayer layer{};
    layer.weight = weight.data, layer.sigma = weight.sigma;
    layer.own = hook ? weight.v : weight.u, layer.own_out = hook ? weight.v_out : weight.u_out;
    layer.other = hook ? weight.u : weight.v, layer.other_out = hook ? weight.u_out : weight.v_out;
    layer.owned = hook ? column_axis : row_axis, layer.spanned = hook ? row_axis : column_axis;
    plan_sigma_loads(layer, item_bytes);
    plan_sigma_tile(layer, item_bytes);
    const int owned = layer.owned.extent, spanned = (layer.spanned.extent + 3) / 4 * 4;
    const int64_t tiles = std::max<int64_t>(1, share / spanned / layer.rows);
    layer.span = static_cast<int>(std::min<int64_t>(tiles * layer.rows, owned));
    layer.blocks = (owned + layer.span - 1) / layer.span;
    layer.group = std::max(1, static_cast<int>(std::lround(std::sqrt(layer.blocks))));
    // Launches take kSigmaLayers at a time, and count their blocks from 0.
    blocks = plan.layers.size() % kSigmaLayers == 0 ? 0 : blocks;
    layer.first_block = blocks;
    blocks += layer.blocks;
    layer.first = plan.workspace;
    layer.partial = layer.first + (owned + 3) / 4 * 4;
    plan.workspace = layer.partial + static_cast<int64_t>(layer.blocks) * spanned;
    layer.counter = plan.counters;
    plan.counters += 1 + (layer.blocks + layer.group - 1) / layer.group;
    plan.layers.push_back(layer);
  }
  return plan;
}

// The layers from `begin` on of one launch, and its blocks. again: not the first iteration, which starts from what the
// one before has written.
inline int sigma_batch(const SigmaPlan& plan, size_t begin, bool again, SigmaBatch& batch) {
  batch.count = static_cast<int>(std::min<size_t>(kSigmaLayers, plan.layers.size() - begin));
  for (int i = 0; i < batch.count; ++i) {
    SigmaLayer& layer = batch.layers[i] = plan.layers[begin + i];
    if (again) {
      layer.own = layer.own_out, layer.other = layer.other_out;
    }
  }
  const SigmaLayer& last = batch.layers[batch.count - 1];
  return last.first_block + last.blocks;
}

}  // namespace fastgan
