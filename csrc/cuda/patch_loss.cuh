// Device code of patch_loss: value, accuracy and slopes of all maps in one launch and one read; the gradients from the
// slopes; the gradient of that.
//
// Every element contributes factor w f(x), f one of four functions (patch_loss_plan.h), w its sample's weight. A thread
// has 16 bytes of a map at a time. The function is chosen at run time, once for these: the branch is the same for the
// whole launch, and one kernel per dtype serves all modes.
#pragma once

#include "device.h"
#include "map_list.cuh"
#include "patch_loss_plan.h"
#include "vectors.cuh"

namespace fastgan {

// log1p(x) for x in [0, 1] within 2 ulp: 2 atanh(s), s = x / (2 + x), where nothing cancels. The polynomial is the
// Chebyshev fit of degree 4 to (atanh(s) / s - 1) / s^2 on s <= 1/3.
__device__ __forceinline__ float log1p_unit(float x) {
  const float s = __fdividef(x, 2.0f + x), z = s * s;
  float p = 1.16195251e-1f * z + 1.08516575e-1f;
  p = p * z + 1.42962917e-1f;
  p = p * z + 1.99998507e-1f;
  p = p * z + 3.33333337e-1f;
  return 2.0f * s + 2.0f * s * (z * p);
}

// f and f' at x. A comparison with a NaN is false, and every false branch here passes it on.
template <PatchForm kForm>
__device__ __forceinline__ void evaluate(float x, float anchor, float& value, float& slope) {
  if constexpr (kForm == PatchForm::kBce) {
    const float e = expf(-fabsf(x)), high = __fdividef(1.0f, 1.0f + e), low = e * high;
    // Not softplus(x) - anchor x and sigmoid(x) - anchor: of a confident, right answer they cancel.
    value = (1.0f - anchor) * (x < 0.0f ? 0.0f : x) + anchor * (x > 0.0f ? 0.0f : -x) + log1p_unit(e);
    slope = (1.0f - anchor) * (x < 0.0f ? low : high) - anchor * (x < 0.0f ? high : low);
  } else if constexpr (kForm == PatchForm::kSquare) {
    value = (x - anchor) * (x - anchor);
    slope = 2.0f * (x - anchor);
  } else if constexpr (kForm == PatchForm::kLinear) {
    value = anchor * x;
    slope = anchor;
  } else {
    const float margin = 1.0f + anchor * x;
    value = margin < 0.0f ? 0.0f : margin;
    slope = margin <= 0.0f ? 0.0f : anchor;
  }
}

template <PatchForm kForm, int kCount>
__device__ __forceinline__ void evaluate_run(const float (&x)[kCount], float anchor, float (&values)[kCount],
                                             float (&slopes)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    evaluate<kForm>(x[k], anchor, values[k], slopes[k]);
  }
}

template <int kCount>
__device__ __forceinline__ void evaluate_run(PatchForm form, const float (&x)[kCount], float anchor,
                                             float (&values)[kCount], float (&slopes)[kCount]) {
  switch (form) {
    case PatchForm::kBce:
      return evaluate_run<PatchForm::kBce>(x, anchor, values, slopes);
    case PatchForm::kSquare:
      return evaluate_run<PatchForm::kSquare>(x, anchor, values, slopes);
    case PatchForm::kLinear:
      return evaluate_run<PatchForm::kLinear>(x, anchor, values, slopes);
    default:
      return evaluate_run<PatchForm::kHinge>(x, anchor, values, slopes);
  }
}

// f'' at x; 0 almost everywhere for linear and hinge.
__device__ __forceinline__ float curvature(PatchForm form, float x) {
  if (form == PatchForm::kBce) {
    const float e = expf(-fabsf(x)), high = __fdividef(1.0f, 1.0f + e);
    return e * high * high;
  }
  return form == PatchForm::kSquare ? 2.0f : 0.0f;
}

// A block's elements and their samples, which are counted from its first one on: a division of 64 bits is dear.
struct PatchStretch : MapStretch {
  const float* sample_weight;  // of the first element's sample; null without weights
  unsigned place;              // of the first element in its sample
};

__device__ inline PatchStretch patch_stretch(const PatchBatch& batch) {
  PatchStretch stretch{stretch_of_block(batch), nullptr, 0};
  if (batch.sample_weight != nullptr) {
    const unsigned per_sample = batch.maps[stretch.number].per_sample;
    const int64_t sample = stretch.start / per_sample;
    stretch.sample_weight = batch.sample_weight + sample;
    stretch.place = static_cast<unsigned>(stretch.start - sample * per_sample);
  }
  return stretch;
}

// values[k] *= the weight of the sample of element i + k, for those inside.
template <int kCount>
__device__ __forceinline__ void multiply_by_weights(const PatchStretch& stretch, unsigned per_sample, int i, int inside,
                                                    float (&values)[kCount]) {
  if (stretch.sample_weight == nullptr) {
    return;
  }
  unsigned place = stretch.place + i, sample = place / per_sample;
  place -= sample * per_sample;
  float weight = __ldg(stretch.sample_weight + sample);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (k < inside) {
      values[k] *= weight;
      if (++place == per_sample && k + 1 < inside) {
        place = 0;
        weight = __ldg(stretch.sample_weight + ++sample);
      }
    }
  }
}

// Elements `at` ... of a map, or of a pair's first and minus its second. Either may be null, but not both.
template <typename T>
__device__ __forceinline__ void load_difference(const void* first, const void* second, int64_t at, int inside,
                                                bool wide, float (&values)[kVector<T>]) {
  constexpr int kCount = kVector<T>;
  float other[kCount];
  if (first != nullptr) {
    load_run<kCount>(static_cast<const T*>(first) + at, inside, wide, values);
  }
  if (second == nullptr) {
    return;
  }
  load_run<kCount>(static_cast<const T*>(second) + at, inside, wide, other);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    values[k] = first != nullptr ? values[k] - other[k] : -other[k];
  }
}

