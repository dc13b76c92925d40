// Device code of norm_act: instance, batch or adaptive normalisation with its activation, and the first-order gradient.
//
//   y = gain act(weight u + bias),  u = (x - mean) r,  r = 1 / sqrt(var + eps)
//   grad_x = r (k - <k> - u <k u>),  k = weight g,  g = gain act'(z) grad_y      (Ioffe and Szegedy 2015, section 3)
//
// with <.> the mean over a group: a channel of a sample (instance) or of the batch. csrc/cpu/norm_problem.h derives it.
//
// A plane (NCHW) that fits in shared memory is read once: the mean, then the centred squares, which nothing cancels in,
// then y from what is kept. Else, and for channels_last, a first launch leaves the moments of each slice in double, a
// second one puts them together as Chan, Golub and LeVeque (1983) have it, a third one reads x again. Launches follow
// one another on a stream: nothing waits for another block, and all sums are in an order that depends on shapes alone.
#pragma once

#include "norm_act_parts.cuh"
#include "ptx.h"

namespace fastgan {

// What x means to a channel of a sample: u = (x - mean + offset) rstd, z = (x - mean) scale + shift. mean is rounded;
// offset makes up for that.
struct NormAffine {
  float mean, offset, rstd, scale, shift;
};

__device__ inline float norm_weight(const NormCall& call, int64_t sample, int64_t channel) {
  return call.weight ? call.weight[sample * call.weight_stride + channel] : 1.0f;
}

__device__ inline NormAffine norm_affine(const NormCall& call, int64_t sample, int64_t channel, float mean,
                                         float offset, float var) {
  NormAffine affine;
  affine.mean = mean, affine.offset = offset;
  affine.rstd = 1.0f / sqrtf(var + call.eps);
  affine.scale = affine.rstd * norm_weight(call, sample, channel);
  const float bias = call.bias ? call.bias[sample * call.bias_stride + channel] : 0.0f;
  affine.shift = bias + offset * affine.scale;
  return affine;
}

__device__ inline int64_t norm_group(const NormCall& call, int64_t sample, int64_t channel) {
  return call.batch ? channel : sample * call.channels + channel;
}

// From the statistics in memory.
__device__ inline NormAffine norm_affine(const NormCall& call, int64_t sample, int64_t channel) {
  const int64_t group = norm_group(call, sample, channel);
  const double mean = call.mean[group];
  const float rounded = static_cast<float>(mean);
  return norm_affine(call, sample, channel, rounded, static_cast<float>(rounded - mean),
                     static_cast<float>(call.var[group]));
}

// Of the channels of the thread's vectors.
template <typename Walk>
__device__ inline void norm_affines(const NormCall& call, const Walk& walk, NormAffine (&affine)[Walk::kChannels]) {
#pragma unroll
  for (int k = 0; k < Walk::kChannels; ++k) {
    if (const int64_t channel = walk.channel_of(k); channel < call.channels) {
      affine[k] = norm_affine(call, walk.sample, channel);
    }
  }
}

// grad_x = scale g + by_x (x - mean) + constant.
struct NormGradient {
  float by_x, constant;

  __device__ NormGradient(const NormAffine& affine, float k, float ku)
      : by_x(-affine.rstd * affine.rstd * ku), constant(affine.offset * by_x - affine.rstd * k) {}
};

__device__ inline NormGradient norm_gradient(const NormCall& call, const NormAffine& affine, int64_t sample,
                                             int64_t channel) {
  if (!call.means) {
    return {affine, 0.0f, 0.0f};
  }
  const double* means = call.means + 2 * norm_group(call, sample, channel);
  return {affine, static_cast<float>(means[0]), static_cast<float>(means[1])};
}

// grad_y at the vector becomes g, and x becomes x - mean.
template <int kChannels, int kVector>
__device__ inline void norm_cotangent(const NormCall& call, const NormAffine (&affine)[kChannels], float (&x)[kVector],
                                      float (&gy)[kVector]) {
  float slopes[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const NormAffine& of = affine[kChannels == 1 ? 0 : k];
    x[k] -= of.mean;
    slopes[k] = x[k] * of.scale + of.shift;
  }
  norm_slopes(call, slopes);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    gy[k] *= slopes[k];
  }
}

