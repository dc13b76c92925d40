#include "word_product.h"

#include <type_traits>

#include "bf16.h"
#include "simd.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define FASTGAN_HAS_MADD
#endif

namespace fastgan {
namespace {

// ---- what an instruction set has for words: sums + <word, weights>

struct Floats {
  template <typename V>
  FASTGAN_INLINE static V add(const V& sums, float value, const V& weights) {
    return sums + value * weights;
  }
};

struct Plain {
  template <typename V>
  FASTGAN_INLINE static V add(V sums, int32_t word, const V& weights) {
    const V bytes = V{} + word;
    FASTGAN_UNROLL
    for (int shift = 0; shift < 32; shift += 8) sums += ((bytes >> shift) & 0xff) * ((weights << (24 - shift)) >> 24);
    return sums;
  }
};

#if defined(FASTGAN_HAS_MADD)
// By builtins: the functions of immintrin.h cannot be inlined into what is compiled for several instruction sets.
struct Avx2 {
  using Halves = register_t<int16_t, 32>;

  // Bytes 0 and 2 of each word, then 1 and 3, as halves. What is made of the weights serves every row.
  template <typename V>
  FASTGAN_INLINE static V add(const V& sums, int32_t word, const V& weights) {
    const V bytes = V{} + word;
    const Halves even = (Halves(weights) << 8) >> 8, odd = Halves(weights) >> 8;
    const Halves even_bytes = Halves(bytes & 0x00ff00ff), odd_bytes = Halves((bytes >> 8) & 0x00ff00ff);
    return sums + reinterpret_cast<V>(__builtin_ia32_pmaddwd256(even_bytes, even)) +
           reinterpret_cast<V>(__builtin_ia32_pmaddwd256(odd_bytes, odd));
  }
};
#if !defined(FASTGAN_SANITIZE)
struct Vnni {
  template <typename V>
  FASTGAN_INLINE static V add(const V& sums, int32_t word, const V& weights) {
    return __builtin_ia32_vpdpbusd_v16si(sums, V{} + word, weights);
  }
};
#endif
#endif

// ---- tiles of sums

template <typename V, int kVectors, typename W>
FASTGAN_INLINE void load_weights(const W* from, V (&weights)[kVectors]) {
  if constexpr (std::is_same_v<W, BFloat16>) {
    FASTGAN_UNROLL
    for (int v = 0; v < kVectors; v += 2) widen_pair(from + v * kLanes<V>, weights[v], weights[v + 1]);
  } else {
    FASTGAN_UNROLL
    for (int v = 0; v < kVectors; ++v) weights[v] = load<V>(from + v * kLanes<V>);
  }
}

template <typename Set, typename V, int kRows, int kVectors, int kFetch, typename Word, typename W>
FASTGAN_INLINE void word_tile(const WordProducts<Word>& p, const W* __restrict__ weights, int64_t first) {
  constexpr int64_t kLine = 64;
  const int64_t step = p.vectors * kLanes<V>;
  const Word* rows[kRows];
  FASTGAN_UNROLL
  for (int r = 0; r < kRows; ++r) rows[r] = p.pixels[r];
  weights += first * kLanes<V>;
  const char* next = p.next;
  V sums[kRows][kVectors] = {};
  for (int64_t t = 0; t < p.tap_count; ++t) {
    for (int64_t at = p.taps[t], end = at + p.words; at < end; ++at, weights += step) {
      FASTGAN_UNROLL
      for (int line = 0; line < kFetch; ++line, next += kLine) __builtin_prefetch(next, 0, 2);
      V words[kVectors];
      load_weights(weights, words);
      FASTGAN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const auto value = load<Word>(rows[r] + at);
        FASTGAN_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Set::add(sums[r][v], value, words[v]);
      }
    }
  }
  FASTGAN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTGAN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Word* const to = p.sums + r * p.sums_stride + (first + v) * kLanes<V>;
      if (!p.overwrite) sums[r][v] += load<V>(to);
      store(sums[r][v], to);
    }
  }
}

// The vectors from `first` on, fewer than a tile takes: at most kVectors of them.
template <typename Set, typename V, int kRows, int kVectors, int kFetch, typename Word, typename W>
FASTGAN_INLINE void last_word_tile(const WordProducts<Word>& p, const W* weights, int64_t first) {
  constexpr int kLeast = sizeof(W) == sizeof(Word) ? 1 : 2;
  if constexpr (kVectors >= kLeast) {
    if (p.vectors - first == kVectors) return word_tile<Set, V, kRows, kVectors, kFetch>(p, weights, first);
    last_word_tile<Set, V, kRows, kVectors - kLeast, kFetch>(p, weights, first);
  }
}

