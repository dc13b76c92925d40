// The inner loop of quantised convolutions: what product.h's panel_products is for floats, of 16-bit integers whose
// products are added up exactly, in 32 bits.
//
// A word holds two integers, those of two neighbouring input channels, the first in its lower half: what instruction
// sets multiply and add in one step.
#pragma once

#include <cstdint>

#include "product.h"

namespace fastgan {

// sums[r, v * lanes + l] (+)= sum_k <values[r, k], weights[k * step + columns[v] + l]>, where < > is the sum of two
// products of halves, and lanes are product_lanes(). Sums must fit 32 bits.
struct PairProducts {
  const int32_t* values;         // words [rows, kPanelStride], of which `depth` are used
  int64_t rows;                  // 1 ... kPanelRows
  int64_t step, depth;           // in words
  const int16_t* weights;        // words of two, or none: narrow_weights
  const int8_t* narrow_weights;  // the same in bytes
  const int32_t* columns;        // in words
  int64_t vectors;
  int32_t* sums;
  int64_t sums_stride;
  bool overwrite;  // = instead of +=
  Ahead ahead = {};
};
void pair_products(const PairProducts& p);

}  // namespace fastgan
