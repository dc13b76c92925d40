// Dense convolutions of float images with few pixels, too many for few_pixels.h: the unfolded image fits the caches,
// and every weight is packed once.
#pragma once

#include <optional>

#include "conv_geometry.h"
#include "epilogue.h"

namespace fastgan {

// Whether the call is one that unfolded_conv is faster at than torch: float, no groups, equal strides, few pixels.
bool unfolded_conv_takes(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

// result = epilogue(conv(in_scale * x, weight)); x of any strides.
void unfolded_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& in_scale, const ConvGeometry& g,
                   const PlanarResult& result);

}  // namespace fastgan