// A pair of numbers of this slice and channel, for the launch that puts them together.
__device__ inline void norm_write_partial(const NormCall& call, int64_t sample, int64_t slice, int64_t channel,
                                          double first, double second) {
  double* to = call.partial + 2 * ((sample * call.plan.slices + slice) * call.channels + channel);
  to[0] = first, to[1] = second;
}

// ---------------------------------------------------------------------------------------------------------------------
// Planes.

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

// f(position, values of x, how many of them are there) for each of the thread's vectors.
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

// Sums of g and g u over a slice if `partial` is there, and grad_x if `out` is: of a whole group, or for given
// statistics. Dynamic shared memory: one slice of x and one of grad_y per team.
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

// ---------------------------------------------------------------------------------------------------------------------
// channels_last: partial results of a slice of pixels.

template <typename T>
__global__ void __launch_bounds__(kNormThreads) norm_rows_kernel(const __grid_constant__ NormCall call) {
  constexpr int kVector = NormRows<T>::kVector;
  const NormRows<T> walk(call);
  // Deviations from the sample's first pixel: no mean, however large, costs digits of what is summed up.
  NormRows<T> begin = walk;
  begin.base = walk.sample * call.pixels * walk.channels + walk.channel;
  float pivot[kVector] = {};
  if (walk.row < walk.count) {
    norm_load<T>(call.x, begin, 0, pivot);
  }
  // Means, squared deviations from them and, last, the count of all.
  float moments[2 * kVector + 1] = {};
  const auto combine = [](float (&to)[2 * kVector + 1], const float (&from)[2 * kVector + 1]) {
    const float total = to[2 * kVector] + from[2 * kVector];
    if (total == 0.0f) {
      return;
    }
    const float share = from[2 * kVector] / total, product = to[2 * kVector] * share;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float difference = from[k] - to[k];
      to[k] += difference * share;
      to[kVector + k] += from[kVector + k] + difference * difference * product;
    }
    to[2 * kVector] = total;
  };
  for (int i = walk.first(); i < walk.count; i += kNormChunks * walk.stride()) {
    float x[kNormChunks][kVector], part[2 * kVector + 1] = {};
#pragma unroll
    for (int j = 0; j < kNormChunks; ++j) {
      norm_load<T>(call.x, walk, i + j * walk.stride(), x[j]);
    }
    const int pixels = min(kNormChunks, (walk.count - i + walk.stride() - 1) / walk.stride());
    part[2 * kVector] = static_cast<float>(pixels);
    const float factor = 1.0f / part[2 * kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
#pragma unroll
      for (int j = 0; j < kNormChunks; ++j) {
        x[j][k] = j < pixels ? x[j][k] - pivot[k] : 0.0f;
        part[k] += x[j][k];
      }
      part[k] *= factor;
#pragma unroll
      for (int j = 0; j < kNormChunks; ++j) {
        const float deviation = j < pixels ? x[j][k] - part[k] : 0.0f;
        part[kVector + k] += deviation * deviation;
      }
    }
    combine(moments, part);
  }
  norm_combine_rows(moments, walk.team, combine);
  if (walk.row > 0) {
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    if (const int64_t channel = walk.channel_of(k); channel < walk.channels) {
      norm_write_partial(call, walk.sample, walk.slice, channel, static_cast<double>(pivot[k]) + moments[k],
                         moments[kVector + k]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kNormThreads, 2) norm_rows_grad_kernel(const __grid_constant__ NormCall call) {
  constexpr int kVector = NormRows<T>::kVector;
  const NormRows<T> walk(call);
  NormAffine affine[kVector] = {};
  norm_affines(call, walk, affine);
  // Of g, then of g (x - mean).
  float sums[2 * kVector] = {};
  for (int i = walk.first(); i < walk.count; i += walk.stride()) {
    float x[kVector], g[kVector];
    norm_load<T>(call.x, walk, i, x);
    norm_load<T>(call.gy, walk, i, g);
    norm_cotangent(call, affine, x, g);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      sums[k] += g[k];
      sums[kVector + k] += g[k] * x[k];
    }
  }
  norm_combine_rows(sums, walk.team, [](float (&to)[2 * kVector], const float (&from)[2 * kVector]) {
#pragma unroll
    for (int k = 0; k < 2 * kVector; ++k) {
      to[k] += from[k];
    }
  });
  if (walk.row > 0) {
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    if (const int64_t channel = walk.channel_of(k); channel < walk.channels) {
      // Once more, so that the loop has its registers for itself.
      const NormAffine of = norm_affine(call, walk.sample, channel);
      norm_write_partial(call, walk.sample, walk.slice, channel, sums[k],
                         of.rstd * (sums[kVector + k] + of.offset * sums[k]));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// A block per channel: partial results put together, in double.

// Samples side by side, a warp each, or one after the other by the whole block.
__device__ inline int norm_merge_team(int64_t samples) { return samples >= kNormThreads / 32 ? 32 : kNormThreads; }

// Mean and variance of each group from those of its slices.
static __global__ void __launch_bounds__(kNormThreads) norm_moments_kernel(const __grid_constant__ NormCall call) {
  const NormPlan& plan = call.plan;
  const int64_t channel = blockIdx.x, samples = call.batch ? 1 : call.samples;
  const int64_t slices = call.batch ? call.samples * plan.slices : plan.slices;
  const int team = norm_merge_team(samples);
  const double last = static_cast<double>(call.pixels - (plan.slices - 1) * plan.slice);
  for (int64_t sample = threadIdx.x / team; sample < samples; sample += kNormThreads / team) {
    const auto for_slices = [&](auto f) {
      for (int64_t i = threadIdx.x % team; i < slices; i += team) {
        const double* moments = call.partial + 2 * ((sample * slices + i) * call.channels + channel);
        f(i % plan.slices == plan.slices - 1 ? last : static_cast<double>(plan.slice), moments[0], moments[1]);
      }
    };
    const double count = static_cast<double>(call.pixels) * (call.batch ? call.samples : 1);
    double mean[1] = {0}, squares[1] = {0};
    for_slices([&](double n, double of_slice, double) { mean[0] += n * of_slice; });
    norm_team_sums(mean, team);
    mean[0] /= count;
    for_slices([&](double n, double of_slice, double deviations) {
      squares[0] += deviations + n * (of_slice - mean[0]) * (of_slice - mean[0]);
    });
    norm_team_sums(squares, team);
    if (threadIdx.x % team == 0) {
      call.mean[sample * call.channels + channel] = mean[0];
      call.var[sample * call.channels + channel] = squares[0] / count;
    }
  }
}

// <k> and <k u> of each group, and the gradients of weight and bias, from the sums of slices.
static __global__ void __launch_bounds__(kNormThreads) norm_sums_kernel(const __grid_constant__ NormCall call) {
  const int64_t channel = blockIdx.x, slices = call.plan.slices;
  const int team = norm_merge_team(call.samples);
  const double count = static_cast<double>(call.pixels) * (call.batch ? call.samples : 1);
  // Of all samples: g, g u and both times the weight.
  double totals[4] = {};
  for (int64_t sample = threadIdx.x / team; sample < call.samples; sample += kNormThreads / team) {
    double sums[2] = {};
    for (int64_t i = threadIdx.x % team; i < slices; i += team) {
      const double* partial = call.partial + 2 * ((sample * slices + i) * call.channels + channel);
      sums[0] += partial[0], sums[1] += partial[1];
    }
    norm_team_sums(sums, team);
    if (threadIdx.x % team != 0) {
      continue;
    }
    const double weight = norm_weight(call, sample, channel);
    const int64_t at = sample * call.channels + channel;
    totals[0] += sums[0], totals[1] += sums[1];
    totals[2] += weight * sums[0], totals[3] += weight * sums[1];
    if (call.means && !call.batch) {
      call.means[2 * at] = weight * sums[0] / count, call.means[2 * at + 1] = weight * sums[1] / count;
    }
    if (call.grad_bias && call.bias_stride) {
      call.grad_bias[at] = static_cast<float>(sums[0]);
    }
    if (call.grad_weight && call.weight_stride) {
      call.grad_weight[at] = static_cast<float>(sums[1]);
    }
  }
  norm_team_sums(totals, kNormThreads);
  if (threadIdx.x > 0) {
    return;
  }
  if (call.means && call.batch) {
    call.means[2 * channel] = totals[2] / count, call.means[2 * channel + 1] = totals[3] / count;
  }
  if (call.grad_bias && !call.bias_stride) {
    call.grad_bias[channel] = static_cast<float>(totals[0]);
  }
  if (call.grad_weight && !call.weight_stride) {
    call.grad_weight[channel] = static_cast<float>(totals[1]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// From statistics in memory, in either layout.

template <typename T, bool kLast>
using NormWalk = std::conditional_t<kLast, NormRows<T>, NormPlane<T>>;

template <typename T, bool kLast>
__global__ void __launch_bounds__(kLast ? kNormThreads : kNormMostThreads, kLast ? 2 : 1)
    norm_apply_kernel(const __grid_constant__ NormCall call) {
  using Walk = NormWalk<T, kLast>;
  const Walk walk(call);
  NormAffine affine[Walk::kChannels] = {};
  norm_affines(call, walk, affine);
  for (int i = walk.first(); i < walk.count; i += walk.stride()) {
    float x[Walk::kVector];
    norm_load<T>(call.x, walk, i, x);
#pragma unroll
    for (int k = 0; k < Walk::kVector; ++k) {
      const NormAffine& of = affine[kLast ? k : 0];
      x[k] = (x[k] - of.mean) * of.scale + of.shift;
    }
    norm_activate(call, x);
    norm_store<T>(call.out, walk, i, x);
  }
}

template <typename T, bool kLast>
__global__ void __launch_bounds__(kLast ? kNormThreads : kNormMostThreads, kLast ? 2 : 1)
    norm_apply_grad_kernel(const __grid_constant__ NormCall call) {
  using Walk = NormWalk<T, kLast>;
  const Walk walk(call);
  NormAffine affine[Walk::kChannels] = {};
  norm_affines(call, walk, affine);
  float by_x[Walk::kChannels] = {}, constant[Walk::kChannels] = {};
#pragma unroll
  for (int k = 0; k < Walk::kChannels; ++k) {
    if (const int64_t channel = walk.channel_of(k); channel < call.channels) {
      const NormGradient gradient = norm_gradient(call, affine[k], walk.sample, channel);
      by_x[k] = gradient.by_x, constant[k] = gradient.constant;
    }
  }
  for (int i = walk.first(); i < walk.count; i += walk.stride()) {
    float x[Walk::kVector], g[Walk::kVector];
    norm_load<T>(call.x, walk, i, x);
    norm_load<T>(call.gy, walk, i, g);
    norm_cotangent(call, affine, x, g);
#pragma unroll
    for (int k = 0; k < Walk::kVector; ++k) {
      const int of = kLast ? k : 0;
      g[k] = affine[of].scale * g[k] + (by_x[of] * x[k] + constant[of]);
    }
    norm_store<T>(call.out, walk, i, g);
  }
}

}  // namespace fastgan
