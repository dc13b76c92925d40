#include "word_sums.h"

#include <algorithm>

#include "quads.h"
#include "simd.h"

namespace fastgan {
namespace {

template <typename V, typename Word>
FASTGAN_INLINE void spread_planes(const Spreading<Word>& s) {
  using Floats = register_t<float, sizeof(V)>;
  if (s.pixels < kQuad) {
    for (int64_t c = 0; c < kGroup; ++c) {
      const Word plus = s.shift ? s.shift[c] : 0;
      for (int64_t p = 0; p < s.pixels; ++p) {
        s.to[c * s.to_stride + p] = static_cast<float>(s.from[p * s.stride + c] + plus);
      }
    }
    return;
  }
  for (int64_t p = 0; p < s.pixels; p += kQuad) {
    const int64_t at = std::min(p, s.pixels - kQuad);  // the last step overlaps the one before
    for (int64_t c = 0; c < kGroup; c += kLanes<V>) {
      const V plus = s.shift ? load<V>(s.shift + c) : V{};
      V rows[kQuad];
      FASTGAN_UNROLL
      for (int i = 0; i < kQuad; ++i) rows[i] = load<V>(s.from + (at + i) * s.stride + c) + plus;
      transpose_quads(rows);
      FASTGAN_UNROLL
      for (int i = 0; i < kQuad; ++i) {
        store_quads(__builtin_convertvector(rows[i], Floats), s.to + (c + i) * s.to_stride + at, kQuad * s.to_stride);
      }
    }
  }
}

template <typename Word>
void planes_portable(const Spreading<Word>& s) {
  spread_planes<register_t<Word, 16>>(s);
}
#if defined(FASTGAN_AVX2)
template <typename Word>
FASTGAN_AVX2 void planes_avx2(const Spreading<Word>& s) {
  spread_planes<register_t<Word, 32>>(s);
}
template <typename Word>
FASTGAN_AVX512 void planes_avx512(const Spreading<Word>& s) {
  spread_planes<register_t<Word, 64>>(s);
}
template <typename Word>
void any_planes(const Spreading<Word>& s) {
  has_avx512() ? planes_avx512(s) : has_avx2() ? planes_avx2(s) : planes_portable(s);
}
#else
template <typename Word>
void any_planes(const Spreading<Word>& s) {
  planes_portable(s);
}
#endif

template <Act A>
FASTGAN_INLINE void round_pixels(const RoundedRow& r) {
  using Bytes = register_t<uint8_t, 16>;
  const float alpha = r.alpha, gain = r.gain, clamp = r.clamp;
  for (int64_t p = 0; p < r.pixels; ++p) {
    for (int64_t first = 0; first < r.channels; first += kGroup) {
      const int32_t* const sums = r.sums + p * r.stride + first;
      const int32_t* const shift = r.shift + first;
      const float *const scale = r.scale + first, *const bias = r.bias + first;
      float y[kGroup];
#pragma omp simd
      for (int64_t c = 0; c < kGroup; ++c) {
        const float z = static_cast<float>(sums[c] + shift[c]) * scale[c] + bias[c];
        const float v = act_value<A>(z, alpha) * gain;
        y[c] = v > clamp ? clamp : (v < -clamp ? -clamp : v);
      }
      for (int64_t i = 0; i < r.image_count; ++i) {
        const ByteImage& image = r.images[i];
        const Quantization q = image.quantization;
        int32_t whole[kGroup];
#pragma omp simd
        for (int64_t c = 0; c < kGroup; ++c) whole[c] = static_cast<int32_t>(q(y[c]) - q.low);
        store(__builtin_convertvector((load<register_t<int32_t, 64>>(whole)), Bytes),
              image.first + p * image.pixel + first);
      }
    }
  }
}

}  // namespace

void planes_of(const Spreading<float>& s) { any_planes(s); }
void planes_of(const Spreading<int32_t>& s) { any_planes(s); }

FASTGAN_MULTIVERSION void round_row(const RoundedRow& row) {
  dispatch_act(row.act, [&]<Act A>() FASTGAN_LAMBDA_INLINE { round_pixels<A>(row); });
}

}  // namespace fastgan
