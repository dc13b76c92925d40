// A convolution or transposed convolution of any stride as sums over shifted planes.
//
// convolution: x is split into stride^2 planes, plane (a, b) holding x[stride * r + a, stride * c + b]; every tap of
// the kernel then reads one plane at a shift:             y[r, c]         = sum_taps w[tap] plane(tap)[r + dy, c + dx];
// transposed: y is split instead, into phases; a phase meets only the taps that land on it:
//                                             y[stride * r + a, ...] = sum_{taps of (a, b)} w[tap] x[r + dy, c + dx].
#pragma once

#include <algorithm>
#include <vector>

#include "conv_geometry.h"

namespace fastgan {

struct Tap {
  int64_t plane, dy, dx;  // plane (a, b) is number stride * a + b
  int64_t weight;         // index into the kernel, kW * i + j
};

// x as stride^2 planes of every stride-th row and column, and the shifts at which they are read.
struct Sampling {
  int64_t h_in, w_in, stride;
  int64_t dy_min, dy_span, dx_min, dx_span;  // shifts lie in [min, min + span]
  bool reflect = false;                      // beyond the edges: the mirror image, not zeros

  // Takes the shifts' range from those of taps.
  void bound(const std::vector<Tap>& taps);
};

// Where line (or column) i of an image of `size` of them lies that is continued past its edges; -1 for zeros.
inline int64_t continued(int64_t i, int64_t size, bool reflect) {
  if (i >= 0 && i < size) return i;
  const int64_t mirrored = i < 0 ? -i : 2 * (size - 1) - i;
  return reflect && mirrored >= 0 && mirrored < size ? mirrored : -1;
}

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// The results of one phase: y[stride * r + row, stride * c + column].
struct Phase {
  int64_t row, column;
  std::vector<Tap> taps;
};

struct ConvPlan {
  int64_t n, c_in, c_out, h_out, w_out, taps;
  int64_t out_stride;
  Sampling input;
  std::vector<Phase> phases;  // by rows, then columns
  int64_t base_h, base_w;     // rows and columns of a phase (of the largest one)

  // The plan of a call that is_plain_convolution takes, whose two strides are equal.
  ConvPlan(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

  int64_t phases_in_line() const { return std::min(out_stride, w_out); }

 private:
  void add_taps(const Tensor& weight, const ConvGeometry& g);
  void bound_shifts();
};

}  // namespace fastgan
