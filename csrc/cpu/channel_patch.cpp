#include "channel_patch.h"

#include <algorithm>
#include <array>

#include "quads.h"

namespace fastgan {
namespace {

using Portable = register_t<float, 16>;

FASTGAN_INLINE void gather_pixels(const ChannelLine& l, int64_t first_channel) {
  for (int64_t p = 0; p < l.pixels; ++p) {
    for (int64_t c = first_channel; c < l.channels; ++c) {
      l.to[p * l.to_pixel + c] = at_least(l.scale[c] * l.from[c * l.channel + p * l.pixel], l.least);
    }
  }
}

// Registers of channels from `channel` on, four pixels at a time; the last step overlaps the one before. Returns how
// many channels are done.
template <typename V>
FASTGAN_INLINE int64_t gather_quads(const ChannelLine& l, int64_t channel) {
  for (; channel + kLanes<V> <= l.channels; channel += kLanes<V>) {
    const float* const from = l.from + channel * l.channel;
    const V scale = load<V>(l.scale + channel), least = V{} + l.least;
    for (int64_t p = 0; p < l.pixels; p += kQuad) {
      const int64_t at = std::min(p, l.pixels - kQuad);
      if (p % kGroup == 0) {
        for (int64_t c = 0; c < kLanes<V>; ++c) __builtin_prefetch(from + c * l.channel + at + l.ahead);
      }
      // A quad holds the pixels of every fourth channel, then the channels of a pixel.
      V rows[kQuad];
      FASTGAN_UNROLL
      for (int i = 0; i < kQuad; ++i) rows[i] = load_quads<V>(from + i * l.channel + at, kQuad * l.channel);
      transpose_quads(rows);
      FASTGAN_UNROLL
      for (int i = 0; i < kQuad; ++i) {
        const V values = rows[i] * scale;
        store(values < least ? least : values, l.to + (at + i) * l.to_pixel + channel);
      }
    }
  }
  return channel;
}

FASTGAN_INLINE void copy_pixels(const ChannelLine& l) {
  for (int64_t p = 0; p < l.pixels; ++p) {
    __builtin_prefetch(l.from + p * l.pixel + l.ahead);
#pragma omp simd
    for (int64_t c = 0; c < kGroup; ++c) {
      l.to[p * l.to_pixel + c] = at_least(l.scale[c] * l.from[p * l.pixel + c], l.least);
    }
  }
}

template <typename V>
FASTGAN_INLINE void gather(const ChannelLine& l) {
  if (l.channels < kGroup) {
    for (int64_t p = 0; p < l.pixels; ++p) std::fill_n(l.to + p * l.to_pixel + l.channels, kGroup - l.channels, 0.0f);
  }
  if (l.channel == 1 && l.channels == kGroup) return copy_pixels(l);
  int64_t channel = 0;
  if (l.pixel == 1 && l.pixels >= kQuad) channel = gather_quads<Portable>(l, gather_quads<V>(l, 0));
  if (channel < l.channels) gather_pixels(l, channel);
}

void gather_portable(const ChannelLine& l) { gather<Portable>(l); }
#if defined(FASTGAN_AVX2)
FASTGAN_AVX2 void gather_avx2(const ChannelLine& l) { gather<register_t<float, 32>>(l); }
FASTGAN_AVX512 void gather_avx512(const ChannelLine& l) { gather<register_t<float, 64>>(l); }
const auto kGather = has_avx512() ? gather_avx512 : has_avx2() ? gather_avx2 : gather_portable;
#else
const auto kGather = gather_portable;
#endif

}  // namespace

void gather_channels(const ChannelLine& line) { kGather(line); }

namespace {

FASTGAN_MULTIVERSION void quantize_line(float* values, int64_t n, Quantization q) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) values[i] = q(values[i]);
}

}  // namespace

void ChannelPatch::quantize(const Quantization& quantization, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    quantize_line(data_.get() + row * row_stride_, columns * kGroup, quantization);
  }
}

ChannelPatch::ChannelPatch(int64_t c, int64_t h, int64_t w, int64_t rows, int64_t columns, bool reflect)
    : c_(c), h_(h), w_(w), row_stride_(columns * kGroup), reflect_(reflect), data_(rows * row_stride_) {}

void ChannelPatch::load(const ScaledImage& image, int64_t sample, int64_t channel, int64_t y, int64_t rows, int64_t x,
                        int64_t columns) {
  const int64_t channels = std::min(kGroup, c_ - channel);
  std::array<float, kGroup> scale{};
  for (int64_t c = 0; c < channels; ++c) scale[c] = image.scale.at(sample, channel + c);
  const float* const from = image.data + sample * image.stride_n + channel * image.stride_c;
  const int64_t left = std::clamp<int64_t>(-x, 0, columns), right = std::clamp<int64_t>(w_ - x, left, columns);
  for (int64_t row = 0; row < rows; ++row) {
    float* const to = data_.get() + row * row_stride_;
    const int64_t line = continued(y + row, h_, reflect_);
    if (line < 0) {
      std::fill_n(to, columns * kGroup, 0.0f);
      continue;
    }
    const auto gather = [&](int64_t column, int64_t place, int64_t pixels) {
      gather_channels({.from = from + line * image.stride_h + column * image.stride_w,
                       .channel = image.in_group,
                       .pixel = image.stride_w,
                       .channels = channels,
                       .pixels = pixels,
                       .scale = scale.data(),
                       .to = to + place * kGroup,
                       .ahead = row + 1 < rows ? image.stride_h : kGroup * image.stride_c - row * image.stride_h,
                       .least = image.least});
    };
    const auto continue_to = [&](int64_t first, int64_t last) {
      for (int64_t place = first; place < last; ++place) {
        const int64_t column = continued(x + place, w_, reflect_);
        if (column < 0) {
          std::fill_n(to + place * kGroup, kGroup, 0.0f);
        } else {
          gather(column, place, 1);
        }
      }
    };
    continue_to(0, left);
    gather(x + left, left, right - left);
    continue_to(right, columns);
  }
}

}  // namespace fastgan
