// The gradient of a convolution's weight for many channels, as matrix products that unfold nothing.
#pragma once

#include "conv_patch.h"

namespace fastgan {

// Whether dense_weight_grad serves this convolution, and faster than torch does.
bool dense_weight_grad_takes(const ConvPlan& plan);

// grad[o, c, tap] = sum_{n, pixels} g[n, o, pixel] * x[n, c, pixel at tap], both with their factors, for the
// convolution of `plan`; grad is contiguous and is written in full.
void dense_weight_grad(const ConvPlan& plan, const ScaledImage& x, const ScaledImage& g, float* grad);

}  // namespace fastgan
