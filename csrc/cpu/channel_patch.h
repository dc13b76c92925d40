// A stretch of an image with 16 channels of every pixel side by side, whatever the image's own layout: what transforms
// work on whose registers hold channels.
#pragma once

#include <cstdint>

#include "conv_patch.h"
#include "large_buffer.h"

namespace fastgan {

// to[p * to_pixel + c] = scale[c] * from[c * channel + p * pixel], or `least`, for p < pixels, c < channels; 0 for
// other c < kGroup.
struct ChannelLine {
  const float* from;
  int64_t channel, pixel;
  int64_t channels, pixels;
  const float* scale;  // [kGroup]
  float* to;
  int64_t to_pixel = kGroup;
  int64_t ahead = 0;  // from here to the line that is gathered next: more lines than a processor foresees by itself
  float least = kLeast;
};
void gather_channels(const ChannelLine& line);

// Floats as whole numbers: x stands as clamp(round(x * inverse), low, high), halves rounded to even; NaN is low.
struct Quantization {
  float inverse;  // of the step
  float low, high;

  FASTGAN_INLINE float operator()(float value) const {
    // What is added and taken off again leaves no room for a fraction.
    constexpr float kRound = 3 << 22;
    const float scaled = value * inverse;
    const float above = scaled > low ? scaled : low;
    const float within = above < high ? above : high;
    return (within + kRound) - kRound;
  }
};

class ChannelPatch {
 public:
  // Of images of h x w pixels with c channels, continued by zeros or by their mirror image; up to rows x columns of
  // them.
  ChannelPatch(int64_t c, int64_t h, int64_t w, int64_t rows, int64_t columns, bool reflect = false);

  // Loads channels [channel, channel + kGroup) of a sample at rows [y, y + rows) and columns [x, x + columns); what is
  // no channel of the image is 0.
  void load(const ScaledImage& image, int64_t sample, int64_t channel, int64_t y, int64_t rows, int64_t x,
            int64_t columns);

  // Rounds what was loaded to whole numbers.
  void quantize(const Quantization& quantization, int64_t rows, int64_t columns);

  const float* data() const { return data_.get(); }
  int64_t row_stride() const { return row_stride_; }

 private:
  const int64_t c_, h_, w_, row_stride_;
  const bool reflect_;
  LargeBuffer data_;
};

}  // namespace fastgan
