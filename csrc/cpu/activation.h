// The nine activations with their first and second derivatives, as straight-line code for vector loops.
#pragma once

#include <string>

#include "common.h"
#include "vector_math.h"

namespace fastgan {

enum class Act { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish };

inline Act parse_act(const char* op, const std::string& name) {
  static const char* const kNames[] = {"linear", "relu", "lrelu",    "tanh", "sigmoid",
                                       "elu",    "selu", "softplus", "swish"};
  for (int i = 0; i < 9; ++i) {
    if (name == kNames[i]) return static_cast<Act>(i);
  }
  STD_TORCH_CHECK(false, op, ": unknown activation ", name);
  __builtin_unreachable();
}

// Klambauer et al. 2017, the fixed point of zero mean and unit variance.
constexpr double kSeluScale = 1.0507009873554804934193349852946;
constexpr double kSeluAlpha = 1.6732632423543772848170429916717;

template <Act A, typename C>
FASTGAN_INLINE C act_value(C x, C alpha) {
  if constexpr (A == Act::kRelu) return x < C(0) ? C(0) : x;
  if constexpr (A == Act::kLrelu) return x < C(0) ? alpha * x : x;
  if constexpr (A == Act::kTanh) return vtanh(x);
  if constexpr (A == Act::kSigmoid) return vsigmoid(x);
  if constexpr (A == Act::kElu) return x > C(0) ? x : vexpm1_negative(x);
  if constexpr (A == Act::kSelu) return C(kSeluScale) * (x > C(0) ? x : C(kSeluAlpha) * vexpm1_negative(x));
  if constexpr (A == Act::kSoftplus) return vsoftplus(x);
  if constexpr (A == Act::kSwish) return x * vsigmoid(x);
  return x;
}

// act'(x) from t = act(x); x itself is used by swish only, which t does not determine.
template <Act A, typename C>
FASTGAN_INLINE C act_slope(C t, C x, C alpha) {
  if constexpr (A == Act::kRelu) return t > C(0) ? C(1) : C(0);
  if constexpr (A == Act::kLrelu) return t > C(0) ? C(1) : alpha;
  if constexpr (A == Act::kTanh) return C(1) - t * t;
  if constexpr (A == Act::kSigmoid) return t * (C(1) - t);
  if constexpr (A == Act::kElu) return t > C(0) ? C(1) : t + C(1);
  if constexpr (A == Act::kSelu) return t > C(0) ? C(kSeluScale) : t + C(kSeluScale * kSeluAlpha);
  // 1 - exp(-t) cancels for small t.
  if constexpr (A == Act::kSoftplus) return -vexpm1_negative(-t);
  if constexpr (A == Act::kSwish) {
    const C s = vsigmoid(x);
    return s + x * s * (C(1) - s);
  }
  return C(1);
}

// d act'/dt, the slope's own slope along t = act(x); for swish act''(x).
template <Act A, typename C>
FASTGAN_INLINE C act_bend(C t, C x) {
  if constexpr (A == Act::kTanh) return C(-2) * t;
  if constexpr (A == Act::kSigmoid) return C(1) - C(2) * t;
  if constexpr (A == Act::kElu || A == Act::kSelu) return t > C(0) ? C(0) : C(1);
  if constexpr (A == Act::kSoftplus) return vexp(-t);
  if constexpr (A == Act::kSwish) {
    const C s = vsigmoid(x);
    return s * (C(1) - s) * (C(2) + x * (C(1) - C(2) * s));
  }
  return C(0);
}

// Calls f.template operator()<A>() with the activation as a constant, so that each gets a loop of its own.
template <typename F>
FASTGAN_INLINE void dispatch_act(Act act, F&& f) {
  switch (act) {
    case Act::kLinear:
      return f.template operator()<Act::kLinear>();
    case Act::kRelu:
      return f.template operator()<Act::kRelu>();
    case Act::kLrelu:
      return f.template operator()<Act::kLrelu>();
    case Act::kTanh:
      return f.template operator()<Act::kTanh>();
    case Act::kSigmoid:
      return f.template operator()<Act::kSigmoid>();
    case Act::kElu:
      return f.template operator()<Act::kElu>();
    case Act::kSelu:
      return f.template operator()<Act::kSelu>();
    case Act::kSoftplus:
      return f.template operator()<Act::kSoftplus>();
    case Act::kSwish:
      return f.template operator()<Act::kSwish>();
  }
}

}  // namespace fastgan
