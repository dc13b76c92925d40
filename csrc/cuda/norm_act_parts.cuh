// What norm_act's kernels are made of: how a thread walks an image, and sums over teams and rows.
#pragma once

#include <type_traits>

#include "device.h"
#include "norm_act_plan.h"

namespace fastgan {

// A team's slice of a plane. Position i is an element of the slice; a thread's vector at i has the elements i + k, or
// i + k team where 16 bytes at a time cannot be: a warp's accesses are side by side in both cases.
template <typename T>
struct NormPlane {
  static constexpr int kVector = 16 / sizeof(T), kChannels = 1;
  int64_t sample = 0, channel = 0, slice = 0, begin = 0, base = 0, jump = 0;
  int count = 0, run = 1, team, lane, spacing;
  bool wide;

  __device__ explicit NormPlane(const NormCall& call) {
    const NormPlan& plan = call.plan;
    team = plan.team, lane = static_cast<int>(threadIdx.x) % team;
    wide = plan.wide, spacing = wide ? 1 : team;
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * (plan.threads / team) + threadIdx.x / team;
    // A team without a slice walks with the others of its warp, over nothing.
    if (unit >= plan.units) {
      return;
    }
    const int64_t plane = unit / plan.slices;
    slice = unit % plan.slices;
    sample = plane / call.channels, channel = plane % call.channels;
    begin = slice * plan.slice;
    count = static_cast<int>(min(plan.slice, call.pixels - begin));
    run = static_cast<int>(call.run);
    jump = call.run == call.pixels ? 0 : (call.channels - 1) * call.run;
    base = (sample * call.channels + channel) * call.run;
  }
  __device__ int first() const { return wide ? lane * kVector : lane; }
  __device__ int stride() const { return team * kVector; }
  __device__ int64_t channel_of(int) const { return channel; }
  // Where element k of the vector at i lies, -1 if there is none.
  __device__ int64_t offset(int i, int k) const {
    const int at = i + k * spacing;
    if (at >= count) {
      return -1;
    }
    const int64_t place = begin + at;
    return base + place + (jump == 0 ? 0 : static_cast<int>(place) / run * jump);
  }
};

// A block's slice of a sample's pixels, channels_last. Position i is a pixel, element k of a vector a channel.
template <typename T>
struct NormRows {
  static constexpr int kVector = 16 / sizeof(T), kChannels = kVector;
  int64_t sample, slice, base, channels, channel;
  int count, team, row, rows, spacing;
  int there;  // how many elements of a vector are channels
  bool wide;

  __device__ explicit NormRows(const NormCall& call) {
    const NormPlan& plan = call.plan;
    const int lane = static_cast<int>(threadIdx.x) % plan.team;
    team = plan.team, row = static_cast<int>(threadIdx.x) / team, rows = plan.threads / team;
    wide = plan.wide, spacing = wide ? 1 : team;
    sample = blockIdx.x / plan.slices, slice = blockIdx.x % plan.slices;
    channels = call.channels;
    channel = static_cast<int64_t>(blockIdx.y) * team * kVector + (wide ? lane * kVector : lane);
    there = static_cast<int>(min(max(channels - channel + spacing - 1, int64_t{0}) / spacing, int64_t{kVector}));
    base = (sample * call.pixels + slice * plan.slice) * channels + channel;
    count = static_cast<int>(min(plan.slice, call.pixels - slice * plan.slice));
  }
  __device__ int first() const { return row; }
  __device__ int stride() const { return rows; }
  // The channel of element k, or one past the last.
  __device__ int64_t channel_of(int k) const { return k < there ? channel + k * spacing : channels; }
  __device__ int64_t offset(int i, int k) const {
    return i < count && k < there ? base + i * channels + k * spacing : -1;
  }
};

template <typename T>
__device__ inline void norm_unpack(const uint4& raw, float (&values)[16 / sizeof(T)]) {
  const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int k = 0; k < static_cast<int>(16 / sizeof(T)); ++k) {
    values[k] = static_cast<float>(elements[k]);
  }
}

// The vector at position i; 0 for what is not there.
template <typename T, typename Walk>
__device__ inline void norm_load(const void* data, const Walk& walk, int i, float (&values)[Walk::kVector]) {
  const T* from = static_cast<const T*>(data);
  if (walk.wide) {
    const int64_t offset = walk.offset(i, 0);
    const uint4 raw = offset < 0 ? uint4{0, 0, 0, 0} : __ldg(reinterpret_cast<const uint4*>(from + offset));
    norm_unpack<T>(raw, values);
    return;
  }
#pragma unroll
  for (int k = 0; k < Walk::kVector; ++k) {
    const int64_t offset = walk.offset(i, k);
    values[k] = offset < 0 ? 0.0f : static_cast<float>(from[offset]);
  }
}

template <typename T, typename Walk>
__device__ inline void norm_store(void* data, const Walk& walk, int i, const float (&values)[Walk::kVector]) {
  T* to = static_cast<T*>(data);
  if (walk.wide) {
    const int64_t offset = walk.offset(i, 0);
    if (offset >= 0) {
      uint4 raw;
      T* elements = reinterpret_cast<T*>(&raw);
#pragma unroll
      for (int k = 0; k < Walk::kVector; ++k) {
        elements[k] = static_cast<T>(values[k]);
      }
      *reinterpret_cast<uint4*>(to + offset) = raw;
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < Walk::kVector; ++k) {
    const int64_t offset = walk.offset(i, k);
    if (offset >= 0) {
      to[offset] = static_cast<T>(values[k]);
    }
  }
}

// The sums over a team of up to a warp, or over a block, in every thread of it. All threads of the block have to call.
template <typename V, int kSums>
__device__ inline void norm_team_sums(V (&sums)[kSums], int team) {
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    for (int distance = min(team, 32) / 2; distance > 0; distance /= 2) {
      sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], distance);
    }
  }
  if (team <= 32) {
    return;
  }
  FASTGAN_SHARED(V, of_warps, [kSums][kNormMostThreads / 32]);
  // Whoever still reads the sums of the call before.
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    if (threadIdx.x % 32 == 0) {
      of_warps[k][threadIdx.x / 32] = sums[k];
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sums[k] = 0;
    for (int warp = 0; warp < team / 32; ++warp) {
      sums[k] += of_warps[k][warp];
    }
  }
}

// Combines the values of all rows of the block into those of row 0: pairs of rows, whatever their order in time.
template <int kValues, typename Combine>
__device__ inline void norm_combine_rows(float (&values)[kValues], int team, Combine combine) {
  FASTGAN_SHARED(float, of_rows, [kValues][kNormThreads / 2]);
  const int thread = static_cast<int>(threadIdx.x);
  for (int half = kNormThreads / 2; half >= team; half /= 2) {
    if (thread >= half && thread < 2 * half) {
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        of_rows[k][thread - half] = values[k];
      }
    }
    __syncthreads();
    if (thread < half) {
      float others[kValues];
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        others[k] = of_rows[k][thread];
      }
      combine(values, others);
    }
    __syncthreads();
  }
}

}  // namespace fastgan
