// Registers as quads, every 128 bits four values of 32: what turns pixels side by side into channels side by side, and
// back, as many quads at a time as a register holds.
#pragma once

#include <type_traits>
#include <utility>

#include "simd.h"

namespace fastgan {

constexpr int64_t kQuad = 4;

template <typename V>
constexpr int64_t kQuads = kLanes<V> / kQuad;

template <typename V, int kBytes>
using resized_t = register_t<std::remove_cvref_t<decltype(std::declval<V>()[0])>, kBytes>;

// As many values as kPlaces, of two registers' counted through both: value i is that of kIndex(i).
template <auto kIndex, typename V, size_t... kPlaces>
FASTGAN_INLINE auto shuffled(const V& a, const V& b, std::index_sequence<kPlaces...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, kIndex(kPlaces)...);
#else
  constexpr int64_t kCount = kLanes<V>;
  constexpr int kBytes = sizeof...(kPlaces) * sizeof(a[0]);
  return resized_t<V, kBytes>{
      (kIndex(kPlaces) < kCount ? a[kIndex(kPlaces) % kCount] : b[kIndex(kPlaces) % kCount])...};
#endif
}
template <auto kIndex, int64_t kCount, typename V>
FASTGAN_INLINE auto shuffle(const V& a, const V& b) {
  return shuffled<kIndex>(a, b, std::make_index_sequence<kCount>{});
}

// Values kFirst and kFirst + 1 of every quad of a and b: by turns, or a's before b's.
template <int kFirst, typename V>
FASTGAN_INLINE V alternate(const V& a, const V& b) {
  constexpr auto kIndex = [](int64_t i) {
    return i / kQuad * kQuad + kFirst + i % kQuad / 2 + (i % 2 == 1 ? kLanes<V> : 0);
  };
  return shuffle<kIndex, kLanes<V>>(a, b);
}
template <int kFirst, typename V>
FASTGAN_INLINE V join(const V& a, const V& b) {
  constexpr auto kIndex = [](int64_t i) {
    return i / kQuad * kQuad + kFirst + i % 2 + (i % kQuad >= 2 ? kLanes<V> : 0);
  };
  return shuffle<kIndex, kLanes<V>>(a, b);
}

// Of every quad q: rows[i] had value j of it where rows[j] has value i now.
template <typename V>
FASTGAN_INLINE void transpose_quads(V (&rows)[kQuad]) {
  const V low_01 = alternate<0>(rows[0], rows[1]), low_23 = alternate<0>(rows[2], rows[3]);
  const V high_01 = alternate<2>(rows[0], rows[1]), high_23 = alternate<2>(rows[2], rows[3]);
  rows[0] = join<0>(low_01, low_23);
  rows[1] = join<2>(low_01, low_23);
  rows[2] = join<0>(high_01, high_23);
  rows[3] = join<2>(high_01, high_23);
}

// Quads that are `stride` values apart in memory.
template <typename V, typename C>
FASTGAN_INLINE V load_quads(const C* from, int64_t stride) {
  if constexpr (kQuads<V> == 1) {
    return load<V>(from);
  } else {
    using Half = resized_t<V, sizeof(V) / 2>;
    constexpr auto kIndex = [](int64_t i) { return i; };
    const Half low = load_quads<Half>(from, stride), high = load_quads<Half>(from + kQuads<Half> * stride, stride);
    return shuffle<kIndex, kLanes<V>>(low, high);
  }
}
template <typename V, typename C>
FASTGAN_INLINE void store_quads(const V& quads, C* to, int64_t stride) {
  if constexpr (kQuads<V> == 1) {
    store(quads, to);
  } else {
    constexpr int64_t kHalf = kLanes<V> / 2;
    constexpr auto kLow = [](int64_t i) { return i; };
    constexpr auto kHigh = [](int64_t i) { return i + kHalf; };
    store_quads(shuffle<kLow, kHalf>(quads, quads), to, stride);
    store_quads(shuffle<kHigh, kHalf>(quads, quads), to + kQuads<V> / 2 * stride, stride);
  }
}

}  // namespace fastgan
