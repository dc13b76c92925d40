// The gradient of a convolution's weight by Winograd's minimal filtering: 16 products where direct sums take 36.
#pragma once

#include "conv_patch.h"

namespace fastgan {

// Whether winograd_weight_grad serves this convolution, and faster than direct sums do.
bool winograd_weight_grad_takes(const ConvPlan& plan, const std::vector<int64_t>& weight_size, const ConvGeometry& g);

// As dense_weight_grad, for the convolution of `plan` and `g` with a kernel of `kernel` x `kernel`.
void winograd_weight_grad(const ConvPlan& plan, int64_t kernel, const ConvGeometry& g, const ScaledImage& x,
                          const ScaledImage& cotangent, float* grad);

}  // namespace fastgan
