// Dense convolutions of float images with our own products, the scales and the epilogue inside them.
//
// No unfolded image and no unscaled result ever goes to memory: x is multiplied by its scale where it is loaded, and a
// stretch of results gets its epilogue as soon as its last product is added.
#pragma once

#include "conv_patch.h"
#include "epilogue.h"

namespace fastgan {

// Channels on one side that it is made for.
constexpr int64_t kFewChannels = 8;

// Nothing for a call that direct_conv is faster at than torch (float, NCHW, no groups, equal strides, few channels or a
// large transposed 3x3 convolution of stride 2), else what keeps it from being one.
Refusal refused_by_direct_conv(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

// result = epilogue(conv(image, weight)), where image is x scaled.
void direct_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g,
                 const PlanarResult& result);

}  // namespace fastgan
