// Which tiles of an image Winograd's filtering transforms for a convolution, and which taps of the kernel.
#pragma once

#include <vector>

#include "conv_plan.h"

namespace fastgan {

struct WinogradPlan {
  // What stands for a channel of x in the products: every stride-th pixel of it, from (y, x) on.
  struct Part {
    int64_t y, x;
  };
  // Per part the kernel index of each of its r^2 taps, the number of taps for one that the kernel does not have; and
  // how far the phase's first tile starts before 0, not positive.
  struct PhaseTaps {
    std::vector<std::vector<int64_t>> of_part;
    int64_t shift_y, shift_x;
  };

  int64_t m, r, t;  // F(m x m, r x r), t = m + r - 1
  int64_t stride;   // between the pixels of a part
  std::vector<Part> parts;
  std::vector<PhaseTaps> phases;
  int64_t tiles_h, tiles_w;
  Part origin;  // the first row and the first column of any part
  Part span;    // rows and columns from there on that the parts of one tile reach over

  // With tiles of `tile` x `tile` results; per_axis is taps_per_axis of the convolution, not 0.
  WinogradPlan(const ConvPlan& conv, int64_t per_axis, int64_t tile);
};

// The most taps of a plane and phase, each way: 2, 3 or 4, else 0. Those with fewer, of a 3x3 kernel of stride 2, have
// zeros for the others.
int64_t taps_per_axis(const ConvPlan& conv, int64_t kernel);

}  // namespace fastgan
