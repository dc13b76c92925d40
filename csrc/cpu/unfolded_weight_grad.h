// The gradient of a convolution's weight for maps of few pixels, as one matrix product: g [C_out, pixels] times x
// unfolded [pixels, C_in * taps].
#pragma once

#include "conv_patch.h"

namespace fastgan {

// Whether unfolded_weight_grad serves this convolution, and faster than torch does.
bool unfolded_weight_grad_takes(const ConvPlan& plan);

// grad[o, c, tap] = sum_{n, pixels} g[n, o, pixel] * x[n, c, pixel at tap], both with their factors, for the
// convolution of `plan`; grad is contiguous and is written in full.
void unfolded_weight_grad(const ConvPlan& plan, const ScaledImage& x, const ScaledImage& g, float* grad);

}  // namespace fastgan
