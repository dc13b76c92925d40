// The gradient of a convolution's weight by products of our own, with the scales inside.
#pragma once

#include <optional>
#include <vector>

#include "conv_geometry.h"

namespace fastgan {

// sum_{n, pixels} g_scale[n, o] g[n, o, pixel] * in_scale[n, c] x[n, c, stride * pixel + dilation * tap - padding],
// float32 of weight_size [C_out, C_in, kH, kW], for x [N, C_in, H, W] and g [N, C_out, OH, OW] in float32 and NCHW.
// Scales are [N or 1, C or 1], contiguous. Nothing where torch's convolution_backward is better or must say what is
// wrong with the arguments. Zeros pad the lines of g to whole registers, so a NaN in x may reach more taps than read
// it.
std::optional<Tensor> direct_weight_grad(const Tensor& x, const Tensor& g, const std::optional<Tensor>& in_scale,
                                         const std::optional<Tensor>& g_scale, const std::vector<int64_t>& weight_size,
                                         const ConvGeometry& geometry);

}  // namespace fastgan
