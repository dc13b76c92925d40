#include "channel_patch.h"

#include <algorithm>
#include <array>

#include "simd.h"

namespace fastgan {
namespace {

using Quad = register_t<float, 16>;
constexpr int64_t kQuad = 4;

// Four channels of four pixels: rows of channels in, rows of pixels out.
FASTGAN_INLINE void gather_block(const float* from, int64_t channel, const Quad& scale, float* to, int64_t to_pixel) {
  const Quad a = load<Quad>(from), b = load<Quad>(from + channel), c = load<Quad>(from + 2 * channel),
             d = load<Quad>(from + 3 * channel);
  FASTGAN_UNROLL
  for (int p = 0; p < kQuad; ++p) store(Quad{a[p], b[p], c[p], d[p]} * scale, to + p * to_pixel);
}

FASTGAN_INLINE void gather_pixels(const ChannelLine& l, int64_t first, int64_t pixels, int64_t first_channel) {
  for (int64_t p = first; p < first + pixels; ++p) {
    for (int64_t c = first_channel; c < l.channels; ++c) {
      l.to[p * l.to_pixel + c] = l.scale[c] * l.from[c * l.channel + p * l.pixel];
    }
  }
}

FASTGAN_INLINE void gather_planes(const ChannelLine& l) {
  const int64_t whole = l.channels / kQuad * kQuad;
  for (int64_t p = 0; p < l.pixels; p += kQuad) {
    // The last step overlaps the one before.
    const int64_t at = std::min(p, l.pixels - kQuad);
    if (p % kGroup == 0) {
      for (int64_t c = 0; c < l.channels; ++c) __builtin_prefetch(l.from + c * l.channel + at + l.ahead);
    }
    for (int64_t c = 0; c < whole; c += kQuad) {
      gather_block(l.from + c * l.channel + at, l.channel, load<Quad>(l.scale + c), l.to + at * l.to_pixel + c,
                   l.to_pixel);
    }
  }
  if (whole < l.channels) gather_pixels(l, 0, l.pixels, whole);
}

FASTGAN_INLINE void copy_pixels(const ChannelLine& l) {
  for (int64_t p = 0; p < l.pixels; ++p) {
#pragma omp simd
    for (int64_t c = 0; c < kGroup; ++c) l.to[p * l.to_pixel + c] = l.scale[c] * l.from[p * l.pixel + c];
  }
}

}  // namespace

FASTGAN_MULTIVERSION void gather_channels(const ChannelLine& l) {
  if (l.channels < kGroup) {
    for (int64_t p = 0; p < l.pixels; ++p) std::fill_n(l.to + p * l.to_pixel + l.channels, kGroup - l.channels, 0.0f);
  }
  if (l.channel == 1 && l.channels == kGroup) return copy_pixels(l);
  if (l.pixel == 1 && l.pixels >= kQuad) return gather_planes(l);
  gather_pixels(l, 0, l.pixels, 0);
}

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
                       .channel = image.stride_c,
                       .pixel = image.stride_w,
                       .channels = channels,
                       .pixels = pixels,
                       .scale = scale.data(),
                       .to = to + place * kGroup,
                       .ahead = image.stride_h});
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
