// Dense convolutions of images with few pixels: near a U-Net's bottleneck a layer is bound by reading its weights.
#pragma once

#include <optional>

#include "conv_geometry.h"

namespace fastgan {

// conv(x, weight) + bias in one read of the weights, with the values, dtype and layout of torch's convolution.
//
// x [N, C_in, H, W] may have any strides; weight is [C_out, C_in, kH, kW], transposed [C_in, C_out, kH, kW]. Nothing
// if the call is not one for these kernels: more pixels than they win at, a large kernel, groups, dilation, half
// precision, a weight that is not contiguous, or arguments that torch's convolution refuses.
std::optional<Tensor> convolve_few_pixels(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                          const ConvGeometry& geometry);

// Whether convolve_few_pixels serves this call.
bool few_pixels_takes(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      const ConvGeometry& geometry);

}  // namespace fastgan
