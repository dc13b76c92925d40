// Registers as the compiler's vector types, for inner loops whose sums must stay in them.
#pragma once

#include <cstdint>
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

}  // namespace fastgan
