// Dense convolutions as sums of products, without a transform, of weights that were once brought into the order in
// which they are read: of floats where reading the weights is most of the work, and of bytes where VNNI multiplies
// them.
#pragma once

#include "channel_patch.h"
#include "conv_geometry.h"
#include "epilogue.h"
#include "storage.h"

namespace fastgan {

// Why it cannot compute the call.
Refusal refused_by_packed_direct(const Tensor& x, const Tensor& weight, const ConvGeometry& g);
Refusal refused_by_quantized_direct(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

// What it takes, of a weight that is kept.
double packed_direct_ms(const Tensor& x, const Tensor& weight, const ConvGeometry& g);
double quantized_direct_ms(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

// What direct_conv does, with weights in float or in bfloat16.
void packed_direct_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g,
                        Storage storage, const PlanarResult& result);
// The same with x rounded to whole numbers and a weight in int8, without the quantisation's step. Sums are exact.
void quantized_direct_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g,
                           const Quantization& quantization, const PlanarResult& result);

}  // namespace fastgan
