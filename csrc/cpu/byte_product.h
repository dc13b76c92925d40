// The inner loop of quantised convolutions without a transform: products of bytes, whose sums are exact, in 32 bits.
//
// A word holds four bytes, those of four neighbouring input channels: what VNNI multiplies and adds in one step.
#pragma once

#include <cstdint>

#include "product.h"

namespace fastgan {

// Whether the processor has instructions for such words; without them they take several for each.
bool has_byte_products();

// sums[r, i] (+)= sum over taps t and words k of <pixels[r][taps[t] + 4 k], weights[t, k, i]>, i < vectors * lanes,
// where < > is the sum of four products and lanes are product_lanes(). Sums must fit 32 bits.
struct ByteProducts {
  const uint8_t* const* pixels;  // [rows]
  int64_t rows;                  // 1 ... kPanelRows
  const int32_t* taps;           // in bytes
  int64_t tap_count, words;      // words of each tap
  const int8_t* weights;         // [tap_count, words, vectors * lanes, 4]
  int64_t vectors;               // 1 ... product_vectors()
  int32_t* sums;                 // [rows, sums_stride]
  int64_t sums_stride;
  bool overwrite;  // = instead of +=
};
void byte_products(const ByteProducts& p);

}  // namespace fastgan
