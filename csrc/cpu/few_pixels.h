// Dense convolutions of images with few pixels: near a U-Net's bottleneck a layer is bound by reading its weights.
#pragma once

#include <optional>

#include "bf16.h"
#include "conv_geometry.h"

namespace fastgan {

// conv(x, weight) + bias in one read of the weights, with the values, dtype and layout of torch's convolution.
//
// x [N, C_in, H, W] may have any strides; weight is [C_out, C_in, kH, kW], transposed [C_in, C_out, kH, kW]; the call
// is one that refused_by_few_pixels lets pass, and so is the bias. What is read of a float32 weight is a rounded copy,
// kept with it (kept_weights.h), where `storage` is bfloat16.
Tensor convolve_few_pixels(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const ConvGeometry& geometry, Storage storage);

// Why convolve_few_pixels does not serve this call: more pixels than it wins at, a large kernel, groups, dilation, half
// precision, a weight that is not contiguous, or arguments that torch's convolution refuses.
Refusal refused_by_few_pixels(const Tensor& x, const Tensor& weight, const ConvGeometry& geometry);

}  // namespace fastgan
