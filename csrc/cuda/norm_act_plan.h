// How norm_act's launches divide an image among blocks: plain C++, the same for nvcc's launches and csrc/simt's.
//
// Planar (NCHW): a team of threads has a slice of one plane. channels_last: a block has a slice of one sample's pixels
// and a tile of the channels. Samples that share their statistics and all parameters are merged into one whose planes
// have gaps, so that what follows knows no batch norm unless its parameters differ between samples.
#pragma once

#include <algorithm>
#include <cstdint>

#include "activation.h"

namespace fastgan {

struct NormPlan {
  bool wide;        // 16 bytes at a time, else elements
  int team;         // threads that share a slice, or that lie side by side along the channels; a power of two
  int threads;      // of a block
  int chunks;       // planar: vectors per thread and slice, what shared memory keeps
  int64_t slice;    // values of a plane, or pixels
  int64_t slices;   // per plane, or per sample
  int64_t units;    // planes times slices, or samples times slices
  int tiles;        // of channels
  int slice_bytes;  // planar: shared memory of a block, per tensor that is kept
};

// Everything that a kernel knows. Kernels take what they need: x is read by all, gy and means by those of the gradient.
struct NormCall {
  const void *x, *gy;
  void* out;  // y or the gradient of x; null if it is not wanted
  const float *weight, *bias;
  int64_t weight_stride, bias_stride;  // between samples: 0 for [C]
  double *mean, *var;                  // per group
  double* partial;                     // per slice and channel (mean, squared deviations) or the sums of g and g u
  double* means;                       // per group <k> and <k u>; null for given statistics
  float *grad_weight, *grad_bias;      // null if they are not wanted
  int64_t samples, channels, pixels;
  int64_t run;  // planar: pixels of a plane that lie in a row; more in a merged one
  bool batch;   // groups of several samples, unless these are merged
  bool fixed;   // the statistics are given, they do not follow x
  Act act;
  float alpha, gain, eps;
  NormPlan plan;
};
static_assert(sizeof(NormCall) <= 4096);

constexpr int kNormThreads = 256;
// Of a block that has a plane for itself.
constexpr int kNormMostThreads = 512;
// Vectors per thread where that can be chosen: enough loads on their way at once, and little left over.
constexpr int kNormChunks = 4;

constexpr int64_t norm_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int norm_power_of_two(int64_t least, int most) {
  int power = 1;
  while (power < least && power < most) {
    power *= 2;
  }
  return power;
}

// Samples that differ in nothing but x become one.
inline void merge_norm_samples(NormCall& call) {
  // Positions within a plane are 32-bit numbers.
  constexpr int64_t kMost = INT32_MAX;
  call.run = call.pixels;
  if (call.batch && call.weight_stride == 0 && call.bias_stride == 0 && call.samples * call.pixels <= kMost) {
    call.pixels *= call.samples;
    call.samples = 1;
    call.batch = false;
  }
}

// Planes, each of which one team keeps in shared memory.
inline NormPlan plan_norm_planes(const NormCall& call, bool aligned, int item_bytes) {
  const int vector = 16 / item_bytes;
  const int64_t vectors = norm_ceil(call.pixels, vector);
  NormPlan plan{};
  plan.wide = aligned && call.run % vector == 0;
  // A warp or part of one, several to a block, which never wait for each other; else a whole block.
  plan.team = vectors <= 32 * kNormChunks
                  ? norm_power_of_two(vectors, 32)
                  : std::max(64, norm_power_of_two(norm_ceil(vectors, kNormChunks), kNormMostThreads));
  plan.threads = plan.team > 32 ? plan.team : 128;
  // As large as no GPU has shared memory for, and no larger: the gradient asks for twice as much.
  constexpr int kMostBytes = INT32_MAX / 2;
  plan.chunks = static_cast<int>(std::min<int64_t>(norm_ceil(vectors, plan.team), kMostBytes / 16 / plan.threads));
  plan.slice = call.pixels, plan.slices = 1;
  plan.units = call.samples * call.channels;
  plan.tiles = 1;
  plan.slice_bytes = plan.chunks * plan.threads * 16;
  return plan;
}

// Planes cut into slices of a fixed size, or whole ones that are no larger; by at most kNormThreads either way.
inline NormPlan plan_norm_slices(const NormCall& call, bool aligned, int item_bytes) {
  const int64_t slice = int64_t{kNormThreads} * kNormChunks * (16 / item_bytes);
  if (call.pixels <= slice) {
    return plan_norm_planes(call, aligned, item_bytes);
  }
  NormPlan plan = plan_norm_planes(call, aligned, item_bytes);
  plan.team = plan.threads = kNormThreads;
  plan.chunks = kNormChunks;
  plan.slice = slice, plan.slices = norm_ceil(call.pixels, slice);
  plan.units *= plan.slices;
  plan.slice_bytes = plan.chunks * plan.threads * 16;
  return plan;
}

// channels_last: rows of `team` vectors of channels; a block has as many rows as it has threads for.
inline NormPlan plan_norm_rows(const NormCall& call, bool aligned, int item_bytes) {
  // Enough for every GPU: more would only be more partial sums.
  constexpr int64_t kBlocks = 2048;
  const int vector = 16 / item_bytes;
  const int64_t vectors = norm_ceil(call.channels, vector);
  NormPlan plan{};
  plan.wide = aligned && call.channels % vector == 0;
  plan.team = norm_power_of_two(vectors, 32);
  plan.threads = kNormThreads;
  plan.tiles = static_cast<int>(norm_ceil(vectors, plan.team));
  const int64_t step = int64_t{kNormThreads} / plan.team * kNormChunks;
  const int64_t share = norm_ceil(call.samples * call.pixels * plan.tiles, kBlocks);
  plan.slice = norm_ceil(std::max<int64_t>(share, 1), step) * step;
  plan.slices = norm_ceil(call.pixels, plan.slice);
  plan.units = call.samples * plan.slices;
  return plan;
}

// Blocks along the grid's first axis; along the second there are the tiles.
inline int64_t norm_blocks(const NormPlan& plan, bool last) {
  return last ? plan.units : norm_ceil(plan.units, plan.threads / plan.team);
}

}  // namespace fastgan
