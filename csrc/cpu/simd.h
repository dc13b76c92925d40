// Registers as the compiler's vector types, for inner loops whose sums must stay in them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "common.h"

// Before the loops over a tile: rolled up, they would keep its sums in memory.
#define FASTGAN_UNROLL _Pragma("GCC unroll 8")

// Registers wider than the baseline's have no calling convention of their own; whatever passes them here is inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fastgan {

template <typename C, int kBytes>
struct Register {
  typedef C type __attribute__((vector_size(kBytes)));
};
template <typename C, int kBytes>
using register_t = typename Register<C, kBytes>::type;

// Values in one register.
template <typename V>
constexpr int64_t kLanes = sizeof(V) / sizeof(std::declval<V>()[0]);

// The instruction sets that kernels with registers of their own width are written for, and whether to run them here.
//
// How far a kernel reads depends on that width, so `make sanitize` asks for each (FASTGAN_LANES floats), on any
// machine: in its build the widest registers are made of two of AVX2's.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FASTGAN_AVX2 __attribute__((target("arch=x86-64-v3")))
#if defined(FASTGAN_SANITIZE)
#define FASTGAN_AVX512 FASTGAN_AVX2
inline bool has_avx2() {
  const char* const lanes = std::getenv("FASTGAN_LANES");
  return __builtin_cpu_supports("x86-64-v3") && !(lanes && std::atoi(lanes) == 4);
}
inline bool has_avx512() {
  const char* const lanes = std::getenv("FASTGAN_LANES");
  return __builtin_cpu_supports("x86-64-v3") && lanes && std::atoi(lanes) == 16;
}
#else
#define FASTGAN_AVX512 __attribute__((target("arch=x86-64-v4")))
inline bool has_avx2() { return __builtin_cpu_supports("x86-64-v3"); }
inline bool has_avx512() { return __builtin_cpu_supports("x86-64-v4"); }
#endif
#endif

// VNNI's products, by builtins of GCC; the registers of a sanitized build are too narrow for them.
#if defined(FASTGAN_AVX512) && !defined(__clang__) && !defined(FASTGAN_SANITIZE)
#define FASTGAN_VNNI __attribute__((target("arch=x86-64-v4,avx512vnni")))
inline bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#else
inline bool has_vnni() { return false; }
#endif

template <typename V, typename C>
FASTGAN_INLINE V load(const C* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename V, typename C>
FASTGAN_INLINE void store(const V& v, C* to) {
  std::memcpy(to, &v, sizeof v);
}

// Stores 16 floats, to a whole cache line, past the caches: its old values are not read, and what lies in the caches
// stays there. Other threads see such lines after finish_streams().
FASTGAN_INLINE void stream_line(const float* from, float* to) {
#if defined(FASTGAN_AVX2)
  using V = register_t<float, 16>;
  FASTGAN_UNROLL
  for (int64_t i = 0; i < 16; i += kLanes<V>) __builtin_ia32_movntps(to + i, load<V>(from + i));
#else
  std::memcpy(to, from, 16 * sizeof(float));
#endif
}

inline void finish_streams() {
#if defined(FASTGAN_AVX2)
  __builtin_ia32_sfence();
#endif
}

}  // namespace fastgan