// Stores gradients of a map, and their negatives as those of what a pair subtracts.
template <typename T>
__device__ __forceinline__ void store_gradients(const PatchMap& map, int64_t at, int inside,
                                                float (&gradients)[kVector<T>]) {
  constexpr int kCount = kVector<T>;
  if (map.plus != nullptr) {
    store_run<kCount>(static_cast<T*>(map.plus) + at, inside, map.wide, gradients);
  }
  if (map.minus != nullptr) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      gradients[k] = -gradients[k];
    }
    store_run<kCount>(static_cast<T*>(map.minus) + at, inside, map.wide, gradients);
  }
}

// Slopes lie behind each other: those of a map begin wherever the ones before it end.
__device__ __forceinline__ bool wide_slopes(const PatchMap& map) {
  return reinterpret_cast<uintptr_t>(map.slopes) % 16 == 0;
}

// The loss and the accuracies of all maps; the slopes of those that want them.
template <typename T>
__global__ void __launch_bounds__(kMapThreads, 4) patch_loss_kernel(const __grid_constant__ PatchBatch batch) {
  constexpr int kCount = kVector<T>;
  const PatchStretch stretch = patch_stretch(batch);
  const PatchMap& map = batch.maps[stretch.number];
  // f, and how often the critic is right: so few that float32 counts them exactly.
  float sums[2] = {0, 0};
  for (int i = static_cast<int>(threadIdx.x) * kCount; i < stretch.length; i += kMapThreads * kCount) {
    const int64_t at = stretch.start + i;
    const int inside = stretch.length - i;
    float x[kCount], values[kCount], slopes[kCount];
    load_difference<T>(map.x, map.y, at, inside, map.wide, x);
    evaluate_run(batch.form, x, map.anchor, values, slopes);
    if (map.slopes != nullptr) {
      store_run<kCount>(map.slopes + at, inside, wide_slopes(map), slopes);
    }
    multiply_by_weights(stretch, map.per_sample, i, inside, values);
    float sum = 0, right = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (k < inside) {
        sum += values[k];
        right += (map.fake ? x[k] <= batch.cut : x[k] > batch.cut) ? 1.0f : 0.0f;
      }
    }
    sums[0] += sum;
    sums[1] += right;
  }

  double totals[2];
  if (!sum_map(batch.sums, map, stretch.number, sums, totals)) {
    return;
  }
  if (threadIdx.x == 0) {
    const float accuracy = static_cast<float>(totals[1] / static_cast<double>(max(map.count, int64_t{1})));
    *map.accuracy = accuracy;
    if (map.pair_accuracy != nullptr) {
      *map.pair_accuracy = accuracy;
    }
  }
  sum_contributions(batch.sums, stretch.number, batch.count, static_cast<float>(map.factor * totals[0]));
}

// gradient = +- factor w grad_loss slope.
template <typename T>
__global__ void __launch_bounds__(kMapThreads, 4) patch_loss_bwd_kernel(const __grid_constant__ PatchBatch batch) {
  constexpr int kCount = kVector<T>;
  const PatchStretch stretch = patch_stretch(batch);
  const PatchMap& map = batch.maps[stretch.number];
  const float factor = map.factor * __ldg(batch.grad_loss);
  for (int i = static_cast<int>(threadIdx.x) * kCount; i < stretch.length; i += kMapThreads * kCount) {
    const int64_t at = stretch.start + i;
    const int inside = stretch.length - i;
    float gradients[kCount];
    load_run<kCount>(static_cast<const float*>(map.slopes) + at, inside, wide_slopes(map), gradients);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      gradients[k] *= factor;
    }
    multiply_by_weights(stretch, map.per_sample, i, inside, gradients);
    store_gradients<T>(map, at, inside, gradients);
  }
}

// The gradient of that, v the cotangent of the gradients: for the maps factor w grad_loss v f'', for grad_loss the sum
// of factor w v f'.
template <typename T>
__global__ void __launch_bounds__(kMapThreads, 4) patch_loss_bwd_bwd_kernel(const __grid_constant__ PatchBatch batch) {
  constexpr int kCount = kVector<T>;
  const PatchStretch stretch = patch_stretch(batch);
  const PatchMap& map = batch.maps[stretch.number];
  const float grad_loss = __ldg(batch.grad_loss);
  float sums[2] = {0, 0};
  for (int i = static_cast<int>(threadIdx.x) * kCount; i < stretch.length; i += kMapThreads * kCount) {
    const int64_t at = stretch.start + i;
    const int inside = stretch.length - i;
    float v[kCount], x[kCount], slopes[kCount];
    load_difference<T>(map.plus_in, map.minus_in, at, inside, map.wide, v);
    load_difference<T>(map.x, map.y, at, inside, map.wide, x);
    load_run<kCount>(static_cast<const float*>(map.slopes) + at, inside, wide_slopes(map), slopes);
    multiply_by_weights(stretch, map.per_sample, i, inside, v);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      // The factor comes before the sum: of half maps v may be as large as a loss scale.
      v[k] *= map.factor;
      sum += v[k] * slopes[k];
      v[k] *= grad_loss * curvature(batch.form, x[k]);
    }
    sums[0] += sum;
    store_gradients<T>(map, at, inside, v);
  }

  double totals[2];
  if (sum_map(batch.sums, map, stretch.number, sums, totals)) {
    sum_contributions(batch.sums, stretch.number, batch.count, static_cast<float>(totals[0]));
  }
}

}  // namespace fastgan