template <typename Set, typename V, int kRows, int kVectors, int kFetch, typename Word, typename W>
FASTGAN_INLINE void words_of(const WordProducts<Word>& p, const W* weights) {
  int64_t v = 0;
  for (; v + kVectors <= p.vectors; v += kVectors) word_tile<Set, V, kRows, kVectors, kFetch>(p, weights, v);
  last_word_tile<Set, V, kRows, kVectors - (sizeof(W) == sizeof(Word) ? 1 : 2), kFetch>(p, weights, v);
}

template <typename Set, typename V, int kVectors, int kFetch, typename Word, typename W>
FASTGAN_INLINE void any_rows(const WordProducts<Word>& p, const W* weights) {
  switch (p.rows) {
    case 1:
      return words_of<Set, V, 1, kVectors, kFetch>(p, weights);
    case 2:
      return words_of<Set, V, 2, kVectors, kFetch>(p, weights);
    case 3:
      return words_of<Set, V, 3, kVectors, kFetch>(p, weights);
    case 4:
      return words_of<Set, V, 4, kVectors, kFetch>(p, weights);
    case 5:
      return words_of<Set, V, 5, kVectors, kFetch>(p, weights);
    default:
      return words_of<Set, V, kPanelRows, kVectors, kFetch>(p, weights);
  }
}

template <typename Set, int kBytes, int kVectors, typename Word>
FASTGAN_INLINE void any_words(const WordProducts<Word>& p) {
  using V = register_t<Word, kBytes>;
  const auto multiply = [&](const auto* weights) FASTGAN_LAMBDA_INLINE {
    switch (p.next_lines) {
      case 0:
        return any_rows<Set, V, kVectors, 0>(p, weights);
      case 1:
        return any_rows<Set, V, kVectors, 1>(p, weights);
      case 2:
        return any_rows<Set, V, kVectors, 2>(p, weights);
      default:
        return any_rows<Set, V, kVectors, 4>(p, weights);
    }
  };
  if constexpr (std::is_same_v<Word, float>) {
    if (p.narrow_weights) return multiply(p.narrow_weights);
  }
  multiply(p.weights);
}

// ---- the same code per instruction set, with registers of its width

void floats_portable(const WordProducts<float>& p) { any_words<Floats, 16, 2>(p); }
void bytes_portable(const WordProducts<int32_t>& p) { any_words<Plain, 16, 2>(p); }

#if defined(FASTGAN_AVX2)
#if !defined(FASTGAN_HAS_MADD)
using Avx2 = Plain;
#endif
FASTGAN_AVX2 void floats_avx2(const WordProducts<float>& p) { any_words<Floats, 32, 2>(p); }
FASTGAN_AVX512 void floats_avx512(const WordProducts<float>& p) { any_words<Floats, 64, 4>(p); }
FASTGAN_AVX2 void bytes_avx2(const WordProducts<int32_t>& p) { any_words<Avx2, 32, 2>(p); }
FASTGAN_AVX512 void bytes_avx512(const WordProducts<int32_t>& p) { any_words<Plain, 64, 4>(p); }
#if defined(FASTGAN_HAS_MADD) && !defined(FASTGAN_SANITIZE)
FASTGAN_VNNI void bytes_vnni(const WordProducts<int32_t>& p) { any_words<Vnni, 64, 4>(p); }
#else
void bytes_vnni(const WordProducts<int32_t>& p) { bytes_avx512(p); }
#endif

auto choose_floats() { return has_avx512() ? floats_avx512 : has_avx2() ? floats_avx2 : floats_portable; }
auto choose_bytes() {
  if (has_avx512()) return has_vnni() ? bytes_vnni : bytes_avx512;
  return has_avx2() ? bytes_avx2 : bytes_portable;
}
#else
auto choose_floats() { return floats_portable; }
auto choose_bytes() { return bytes_portable; }
#endif

const auto kFloatsOf = choose_floats();
const auto kBytesOf = choose_bytes();

}  // namespace

bool has_byte_products() { return has_vnni(); }

void word_products(const WordProducts<float>& p) { kFloatsOf(p); }
void word_products(const WordProducts<int32_t>& p) { kBytesOf(p); }

}  // namespace fastgan
