#include "conv_patch.h"

#include <algorithm>

namespace fastgan {

Patch::Patch(const Sampling& input, int64_t channels, int64_t lines, int64_t width)
    : input_(input),
      line_stride_(width + input.dx_span),
      plane_stride_(line_stride_ * (lines + input.dy_span)),
      channel_stride_(plane_stride_ * input.stride * input.stride),
      data_(channels * channel_stride_) {}

// The range of i < count for which stride * (first + i) + phase is in [0, size).
std::pair<int64_t, int64_t> Patch::inside(int64_t first, int64_t phase, int64_t size, int64_t count) const {
  const int64_t stride = input_.stride, start = stride * first + phase;
  const int64_t begin = std::clamp<int64_t>(start < 0 ? (stride - 1 - start) / stride : 0, 0, count);
  const int64_t end = std::clamp<int64_t>(size > start ? (size - start + stride - 1) / stride : 0, begin, count);
  return {begin, end};
}

void Patch::load(const ScaledImage& x, int64_t sample, int64_t row, int64_t lines, int64_t channel, int64_t channels,
                 int64_t place) {
  const int64_t stride = input_.stride;
  for (int64_t c = 0; c < channels; ++c) {
    const float scale = x.scale.at(sample, channel + c);
    const float* const from = x.data + sample * x.stride_n + (channel + c) * x.stride_c;
    float* to = data_.data() + (place + c) * channel_stride_;
    for (int64_t plane = 0; plane < stride * stride; ++plane) {
      const int64_t plane_row = plane / stride, plane_column = plane % stride;
      // Columns [left, right) and lines [top, bottom) of the plane lie inside x; the others are padding.
      const auto [top, bottom] = inside(row + input_.dy_min, plane_row, input_.h_in, lines + input_.dy_span);
      const auto [left, right] = inside(input_.dx_min, plane_column, input_.w_in, line_stride_);
      std::fill_n(to, top * line_stride_, 0.0f);
      for (int64_t r = top; r < bottom; ++r) {
        std::fill_n(to + r * line_stride_, left, 0.0f);
        std::fill_n(to + r * line_stride_ + right, line_stride_ - right, 0.0f);
      }
      std::fill_n(to + bottom * line_stride_, (lines + input_.dy_span - bottom) * line_stride_, 0.0f);
      const int64_t y = stride * (row + top + input_.dy_min) + plane_row, left_x = stride * (left + input_.dx_min);
      pack_lines({.from = from + y * x.stride_h + (left_x + plane_column) * x.stride_w,
                  .line = stride * x.stride_h,
                  .pixel = stride * x.stride_w,
                  .scale = scale,
                  .lines = bottom - top,
                  .pixels = right - left,
                  .to = to + top * line_stride_ + left,
                  .to_line = line_stride_,
                  .least = x.least});
      if (input_.reflect) mirror(x, from, scale, row, lines, plane, to);
      to += plane_stride_;
    }
  }
}

// Beyond the edges of a plane that was loaded: the mirror image in place of the zeros.
void Patch::mirror(const ScaledImage& x, const float* channel, float scale, int64_t row, int64_t lines, int64_t plane,
                   float* to) const {
  const int64_t stride = input_.stride;
  const auto [left, right] = inside(input_.dx_min, plane % stride, input_.w_in, line_stride_);
  for (int64_t r = 0; r < lines + input_.dy_span; ++r, to += line_stride_) {
    const int64_t line = stride * (row + r + input_.dy_min) + plane / stride;
    const int64_t y = continued(line, input_.h_in, true);
    if (y < 0) continue;
    for (int64_t i = 0; i < line_stride_; ++i) {
      if (y == line && i == left) i = right;
      if (i == line_stride_) break;
      const int64_t column = continued(stride * (i + input_.dx_min) + plane % stride, input_.w_in, true);
      if (column >= 0) to[i] = at_least(scale * channel[y * x.stride_h + column * x.stride_w], x.least);
    }
  }
}

std::vector<int32_t> Patch::offsets(const std::vector<Tap>& taps, int64_t channels) const {
  std::vector<int32_t> found;
  found.reserve(channels * taps.size());
  for (int64_t c = 0; c < channels; ++c) {
    for (const Tap& tap : taps) found.push_back(static_cast<int32_t>(c * channel_stride_ + offset(tap)));
  }
  return found;
}

}  // namespace fastgan
