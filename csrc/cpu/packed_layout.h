// What packed_direct.h's convolutions work out from sizes alone: how images, weights and tasks are cut.
#pragma once

#include <vector>

#include "conv_plan.h"
#include "storage.h"
#include "word_image.h"

namespace fastgan {

// A word (word_product.h): what values of the image are, how many there are in one, and what a weight of float or int8
// is stored as.
template <typename Word>
struct WordForm;
template <>
struct WordForm<float> {
  using Value = float;
  using Source = float;
  static constexpr int64_t kPerWord = 1;
};
template <>
struct WordForm<int32_t> {
  using Value = uint8_t;
  using Source = int8_t;
  static constexpr int64_t kPerWord = 4;
};

template <typename Word>
struct PackedLayout {
  static constexpr int64_t kPerWord = WordForm<Word>::kPerWord;

  // Weights that are in the first-level cache together: words of some taps.
  struct Chunk {
    std::vector<int32_t> taps;  // where their first word lies from a pixel on
    int64_t words;              // of each tap
    int64_t first;              // word of the phase
  };
  // Of a phase: only taps that meet some pixel of x.
  struct PhaseTaps {
    std::vector<int64_t> kernel;  // their places in a kernel
    std::vector<Chunk> chunks;
    int64_t first;  // word of the slab
  };

  PackedLayout(const Tensor& x, const Tensor& weight, const ConvGeometry& g, Storage storage);

  ConvPlan plan;
  WordImage<typename WordForm<Word>::Value> image;
  int64_t word_bytes;          // of the weights
  int64_t words, slab, slabs;  // words of a tap
  int64_t blocks;              // of lines of results, one per task
  int64_t lines;               // of the largest block
  int64_t words_of_slab = 0;
  std::vector<PhaseTaps> taps;
  std::vector<int64_t> key;  // of the packed weights

 private:
  bool meets_pixel(const Tap& tap) const;
  PhaseTaps taps_of(const Phase& phase) const;
};

}  // namespace fastgan
