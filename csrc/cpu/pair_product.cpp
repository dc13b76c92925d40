#include "pair_product.h"

#include "fetch.h"
#include "simd.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define FASTGAN_HAS_MADD
#endif

namespace fastgan {
namespace {

// ---- what an instruction set has for words: sums + <a, b>, and bytes widened to halves

template <typename V>
using bytes_t = register_t<int8_t, sizeof(V) / 2>;
template <typename V>
using halves_t = register_t<int16_t, sizeof(V)>;

struct Plain {
  template <typename V>
  FASTGAN_INLINE static V add(const V& sums, const V& a, const V& b) {
    return sums + (a >> 16) * (b >> 16) + ((a << 16) >> 16) * ((b << 16) >> 16);
  }
  template <typename V>
  FASTGAN_INLINE static V widen(const bytes_t<V>& bytes) {
    return reinterpret_cast<V>(__builtin_convertvector(bytes, halves_t<V>));
  }
};

#if defined(FASTGAN_HAS_MADD)
// By builtins: the functions of immintrin.h cannot be inlined into what is compiled for several instruction sets.
struct Avx2 {
  template <typename V>
  FASTGAN_INLINE static V add(const V& sums, const V& a, const V& b) {
    return sums + reinterpret_cast<V>(__builtin_ia32_pmaddwd256(halves_t<V>(a), halves_t<V>(b)));
  }
  template <typename V>
  FASTGAN_INLINE static V widen(const bytes_t<V>& bytes) {
    return reinterpret_cast<V>(__builtin_ia32_pmovsxbw256(__v16qi(bytes)));
  }
};
#if !defined(FASTGAN_SANITIZE)
struct Avx512 {
  template <typename V>
  FASTGAN_INLINE static V add(const V& sums, const V& a, const V& b) {
    return sums + __builtin_ia32_pmaddwd512_mask(halves_t<V>(a), halves_t<V>(b), V{}, 0xffff);
  }
  template <typename V>
  FASTGAN_INLINE static V widen(const bytes_t<V>& bytes) {
    return reinterpret_cast<V>(__builtin_ia32_pmovsxbw512_mask(__v32qi(bytes), halves_t<V>{}, 0xffffffff));
  }
};
struct Vnni : Avx512 {
  template <typename V>
  FASTGAN_INLINE static V add(const V& sums, const V& a, const V& b) {
    return __builtin_ia32_vpdpwssd_v16si(sums, a, b);
  }
};
#endif
#endif

// ---- tiles of sums

template <typename Set, typename V>
FASTGAN_INLINE V load_words(const int16_t* from) {
  return load<V>(from);
}
template <typename Set, typename V>
FASTGAN_INLINE V load_words(const int8_t* from) {
  return Set::template widen<V>(load<bytes_t<V>>(from));
}

template <typename Set, typename V, int kRows, int kVectors, bool kFetch, typename W>
FASTGAN_INLINE void pair_tile(const PairProducts& p, const W* weights, int64_t first) {
  const W* starts[kVectors];
  FASTGAN_UNROLL
  for (int v = 0; v < kVectors; ++v) starts[v] = weights + 2 * p.columns[first + v];
  const int32_t* __restrict__ values = p.values;
  const int64_t step = 2 * p.step;
  V sums[kRows][kVectors] = {};
  const auto multiply_row = [&](int64_t k) FASTGAN_LAMBDA_INLINE {
    V words[kVectors];
    FASTGAN_UNROLL
    for (int v = 0; v < kVectors; ++v) words[v] = load_words<Set, V>(starts[v] + k * step);
    FASTGAN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const V value = V{} + values[r * kPanelStride + k];
      FASTGAN_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Set::add(sums[r][v], value, words[v]);
    }
  };
  if constexpr (kFetch) {
    fetch_and_multiply(p.ahead, first / kVectors, p.depth, multiply_row);
  } else {
    for (int64_t k = 0, depth = p.depth; k < depth; ++k) multiply_row(k);
  }
  FASTGAN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTGAN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      int32_t* const to = p.sums + r * p.sums_stride + (first + v) * kLanes<V>;
      if (!p.overwrite) sums[r][v] += load<V>(to);
      store(sums[r][v], to);
    }
  }
}

