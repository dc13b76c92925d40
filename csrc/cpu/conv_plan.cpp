#include "conv_plan.h"

#include <algorithm>

namespace fastgan {

ConvPlan::ConvPlan(const Tensor& x, const Tensor& weight, const ConvGeometry& g)
    : n(x.size(0)),
      c_in(x.size(1)),
      c_out(weight.size(g.transposed ? 1 : 0)),
      h_out(result_size(x, weight, g, 0)),
      w_out(result_size(x, weight, g, 1)),
      taps(weight.size(2) * weight.size(3)),
      out_stride(g.transposed ? g.stride[0] : 1),
      input{x.size(2), x.size(3), g.transposed ? 1 : g.stride[0], 0, 0, 0, 0, g.reflect} {
  base_h = ceil_div(h_out, out_stride);
  base_w = ceil_div(w_out, out_stride);
  for (int64_t row = 0; row < std::min(out_stride, h_out); ++row) {
    for (int64_t column = 0; column < std::min(out_stride, w_out); ++column) phases.push_back({row, column, {}});
  }
  add_taps(weight, g);
  bound_shifts();
}

void ConvPlan::add_taps(const Tensor& weight, const ConvGeometry& g) {
  const int64_t kernel_w = weight.size(3);
  for (int64_t i = 0; i < weight.size(2); ++i) {
    for (int64_t j = 0; j < kernel_w; ++j) {
      const int64_t y = i * g.dilation[0] - g.padding[0], x = j * g.dilation[1] - g.padding[1];
      if (!g.transposed) {
        const int64_t dy = floor_div(y, input.stride), dx = floor_div(x, input.stride);
        const int64_t plane = (y - dy * input.stride) * input.stride + (x - dx * input.stride);
        phases[0].taps.push_back({plane, dy, dx, i * kernel_w + j});
        continue;
      }
      for (Phase& phase : phases) {
        const int64_t from_y = phase.row - y, from_x = phase.column - x;
        const int64_t dy = floor_div(from_y, out_stride), dx = floor_div(from_x, out_stride);
        if (dy * out_stride == from_y && dx * out_stride == from_x) {
          phase.taps.push_back({0, dy, dx, i * kernel_w + j});
        }
      }
    }
  }
}

void ConvPlan::bound_shifts() {
  std::vector<Tap> all;
  for (const Phase& phase : phases) all.insert(all.end(), phase.taps.begin(), phase.taps.end());
  input.bound(all);
}

void Sampling::bound(const std::vector<Tap>& taps) {
  dy_min = dy_span = dx_min = dx_span = 0;
  if (taps.empty()) return;
  const auto [top, bottom] = std::ranges::minmax(taps, {}, &Tap::dy);
  const auto [left, right] = std::ranges::minmax(taps, {}, &Tap::dx);
  dy_min = top.dy;
  dy_span = bottom.dy - top.dy;
  dx_min = left.dx;
  dx_span = right.dx - left.dx;
}

}  // namespace fastgan
