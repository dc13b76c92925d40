// What a convolution is, in torch's terms: sizes, layouts, and which calls kernels of our own may take.
#pragma once

#include <optional>
#include <vector>

#include "algorithm.h"
#include "common.h"

namespace fastgan {

// The geometry of one call; pairs are (height, width).
struct ConvGeometry {
  std::vector<int64_t> stride, padding, output_padding, dilation;
  bool transposed;
  int64_t groups;
  bool reflect = false;  // x is continued by its mirror image, not by zeros
};

// Rows (axis 0) or columns (axis 1) of the result.
inline int64_t result_size(const Tensor& x, const Tensor& weight, const ConvGeometry& g, int axis) {
  const int64_t size = x.size(2 + axis), padding = 2 * g.padding[axis];
  const int64_t span = g.dilation[axis] * (weight.size(2 + axis) - 1) + 1;
  if (g.transposed) return (size - 1) * g.stride[axis] - padding + span + g.output_padding[axis];
  return size + padding < span ? 0 : (size + padding - span) / g.stride[axis] + 1;
}

// What torch's suggest_memory_format says of strides: where sizes of 1 leave both layouts open, contiguous.
bool suggests_channels_last(const Tensor& t);

// Whether a weight [O, I, kH, kW] is dense, its kernels one behind the other with channels of either side the faster
// ones.
bool has_dense_kernels(const Tensor& weight);

// Refuses what is no plain convolution: one whose arguments torch's convolution takes, without groups, and of which
// something remains to compute. The first looks at the shapes alone.
Refusal refuse_unless_plain_shapes(const Tensor& x, const Tensor& weight, const ConvGeometry& g);
Refusal refuse_unless_plain(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            const ConvGeometry& g);

inline bool is_plain_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                 const ConvGeometry& g) {
  return !refuse_unless_plain(x, weight, bias, g);
}

// What the algorithms that multiply images in NCHW refuse, beside what is no plain convolution.
Refusal refuse_unless_nchw(const Tensor& x, const Tensor& weight, const ConvGeometry& g);
// Both, and what is not float32.
Refusal refuse_unless_float_nchw(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

}  // namespace fastgan
