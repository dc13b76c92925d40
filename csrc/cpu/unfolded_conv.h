// Dense convolutions of float images with few pixels, too many for few_pixels.h: the unfolded image fits the caches,
// and every weight is packed once.
#pragma once

#include <optional>

#include "conv_patch.h"
#include "epilogue.h"

namespace fastgan {

// Nothing for a call that unfolded_conv is faster at than torch (float, NCHW, no groups, equal strides, few pixels),
// else what keeps it from being one.
Refusal refused_by_unfolded_conv(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

// Its predicted time.
double unfolded_conv_ms(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

// result = epilogue(conv(image, weight)), where image is x scaled; x of any strides.
void unfolded_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g,
                   const PlanarResult& result);

}  // namespace fastgan
