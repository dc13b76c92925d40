#include "conv_geometry.h"

namespace fastgan {
namespace {

constexpr Refusal kWrong{"torch has to say what is wrong with the arguments"};

}  // namespace

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

Refusal refuse_unless_plain_shapes(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (x.dim() != 4 || weight.dim() != 4) return kWrong;
  if (weight.numel() == 0 || x.numel() == 0) return {"x or the weight is empty"};
  if (g.groups != 1) return {"it takes groups = 1, got #", g.groups};
  if (x.size(1) != weight.size(g.transposed ? 0 : 1)) return kWrong;
  for (const auto* pair : {&g.stride, &g.padding, &g.dilation, &g.output_padding}) {
    if (pair->size() != 2) return kWrong;
  }
  for (int axis = 0; axis < 2; ++axis) {
    if (g.dilation[axis] < 1 || g.stride[axis] < 1 || g.padding[axis] < 0) return kWrong;
    if (g.output_padding[axis] < 0 || g.output_padding[axis] >= (g.transposed ? g.stride[axis] : 1)) return kWrong;
    if (result_size(x, weight, g, axis) < 1) return kWrong;
    if (!g.reflect) continue;
    if (g.transposed) return {"transposed, it takes no mirrored padding"};
    if (g.padding[axis] >= x.size(2 + axis)) {
      return {"it mirrors fewer than # pixels, got #", x.size(2 + axis), g.padding[axis]};
    }
  }
  return {};
}

Refusal refuse_unless_plain(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            const ConvGeometry& g) {
  const ScalarType dtype = x.scalar_type();
  if (const Refusal refusal = refuse_unless_plain_shapes(x, weight, g)) return refusal;
  if (weight.scalar_type() != dtype) return kWrong;
  const int64_t c_out = weight.size(g.transposed ? 1 : 0);
  if (bias && (bias->scalar_type() != dtype || !bias->is_contiguous() || bias->dim() != 1 || bias->size(0) != c_out)) {
    return kWrong;
  }
  return {};
}

Refusal refuse_unless_float_nchw(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (x.scalar_type() != ScalarType::Float) return {"it takes float32"};
  if (const Refusal refusal = refuse_unless_plain(x, weight, std::nullopt, g)) return refusal;
  return refuse_unless_nchw(x, weight, g);
}

Refusal refuse_unless_nchw(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (suggests_channels_last(x) || suggests_channels_last(weight)) return {"it takes NCHW, got channels_last"};
  if (g.stride[0] != g.stride[1]) return {"it takes equal strides, got # and #", g.stride[0], g.stride[1]};
  return {};
}

}  // namespace fastgan
