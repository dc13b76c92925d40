// exp, log1p, expm1 and tanh that the compiler can vectorise: straight-line code, no table, no branch, no errno.
//
// Source: Cephes Math Library (S. L. Moshier), the single-precision polynomials; errors below are measured against
// float64 over all binades by tests/test_vector_math.py through the ops that use them. Double precision goes to libm:
// it is the accuracy path.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"

namespace fastgan {

FASTGAN_INLINE float bits_to_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FASTGAN_INLINE int32_t float_to_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// exp(x) = 2^n exp(x - n ln 2): the whole n that leaves the least exponent, NaN of NaN.
FASTGAN_INLINE float exp_whole(float x) { return __builtin_rintf(x * 1.44269504088896341f); }

// exp(x - n ln 2) for n = exp_whole(x), |n| <= 128.
FASTGAN_INLINE float exp_rest(float x, float n) {
  // ln 2 in two parts, so that n * ln 2 is exact enough.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// exp(x), within 2 ulp; 0 below -87.3 (results there are denormal), inf above 88.72, NaN stays NaN.
FASTGAN_INLINE float vexp(float x) {
  const float clamped = x > 88.72f ? 88.72f : (x < -87.33f ? -87.33f : x);
  const float n = exp_whole(clamped), e = exp_rest(clamped, n);
  // 2^n as 2^(n/2) * 2^(n - n/2): n = 128 has no float of its own.
  const int32_t whole = static_cast<int32_t>(n == n ? n : 0.0f);
  const int32_t half = whole >> 1;
  const float scaled = e * bits_to_float((half + 127) << 23) * bits_to_float((whole - half + 127) << 23);
  const float low = x < -87.33f ? 0.0f : scaled;
  return x > 88.72f ? bits_to_float(0x7f800000) : (x == x ? low : x);
}

// exp(x) for x <= 0, within 2 ulp: vexp without what only large x needs.
FASTGAN_INLINE float vexp_nonpositive(float x) {
  const float clamped = x < -87.33f ? -87.33f : x;
  const float n = exp_whole(clamped), e = exp_rest(clamped, n);
  const float scaled = e * bits_to_float((static_cast<int32_t>(n == n ? n : 0.0f) + 127) << 23);
  return x < -87.33f ? 0.0f : scaled;
}

// log1p(x) for x in [0, 1], within 2 ulp: 2 atanh(s) = 2 s (1 + s^2 P(s^2)) with s = x / (2 + x) <= 1/3, where nothing
// cancels. P is the Chebyshev fit of degree 4 to (atanh(s) / s - 1) / s^2.
FASTGAN_INLINE float vlog1p_unit(float x) {
  const float s = x / (2.0f + x);
  const float z = s * s;
  float p = 1.16195251e-1f;
  p = p * z + 1.08516575e-1f;
  p = p * z + 1.42962917e-1f;
  p = p * z + 1.99998507e-1f;
  p = p * z + 3.33333337e-1f;
  return 2.0f * s + 2.0f * s * (z * p);
}

// expm1(x) for x <= 0, within 3 ulp: a Taylor polynomial where exp(x) - 1 cancels.
FASTGAN_INLINE float vexpm1_negative(float x) {
  float p = 1.0f / 40320.0f;
  p = p * x + 1.0f / 5040.0f;
  p = p * x + 1.0f / 720.0f;
  p = p * x + 1.0f / 120.0f;
  p = p * x + 1.0f / 24.0f;
  p = p * x + 1.0f / 6.0f;
  p = p * x + 0.5f;
  const float small = x + x * x * p;
  return x > -0.5f ? small : vexp(x) - 1.0f;
}

// tanh(x), within 3 ulp: odd polynomial below 0.625, 1 - 2 e / (1 + e) of e = exp(-2 |x|) above.
FASTGAN_INLINE float vtanh(float x) {
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = p * z * x + x;
  const float magnitude = x < 0.0f ? -x : x;
  const float e = vexp_nonpositive(-2.0f * magnitude), large = 1.0f - 2.0f * e / (1.0f + e);
  return magnitude < 0.625f ? small : (x < 0.0f ? -large : (x == x ? large : x));
}

FASTGAN_INLINE double vexp(double x) { return std::exp(x); }
FASTGAN_INLINE double vexp_nonpositive(double x) { return std::exp(x); }
FASTGAN_INLINE double vlog1p_unit(double x) { return std::log1p(x); }
FASTGAN_INLINE double vexpm1_negative(double x) { return std::expm1(x); }
FASTGAN_INLINE double vtanh(double x) { return std::tanh(x); }

// softplus(x) = log(1 + exp(x)): exp overflows float above 88.7, so max(x, 0) + log1p(exp(-|x|)).
template <typename C>
FASTGAN_INLINE C vsoftplus(C x) {
  const C magnitude = x < C(0) ? -x : x;
  return (x > C(0) ? x : C(0)) + vlog1p_unit(vexp_nonpositive(-magnitude));
}

// 1 / (1 + exp(-x)) without overflow: the smaller of exp(x), exp(-x) is in the numerator or absent.
template <typename C>
FASTGAN_INLINE C vsigmoid(C x) {
  const C e = vexp_nonpositive(x < C(0) ? x : -x);
  return (x < C(0) ? e : C(1)) / (C(1) + e);
}

}  // namespace fastgan
