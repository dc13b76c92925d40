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

#include "norm_act_planes.cuh"

namespace fastgan {

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
__global__ void __launch_bounds__(kNormThreads, kLast ? 2 : 3)
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
__global__ void __launch_bounds__(kNormThreads, kLast ? 2 : 3)
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
