#include "conv_geometry.h"

namespace fastgan {

bool suggests_channels_last(const Tensor& t) {
  int64_t least = 0;
  for (const int dim : {1, 3, 2, 0}) {
    const int64_t size = t.size(dim), stride = t.stride(dim);
    if (size == 0 || stride < least || (dim == 1 && stride == 0)) return false;
    if (dim == 0 && least == t.stride(1)) return false;
    least = size > 1 ? stride * size : stride;
  }
  return true;
}

bool has_dense_kernels(const Tensor& weight) {
  const int64_t taps = weight.size(2) * weight.size(3);
  return weight.is_contiguous() || (weight.stride(3) == 1 && weight.stride(2) == weight.size(3) &&
                                    weight.stride(0) == taps && weight.stride(1) == taps * weight.size(0));
}

bool is_plain_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const ConvGeometry& g) {
  const ScalarType dtype = x.scalar_type();
  if (x.dim() != 4 || weight.dim() != 4 || weight.scalar_type() != dtype) return false;
  if (weight.numel() == 0 || x.numel() == 0) return false;
  const int64_t c_out = weight.size(g.transposed ? 1 : 0);
  if (bias && (bias->scalar_type() != dtype || !bias->is_contiguous() || bias->dim() != 1 || bias->size(0) != c_out)) {
    return false;
  }
  if (g.groups != 1 || x.size(1) != weight.size(g.transposed ? 0 : 1)) return false;
  for (const auto* pair : {&g.stride, &g.padding, &g.dilation, &g.output_padding}) {
    if (pair->size() != 2) return false;
  }
  for (int axis = 0; axis < 2; ++axis) {
    if (g.dilation[axis] < 1 || g.stride[axis] < 1 || g.padding[axis] < 0) return false;
    if (g.output_padding[axis] < 0 || g.output_padding[axis] >= (g.transposed ? g.stride[axis] : 1)) return false;
    if (result_size(x, weight, g, axis) < 1) return false;
  }
  return true;
}

}  // namespace fastgan
