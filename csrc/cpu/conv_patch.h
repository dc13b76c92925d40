// What one task of a convolution needs of x: some channels of some lines, split into planes, with the padding around.
#pragma once

#include <utility>
#include <vector>

#include "conv_plan.h"
#include "image.h"
#include "product.h"

namespace fastgan {

// x [N, C, H, W] of any strides, with a factor per sample and channel, and `least` in place of what is less then. Of a
// grouped x, whose tensor tells only the sizes, stride_c leads from one group to the next, for each of its channels.
struct ScaledImage {
  const float* data;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int64_t in_group;  // from one channel of a group to the next
  bool grouped;
  Scales<float> scale;
  float least;

  ScaledImage(const Tensor& x, const std::optional<Tensor>& in_scale, bool rectified = false, bool is_grouped = false)
      : data(x.const_data_ptr<float>()),
        stride_n(x.stride(0)),
        stride_c(is_grouped ? x.size(2) * x.size(3) : x.stride(1)),
        stride_h(is_grouped ? kGroup * x.size(3) : x.stride(2)),
        stride_w(is_grouped ? kGroup : x.stride(3)),
        in_group(is_grouped ? 1 : stride_c),
        grouped(is_grouped),
        scale(in_scale),
        least(rectified ? 0.0f : kLeast) {}
};

class Patch {
 public:
  // `width` results per line; up to `channels` channels of up to `lines` lines of one sample.
  Patch(const Sampling& input, int64_t channels, int64_t lines, int64_t width);

  // Loads channels [channel, channel + channels) for results [row, row + lines) of a sample, as channels from `place`
  // on of the patch.
  void load(const ScaledImage& x, int64_t sample, int64_t row, int64_t lines, int64_t channel, int64_t channels,
            int64_t place = 0);

  // Where tap reads for the first result of channel 0.
  int64_t offset(const Tap& tap) const {
    return tap.plane * plane_stride_ + (tap.dy - input_.dy_min) * line_stride_ + tap.dx - input_.dx_min;
  }
  int64_t channel_stride() const { return channel_stride_; }
  int64_t line_stride() const { return line_stride_; }
  const float* data() const { return data_.data(); }

  // offset(tap) for each tap in each of `channels` channels: the rows of the matrix that im2col would make.
  std::vector<int32_t> offsets(const std::vector<Tap>& taps, int64_t channels) const;

 private:
  std::pair<int64_t, int64_t> inside(int64_t first, int64_t phase, int64_t size, int64_t count) const;
  void mirror(const ScaledImage& x, const float* channel, float scale, int64_t row, int64_t lines, int64_t plane,
              float* to) const;

  const Sampling input_;
  int64_t line_stride_, plane_stride_, channel_stride_;
  std::vector<float> data_;
};

}  // namespace fastgan
