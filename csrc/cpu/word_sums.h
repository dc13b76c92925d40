// What becomes of sums of words, which lie with all channels of a pixel side by side: planes of floats, or the bytes
// that the next convolution reads.
#pragma once

#include "activation.h"
#include "channel_patch.h"

namespace fastgan {

// kGroup channels of some pixels as planes of floats: to[c * to_stride + p] = from[p * stride + c] + shift[c]; without
// shifts, + 0.
template <typename Word>
struct Spreading {
  const Word* from;
  int64_t stride, pixels;
  const Word* shift;
  float* to;
  int64_t to_stride;
};
void planes_of(const Spreading<float>& s);
void planes_of(const Spreading<int32_t>& s);

// What a convolution writes where another one reads it: rounded as that one rounds it, counted from the least value on,
// a byte for each channel of a pixel. Bytes from the first pixel on, from one row and from one pixel to the next.
struct ByteImage {
  uint8_t* first;
  int64_t row, pixel;
  Quantization quantization;
};

// Sums of `channels` channels of some pixels, kGroup by kGroup, to bytes: sums + shift, then an epilogue's scale, bias
// and activation, then each image's rounding.
struct RoundedRow {
  const int32_t* sums;
  int64_t stride, pixels, channels;
  const int32_t* shift;
  const float *scale, *bias;  // [channels]
  Act act;
  float alpha, gain, clamp;
  const ByteImage* images;  // `first` is where the first pixel goes, `pixel` the step from it to the next
  int64_t image_count;
};
void round_row(const RoundedRow& row);

}  // namespace fastgan
