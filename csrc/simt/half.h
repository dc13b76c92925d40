// __half and __nv_bfloat16 with the conversions and operators that kernels use, rounding to nearest even.
#pragma once

#include <bit>
#include <cstdint>

#include "types.h"

namespace simt {

constexpr float from_half(uint16_t bits) {
  const uint32_t sign = uint32_t{bits} >> 15 << 31, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) {
    return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  }
  if (exponent == 0) {
    // A subnormal is so many 2^-24.
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

constexpr uint16_t to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) {
    return 0x7fff;
  }
  // 65520 lies half-way between the largest half and the next power of two.
  if (magnitude >= 0x477ff000u) {
    return sign | 0x7c00;
  }
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 1/2 lets float's own rounding leave so many 2^-24 in the lowest bits.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - 0x3f000000u);
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfff + odd) >> 13);
}

constexpr float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

constexpr uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return 0x7fff;
  }
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace simt

#define SIMT_HALF_TYPE(Name, Pair, from, to)                                                      \
  struct Name {                                                                                   \
    uint16_t bits;                                                                                \
    Name() = default;                                                                             \
    Name(float value) : bits(simt::to(value)) {}                                                  \
    operator float() const { return simt::from(bits); }                                           \
  };                                                                                              \
  struct alignas(4) Pair {                                                                        \
    Name x, y;                                                                                    \
  };                                                                                              \
  inline Name operator+(Name a, Name b) { return static_cast<float>(a) + static_cast<float>(b); } \
  inline Name operator-(Name a, Name b) { return static_cast<float>(a) - static_cast<float>(b); } \
  inline Name operator*(Name a, Name b) { return static_cast<float>(a) * static_cast<float>(b); }
SIMT_HALF_TYPE(__half, __half2, from_half, to_half)
SIMT_HALF_TYPE(__nv_bfloat16, __nv_bfloat162, from_bfloat16, to_bfloat16)
#undef SIMT_HALF_TYPE

using half = __half;
using half2 = __half2;

inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
