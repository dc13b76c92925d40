// The device functions of CUDA's headers that have another name, or none, in the C++ library.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

// Inlined even where nothing else is, so that what they access is named by the line that calls them.
#define SIMT_INLINE __attribute__((always_inline)) inline

template <typename T>
SIMT_INLINE T __ldg(const T* address) {
  return *address;
}
template <typename T>
SIMT_INLINE T __ldcg(const T* address) {
  return *address;
}
template <typename T>
SIMT_INLINE void __stcg(T* address, T value) {
  *address = value;
}

#undef SIMT_INLINE

// By value: what they compare is read where they are called, and checked there.
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __expf(float x) { return std::exp(x); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
