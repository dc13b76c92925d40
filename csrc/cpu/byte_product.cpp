#include "byte_product.h"

#include "simd.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define FASTGAN_HAS_MADD
#endif

namespace fastgan {
namespace {

// ---- what an instruction set has for words: sums + <bytes, weights>, the bytes of the first without a sign

struct Plain {
  template <typename V>
  FASTGAN_INLINE static V add(V sums, const V& bytes, const V& weights) {
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
  FASTGAN_INLINE static V add(const V& sums, const V& bytes, const V& weights) {
    const Halves even = (Halves(weights) << 8) >> 8, odd = Halves(weights) >> 8;
    const Halves even_bytes = Halves(bytes & 0x00ff00ff), odd_bytes = Halves((bytes >> 8) & 0x00ff00ff);
    return sums + reinterpret_cast<V>(__builtin_ia32_pmaddwd256(even_bytes, even)) +
           reinterpret_cast<V>(__builtin_ia32_pmaddwd256(odd_bytes, odd));
  }
};
#if !defined(FASTGAN_SANITIZE)
struct Vnni {
  template <typename V>
  FASTGAN_INLINE static V add(const V& sums, const V& bytes, const V& weights) {
    return __builtin_ia32_vpdpbusd_v16si(sums, bytes, weights);
  }
};
#endif
#endif

// ---- tiles of sums

template <typename Set, typename V, int kRows, int kVectors>
FASTGAN_INLINE void byte_tile(const ByteProducts& p) {
  constexpr int64_t kWord = 4, kStep = kVectors * sizeof(V);
  const uint8_t* rows[kRows];
  FASTGAN_UNROLL
  for (int r = 0; r < kRows; ++r) rows[r] = p.pixels[r];
  const int8_t* __restrict__ weights = p.weights;
  V sums[kRows][kVectors] = {};
  for (int64_t t = 0; t < p.tap_count; ++t) {
    for (int64_t at = p.taps[t], end = at + kWord * p.words; at < end; at += kWord, weights += kStep) {
      V words[kVectors];
      FASTGAN_UNROLL
      for (int v = 0; v < kVectors; ++v) words[v] = load<V>(weights + v * sizeof(V));
      FASTGAN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const V bytes = V{} + load<int32_t>(rows[r] + at);
        FASTGAN_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Set::add(sums[r][v], bytes, words[v]);
      }
    }
  }
  FASTGAN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTGAN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      int32_t* const to = p.sums + r * p.sums_stride + v * kLanes<V>;
      if (!p.overwrite) sums[r][v] += load<V>(to);
      store(sums[r][v], to);
    }
  }
}

template <typename Set, typename V, int kRows, int kVectors>
FASTGAN_INLINE void bytes_of(const ByteProducts& p) {
  if constexpr (kVectors > 1) {
    if (p.vectors < kVectors) return bytes_of<Set, V, kRows, kVectors - 1>(p);
  }
  byte_tile<Set, V, kRows, kVectors>(p);
}

template <typename Set, int kBytes, int kMostVectors>
FASTGAN_INLINE void any_bytes(const ByteProducts& p) {
  using V = register_t<int32_t, kBytes>;
  switch (p.rows) {
    case 1:
      return bytes_of<Set, V, 1, kMostVectors>(p);
    case 2:
      return bytes_of<Set, V, 2, kMostVectors>(p);
    case 3:
      return bytes_of<Set, V, 3, kMostVectors>(p);
    case 4:
      return bytes_of<Set, V, 4, kMostVectors>(p);
    case 5:
      return bytes_of<Set, V, 5, kMostVectors>(p);
    default:
      return bytes_of<Set, V, kPanelRows, kMostVectors>(p);
  }
}

// ---- the same code per instruction set, with as many registers of its width as kGroup channels or product_vectors()
// are

void bytes_portable(const ByteProducts& p) { any_bytes<Plain, 16, 4>(p); }

#if defined(FASTGAN_AVX2)
#if !defined(FASTGAN_HAS_MADD)
using Avx2 = Plain;
#endif
FASTGAN_AVX2 void bytes_avx2(const ByteProducts& p) { any_bytes<Avx2, 32, 2>(p); }
FASTGAN_AVX512 void bytes_avx512(const ByteProducts& p) { any_bytes<Plain, 64, 4>(p); }
#if defined(FASTGAN_HAS_MADD) && !defined(FASTGAN_SANITIZE)
FASTGAN_VNNI void bytes_vnni(const ByteProducts& p) { any_bytes<Vnni, 64, 4>(p); }
#else
void bytes_vnni(const ByteProducts& p) { bytes_avx512(p); }
#endif

auto choose() {
  if (has_avx512()) return has_vnni() ? bytes_vnni : bytes_avx512;
  return has_avx2() ? bytes_avx2 : bytes_portable;
}
#else
auto choose() { return bytes_portable; }
#endif

const auto kBytesOf = choose();

}  // namespace

bool has_byte_products() { return has_vnni(); }

void byte_products(const ByteProducts& p) { kBytesOf(p); }

}  // namespace fastgan