// The vectors from v on, fewer than a tile takes: at most kVectors of them.
template <typename Set, typename V, int kRows, int kVectors, bool kFetch, typename W>
FASTGAN_INLINE void last_pair_tile(const PairProducts& p, const W* weights, int64_t v) {
  if constexpr (kVectors > 0) {
    if (p.vectors - v == kVectors) return pair_tile<Set, V, kRows, kVectors, kFetch>(p, weights, v);
    last_pair_tile<Set, V, kRows, kVectors - 1, kFetch>(p, weights, v);
  }
}

template <typename Set, typename V, int kRows, int kVectors, bool kFetch = false, typename W>
FASTGAN_INLINE void pairs_of(const PairProducts& p, const W* weights) {
  int64_t v = 0;
  for (; v + kVectors <= p.vectors; v += kVectors) pair_tile<Set, V, kRows, kVectors, kFetch>(p, weights, v);
  last_pair_tile<Set, V, kRows, kVectors - 1, kFetch>(p, weights, v);
}

// kVectors x kRows sums: as many as the registers hold beside their operands.
template <typename Set, typename V, int kWide, typename W>
FASTGAN_INLINE void any_pairs_of(const PairProducts& p, const W* weights) {
  switch (p.rows) {
    case 1:
      return pairs_of<Set, V, 1, 4 * kWide>(p, weights);
    case 2:
      return pairs_of<Set, V, 2, 4 * kWide>(p, weights);
    case 3:
      return pairs_of<Set, V, 3, 2 * kWide>(p, weights);
    case 4:
      return pairs_of<Set, V, 4, 2 * kWide>(p, weights);
    case 5:
      return pairs_of<Set, V, 5, 2 * kWide>(p, weights);
    default:
      return p.ahead.panel ? pairs_of<Set, V, kPanelRows, 2 * kWide, true>(p, weights)
                           : pairs_of<Set, V, kPanelRows, 2 * kWide>(p, weights);
  }
}

template <typename Set, int kBytes, int kWide>
FASTGAN_INLINE void any_pairs(const PairProducts& p) {
  using V = register_t<int32_t, kBytes>;
  if (p.weights) {
    any_pairs_of<Set, V, kWide>(p, p.weights);
  } else {
    any_pairs_of<Set, V, kWide>(p, p.narrow_weights);
  }
}

// ---- the same code per instruction set, with registers as wide as product.cpp's

void pairs_portable(const PairProducts& p) { any_pairs<Plain, 16, 1>(p); }

#if defined(FASTGAN_AVX2)
#if !defined(FASTGAN_HAS_MADD)
using Avx2 = Plain;
#endif
FASTGAN_AVX2 void pairs_avx2(const PairProducts& p) { any_pairs<Avx2, 32, 1>(p); }
#if defined(FASTGAN_HAS_MADD) && !defined(FASTGAN_SANITIZE)
FASTGAN_AVX512 void pairs_avx512(const PairProducts& p) { any_pairs<Avx512, 64, 2>(p); }
FASTGAN_VNNI void pairs_vnni(const PairProducts& p) { any_pairs<Vnni, 64, 2>(p); }
#else
FASTGAN_AVX512 void pairs_avx512(const PairProducts& p) { any_pairs<Plain, 64, 2>(p); }
void pairs_vnni(const PairProducts& p) { pairs_avx512(p); }
#endif

auto choose() {
  if (has_avx512()) return has_vnni() ? pairs_vnni : pairs_avx512;
  return has_avx2() ? pairs_avx2 : pairs_portable;
}
#else
auto choose() { return pairs_portable; }
#endif

const auto kPairs = choose();

}  // namespace

void pair_products(const PairProducts& p) { kPairs(p); }

}  // namespace fastgan
