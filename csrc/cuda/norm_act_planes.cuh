// norm_act's kernels of planes (NCHW) that threads keep in shared memory; norm_act.cuh says where they belong.
#pragma once

#include "norm_act_math.cuh"
#include "ptx.h"

namespace fastgan {

// Where the thread keeps its vector number `chunk`. Nobody else reads it.
template <typename T>
__device__ inline T* norm_slot(const NormCall& call, const NormPlane<T>& walk, T* memory, int chunk) {
  const int team = static_cast<int>(threadIdx.x) / walk.team;
  return memory + ((team * call.plan.chunks + chunk) * walk.team + walk.lane) * NormPlane<T>::kVector;
}

// Copies the thread's part of a slice to its slots; it is there after wait_copies.
template <typename T>
__device__ inline void norm_keep(const NormCall& call, const NormPlane<T>& walk, const void* data, T* memory) {
  const T* from = static_cast<const T*>(data);
  for (int i = walk.first(), chunk = 0; i < walk.count; i += walk.stride(), ++chunk) {
    T* slot = norm_slot(call, walk, memory, chunk);
    if (walk.wide) {
      copy_async<16>(slot, from + walk.offset(i, 0));
      continue;
    }
#pragma unroll
    for (int k = 0; k < NormPlane<T>::kVector; ++k) {
      const int64_t offset = walk.offset(i, k);
      slot[k] = offset < 0 ? static_cast<T>(0.0f) : from[offset];
    }
  }
  commit_copies();
}

// f(position, values) for each of the thread's vectors; 0 for what is not there.
template <typename T, typename F>
__device__ __forceinline__ void norm_kept(const NormCall& call, const NormPlane<T>& walk, T* memory, F f) {
  constexpr int kVector = NormPlane<T>::kVector;
  for (int i = walk.first(), chunk = 0; i < walk.count; i += walk.stride(), ++chunk) {
    float values[kVector];
    norm_unpack<T>(*reinterpret_cast<const uint4*>(norm_slot(call, walk, memory, chunk)), values);
    f(i, values);
  }
}

// Moments of a slice, and y if it is a whole group. Dynamic shared memory: one slice per team.
template <typename T>
__global__ void __launch_bounds__(kNormMostThreads) norm_plane_kernel(const __grid_constant__ NormCall call) {
  constexpr int kVector = NormPlane<T>::kVector;
  FASTGAN_DYNAMIC_SHARED(T, memory);
  const NormPlane<T> walk(call);
  norm_keep(call, walk, call.x, memory);
  wait_copies<0>();
  float sum[1] = {0};
  norm_kept(call, walk, memory, [&](int, float (&x)[kVector]) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      sum[0] += x[k];
    }
  });
  norm_team_sums(sum, walk.team);
  const float count = static_cast<float>(walk.count), mean = sum[0] / count;
  float deviations[2] = {0, 0};
  norm_kept(call, walk, memory, [&](int i, float (&x)[kVector]) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float deviation = i + k * walk.spacing < walk.count ? x[k] - mean : 0.0f;
      deviations[0] += deviation;
      deviations[1] += deviation * deviation;
    }
  });
  norm_team_sums(deviations, walk.team);
  // The mean was rounded, and the sum too: what they missed, and the squares about the true one.
  const float missed = deviations[0] / count, rest = deviations[1] - deviations[0] * missed;
  const float squares = rest < 0.0f ? 0.0f : rest;
  if (walk.count == 0) {
    return;
  }
  if (call.partial) {
    if (walk.lane == 0) {
      norm_write_partial(call, walk.sample, walk.slice, walk.channel, static_cast<double>(mean) + missed, squares);
    }
    return;
  }
  const float var = squares / count;
  if (walk.lane == 0) {
    const int64_t group = norm_group(call, walk.sample, walk.channel);
    call.mean[group] = static_cast<double>(mean) + missed;
    call.var[group] = var;
  }
  const NormAffine affine = norm_affine(call, walk.sample, walk.channel, mean, -missed, var);
  norm_kept(call, walk, memory, [&](int i, float (&x)[kVector]) {
    norm_each(x, [&](float value) { return (value - affine.mean) * affine.scale + affine.shift; });
    norm_activate(call, x);
    norm_store<T>(call.out, walk, i, x);
  });
}

// Sums of g and g u over a slice if `partial` is there, and grad_x if `out` is: then the slice is a whole group, or the
// statistics are given. Dynamic shared memory: one slice of x and one of grad_y per team.
template <typename T>
__global__ void __launch_bounds__(kNormMostThreads, 1) norm_plane_grad_kernel(const __grid_constant__ NormCall call) {
  constexpr int kVector = NormPlane<T>::kVector;
  FASTGAN_DYNAMIC_SHARED(T, memory);
  T* const memory_gy = memory + call.plan.slice_bytes / static_cast<int>(sizeof(T));
  const NormPlane<T> walk(call);
  norm_keep(call, walk, call.x, memory);
  norm_keep(call, walk, call.gy, memory_gy);
  NormAffine affine[1] = {};
  if (walk.count > 0) {
    affine[0] = norm_affine(call, walk.sample, walk.channel);
  }
  wait_copies<0>();
  const auto for_cotangents = [&](auto f) {
    int chunk = 0;
    norm_kept(call, walk, memory, [&](int i, float (&x)[kVector]) {
      float g[kVector];
      norm_unpack<T>(*reinterpret_cast<const uint4*>(norm_slot(call, walk, memory_gy, chunk++)), g);
      norm_cotangent(call, affine, x, g);
      f(i, x, g);
    });
  };
  float sums[2] = {0, 0};
  for_cotangents([&](int i, float (&x)[kVector], float (&g)[kVector]) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      // What is not there may have no finite slope.
      const float there = i + k * walk.spacing < walk.count ? g[k] : 0.0f;
      sums[0] += there;
      sums[1] += there * x[k];
    }
  });
  norm_team_sums(sums, walk.team);
  sums[1] = affine[0].rstd * (sums[1] + affine[0].offset * sums[0]);
  if (walk.count == 0) {
    return;
  }
  if (call.partial && walk.lane == 0) {
    norm_write_partial(call, walk.sample, walk.slice, walk.channel, sums[0], sums[1]);
  }
  if (!call.out) {
    return;
  }
  const float weight =
      call.fixed ? 0.0f : norm_weight(call, walk.sample, walk.channel) / static_cast<float>(walk.count);
  const NormGradient gradient(affine[0], weight * sums[0], weight * sums[1]);
  for_cotangents([&](int i, float (&x)[kVector], float (&g)[kVector]) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      g[k] = affine[0].scale * g[k] + (gradient.by_x * x[k] + gradient.constant);
    }
    norm_store<T>(call.out, walk, i, g);
  });
}

}  // namespace fastgan
