// Filtering of grouped images (image.h) with a separable filter of few taps, that of every StyleGAN.
#pragma once

#include <array>

#include "epilogue.h"

namespace fastgan {

// y[i][j] = sum over k, l of along_y[k] * along_x[l] * x[i + k - pad_y][j + l - pad_x], x being 0 around itself.
struct GroupedFir {
  static constexpr int64_t kTaps = 4;  // a shorter filter has zeros behind it

  const float* x;
  int64_t h_in, w_in, h_out, w_out, pad_y, pad_x;
  std::array<float, kTaps> along_y, along_x;
};

// To a grouped result, with its epilogue.
void grouped_fir(const GroupedFir& fir, const PlanarResult& result);

}  // namespace fastgan
