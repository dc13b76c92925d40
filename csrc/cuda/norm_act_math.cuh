// What norm_act computes per value: activation and slope of a vector, normalisation, the gradient's coefficients.
#pragma once

#include "activation.cuh"
#include "norm_act_parts.cuh"

namespace fastgan {

template <typename F, int kCount>
__device__ __forceinline__ void norm_each(float (&values)[kCount], F f) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    values[k] = f(values[k]);
  }
}

// values <- gain act(values). One switch per vector.
template <int kCount>
__device__ inline void norm_activate(const NormCall& call, float (&values)[kCount]) {
  const float alpha = call.alpha, gain = call.gain;
  with_act(call.act, [&](auto act) {
    norm_each(values, [=](float z) { return gain * act_value<decltype(act)::value>(z, alpha); });
  });
}

// values <- gain act'(values).
template <int kCount>
__device__ inline void norm_slopes(const NormCall& call, float (&values)[kCount]) {
  const float alpha = call.alpha, gain = call.gain;
  with_act(call.act, [&](auto act) {
    norm_each(values, [=](float z) { return gain * act_slope<decltype(act)::value>(z, alpha); });
  });
}

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

}  // namespace fastgan
