#include "winograd_plan.h"

#include <algorithm>
#include <iterator>

namespace fastgan {
namespace {

// The taps of one phase that read one plane.
std::vector<Tap> taps_of(const Phase& phase, int64_t plane) {
  std::vector<Tap> found;
  std::ranges::copy_if(phase.taps, std::back_inserter(found), [=](const Tap& tap) { return tap.plane == plane; });
  return found;
}

}  // namespace

int64_t taps_per_axis(const ConvPlan& conv, int64_t kernel) {
  const int64_t taps = ceil_div(kernel, conv.input.stride * conv.out_stride);
  return taps >= 2 && taps <= 4 ? taps : 0;
}

WinogradPlan::WinogradPlan(const ConvPlan& conv, int64_t per_axis, int64_t tile)
    : m(tile), r(per_axis == 3 ? 3 : 2), t(m + r - 1), stride(conv.input.stride) {
  const int64_t runs = per_axis / r;
  // Shifts of the parts' first taps, in pixels of their plane. A plane's first shift (convolution), or the least one of
  // the phases (transposed), is where its tiles start.
  std::vector<Tap> starts;
  for (int64_t plane = 0; plane < stride * stride; ++plane) {
    int64_t dy = INT64_MAX, dx = INT64_MAX;
    for (const Phase& phase : conv.phases) {
      for (const Tap& tap : taps_of(phase, plane)) {
        dy = std::min(dy, tap.dy);
        dx = std::min(dx, tap.dx);
      }
    }
    for (int64_t i = 0; i < runs; ++i) {
      for (int64_t j = 0; j < runs; ++j) starts.push_back({plane, dy + i * r, dx + j * r, 0});
    }
  }
  int64_t extra_y = 0, extra_x = 0;
  for (const Phase& phase : conv.phases) {
    PhaseTaps found;
    const auto [top, bottom] = std::ranges::minmax(taps_of(phase, 0), {}, &Tap::dy);
    const auto [left, right] = std::ranges::minmax(taps_of(phase, 0), {}, &Tap::dx);
    found.shift_y = bottom.dy - starts[0].dy < per_axis ? 0 : starts[0].dy - top.dy;
    found.shift_x = right.dx - starts[0].dx < per_axis ? 0 : starts[0].dx - left.dx;
    extra_y = std::max(extra_y, -found.shift_y);
    extra_x = std::max(extra_x, -found.shift_x);
    for (const Tap& start : starts) {
      auto& indices = found.of_part.emplace_back(r * r, conv.taps);
      for (const Tap& tap : taps_of(phase, start.plane)) {
        const int64_t i = tap.dy + found.shift_y - start.dy, j = tap.dx + found.shift_x - start.dx;
        if (i >= 0 && i < r && j >= 0 && j < r) indices[i * r + j] = tap.weight;
      }
    }
    phases.push_back(found);
  }
  tiles_h = ceil_div(conv.base_h + extra_y, m);
  tiles_w = ceil_div(conv.base_w + extra_x, m);
  for (const Tap& start : starts) {
    parts.push_back({stride * start.dy + start.plane / stride, stride * start.dx + start.plane % stride});
  }
  const auto [top, bottom] = std::ranges::minmax(parts, {}, &Part::y);
  const auto [left, right] = std::ranges::minmax(parts, {}, &Part::x);
  origin = {top.y, left.x};
  span = {bottom.y - top.y + stride * (t - 1) + 1, right.x - left.x + stride * (t - 1) + 1};
}

}  // namespace fastgan
