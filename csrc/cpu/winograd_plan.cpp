#include "winograd_plan.h"

#include <algorithm>
#include <iterator>

#include "channel_patch.h"
#include "product.h"

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

// Shifts of the parts' first taps, in pixels of their plane. A plane's first shift (convolution), or the least one of
// the phases (transposed), is where its tiles start.
std::vector<Tap> WinogradPlan::starts_of(const ConvPlan& conv, int64_t per_axis) const {
  std::vector<Tap> starts;
  for (int64_t plane = 0; plane < stride * stride; ++plane) {
    int64_t dy = INT64_MAX, dx = INT64_MAX;
    for (const Phase& phase : conv.phases) {
      for (const Tap& tap : taps_of(phase, plane)) {
        dy = std::min(dy, tap.dy);
        dx = std::min(dx, tap.dx);
      }
    }
    for (int64_t i = 0; i < per_axis; i += r) {
      for (int64_t j = 0; j < per_axis; j += r) starts.push_back({plane, dy + i, dx + j, 0});
    }
  }
  return starts;
}

size_t WinogradPlan::add_form(Form form) {
  form.products = (form.single_y ? m : t) * (form.single_x ? m : t);
  form.first = values;
  const auto found = std::ranges::find_if(forms, [&](const Form& other) {
    return other.single_y == form.single_y && other.single_x == form.single_x && other.y == form.y && other.x == form.x;
  });
  if (found != forms.end()) return found - forms.begin();
  values += form.products;
  forms.push_back(form);
  return forms.size() - 1;
}

WinogradPlan::PhaseTaps WinogradPlan::taps_of_phase(const ConvPlan& conv, const Phase& phase, int64_t per_axis,
                                                    const std::vector<Tap>& starts) {
  PhaseTaps found;
  const auto [top, bottom] = std::ranges::minmax(taps_of(phase, 0), {}, &Tap::dy);
  const auto [left, right] = std::ranges::minmax(taps_of(phase, 0), {}, &Tap::dx);
  found.shift_y = bottom.dy - starts[0].dy < per_axis ? 0 : starts[0].dy - top.dy;
  found.shift_x = right.dx - starts[0].dx < per_axis ? 0 : starts[0].dx - left.dx;
  // Parts are summed before the transform back, so only a part alone may have a form of its own.
  const bool alone = starts.size() == 1 && r == 2;
  Form form{alone && top.dy == bottom.dy, alone && left.dx == right.dx, 0, 0, 0, 0};
  if (form.single_y) form.y = top.dy + found.shift_y - starts[0].dy;
  if (form.single_x) form.x = left.dx + found.shift_x - starts[0].dx;
  found.form = add_form(form);
  found.first_product = products;
  found.first_weight = weights;
  products += forms[found.form].products;
  weights += matrices_of(form);
  const int64_t rows = form.single_y ? 1 : r, columns = form.single_x ? 1 : r;
  for (const Tap& start : starts) {
    auto& indices = found.of_part.emplace_back(rows * columns, conv.taps);
    for (const Tap& tap : taps_of(phase, start.plane)) {
      const int64_t i = tap.dy + found.shift_y - start.dy - form.y, j = tap.dx + found.shift_x - start.dx - form.x;
      if (i >= 0 && i < rows && j >= 0 && j < columns) indices[i * columns + j] = tap.weight;
    }
  }
  return found;
}

bool WinogradPlan::many_weights() const {
  constexpr int64_t kMost = 1 << 20;
  return all_weights() > kMost;
}

WinogradPlan::WinogradPlan(const ConvPlan& conv, int64_t per_axis, int64_t tile)
    : m(tile), r(per_axis == 3 ? 3 : 2), t(m + r - 1), stride(conv.input.stride), values(0), products(0), weights(0) {
  const std::vector<Tap> starts = starts_of(conv, per_axis);
  int64_t extra_y = 0, extra_x = 0;
  for (const Phase& phase : conv.phases) {
    phases.push_back(taps_of_phase(conv, phase, per_axis, starts));
    extra_y = std::max(extra_y, -phases.back().shift_y);
    extra_x = std::max(extra_x, -phases.back().shift_x);
  }
  tiles_h = ceil_div(conv.base_h + extra_y, m);
  tiles_w = ceil_div(conv.base_w + extra_x, m);
  aligned = extra_x == 0;
  for (const Tap& start : starts) {
    parts.push_back({stride * start.dy + start.plane / stride, stride * start.dx + start.plane % stride});
  }
  part_depth = round_up(conv.c_in, parts.size() > 1 ? kGroup : product_lanes());
  depth = part_depth * static_cast<int64_t>(parts.size());
  all_tiles_ = conv.n * tiles_h * tiles_w;
  c_out_ = conv.c_out;
  const auto [top, bottom] = std::ranges::minmax(parts, {}, &Part::y);
  const auto [left, right] = std::ranges::minmax(parts, {}, &Part::x);
  origin = {top.y, left.x};
  span = {bottom.y - top.y + stride * (t - 1) + 1, right.x - left.x + stride * (t - 1) + 1};
}

}  // namespace fastgan
