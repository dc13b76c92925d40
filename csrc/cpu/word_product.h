// The inner loop of convolutions without a transform: pixels, one at a time, times registers of output channels.
//
// What is multiplied in one step is a word of 32 bits: a float; or four bytes, those of four neighbouring input
// channels, whose products VNNI adds up in one instruction. Sums of bytes are exact, in 32 bits.
#pragma once

#include <cstdint>

#include "product.h"

namespace fastgan {

// Whether the processor has instructions for words of bytes; without them they take several for each.
bool has_byte_products();

// sums[r, i] (+)= sum over taps t and words k of <pixels[r][taps[t] + k], weights[t, k, i]>, i < vectors * lanes, where
// < > is the product of floats or the sum of the products of bytes, a pixel's without a sign, and lanes are
// product_lanes(). Sums of bytes must fit 32 bits.
template <typename Word>
struct WordProducts {
  const Word* const* pixels;  // [rows]
  int64_t rows;               // 1 ... kPanelRows
  const int32_t* taps;
  int64_t tap_count, words;                  // words of each tap
  const Word* weights;                       // [tap_count, words, vectors * lanes], or none: narrow_weights
  const BFloat16* narrow_weights = nullptr;  // of floats; they lie pairwise (bf16.h), vectors being an even number
  int64_t vectors;                           // 1 ... product_vectors()
  Word* sums;                                // [rows, sums_stride]
  int64_t sums_stride;
  bool overwrite;              // = instead of +=
  const char* next = nullptr;  // what is to be fetched from memory meanwhile
  int64_t next_lines = 0;      // cache lines of it in each step: 0, 1, 2 or 4
};
void word_products(const WordProducts<float>& p);
void word_products(const WordProducts<int32_t>& p);

}  // namespace fastgan
