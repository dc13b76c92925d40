// Activations and their slopes on the device, without gain and clamp. Comparisons are such that a NaN stays one.
#pragma once

#include <type_traits>

#include "activation.h"
#include "device.h"

namespace fastgan {

// Klambauer et al. 2017, the fixed point of zero mean and unit variance.
constexpr float kSeluScale = 1.05070098735548f, kSeluAlpha = 1.67326324235438f;

// 1 / (1 + exp(-z)); of exp(z) and exp(-z) the one that cannot overflow. The divisor is between 1 and 2, where the fast
// division is within 2 ulp.
__device__ inline float sigmoid(float z) {
  const float e = expf(-fabsf(z));
  return __fdividef(z < 0.0f ? e : 1.0f, 1.0f + e);
}

template <Act kAct>
__device__ __forceinline__ float act_value(float z, float alpha) {
  if constexpr (kAct == Act::kLinear) return z;
  if constexpr (kAct == Act::kRelu) return z < 0.0f ? 0.0f : z;
  if constexpr (kAct == Act::kLrelu) return z < 0.0f ? alpha * z : z;
  if constexpr (kAct == Act::kTanh) return tanhf(z);
  if constexpr (kAct == Act::kSigmoid) return sigmoid(z);
  if constexpr (kAct == Act::kElu) return z > 0.0f ? z : expm1f(z);
  if constexpr (kAct == Act::kSelu) return kSeluScale * (z > 0.0f ? z : kSeluAlpha * expm1f(z));
  if constexpr (kAct == Act::kSoftplus) return (z < 0.0f ? 0.0f : z) + log1pf(expf(-fabsf(z)));
  if constexpr (kAct == Act::kSwish) return z * sigmoid(z);
}

template <Act kAct>
__device__ __forceinline__ float act_slope(float z, float alpha) {
  if constexpr (kAct == Act::kLinear) return 1.0f;
  if constexpr (kAct == Act::kRelu) return z > 0.0f ? 1.0f : 0.0f;
  if constexpr (kAct == Act::kLrelu) return z > 0.0f ? 1.0f : alpha;
  if constexpr (kAct == Act::kTanh) return 1.0f - tanhf(z) * tanhf(z);
  if constexpr (kAct == Act::kSigmoid) return sigmoid(z) * (1.0f - sigmoid(z));
  if constexpr (kAct == Act::kElu) return z > 0.0f ? 1.0f : expf(z);
  if constexpr (kAct == Act::kSelu) return kSeluScale * (z > 0.0f ? 1.0f : kSeluAlpha * expf(z));
  if constexpr (kAct == Act::kSoftplus) return sigmoid(z);
  if constexpr (kAct == Act::kSwish) return sigmoid(z) * (1.0f + z * (1.0f - sigmoid(z)));
}

// f(the activation as a constant), chosen once for many values.
template <typename F>
__device__ __forceinline__ void with_act(Act act, F f) {
  switch (act) {
    case Act::kLinear:
      return f(std::integral_constant<Act, Act::kLinear>());
    case Act::kRelu:
      return f(std::integral_constant<Act, Act::kRelu>());
    case Act::kLrelu:
      return f(std::integral_constant<Act, Act::kLrelu>());
    case Act::kTanh:
      return f(std::integral_constant<Act, Act::kTanh>());
    case Act::kSigmoid:
      return f(std::integral_constant<Act, Act::kSigmoid>());
    case Act::kElu:
      return f(std::integral_constant<Act, Act::kElu>());
    case Act::kSelu:
      return f(std::integral_constant<Act, Act::kSelu>());
    case Act::kSoftplus:
      return f(std::integral_constant<Act, Act::kSoftplus>());
    case Act::kSwish:
      return f(std::integral_constant<Act, Act::kSwish>());
  }
}

}  // namespace fastgan
