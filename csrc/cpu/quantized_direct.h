// Dense convolutions of whole numbers as sums of products of bytes, without a transform: what VNNI is for.
#pragma once

#include "channel_patch.h"
#include "conv_geometry.h"
#include "epilogue.h"

namespace fastgan {

// Why it cannot compute the call.
Refusal refused_by_quantized_direct(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

// What it takes, in multiply-adds of float products (winograd_tile.cpp says what those cost).
double quantized_direct_cost(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

// What direct_conv does with x rounded to whole numbers and a weight in int8, without the quantisation's step. Sums are
// exact.
void quantized_direct_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& in_scale,
                           const ConvGeometry& g, const Quantization& quantization, const PlanarResult& result);

}  // namespace fastgan
