// Dense convolutions of float images to few channels: an image, a logit.
//
// With three rows of weights a product over shifted images reads the image once for each tap and gives each value it
// loads to three sums. Here every tap of every channel is a row of its own: the image is read once for all of them, and
// what is shifted and added up are the products, which are fewer than the image's channels.
#pragma once

#include "conv_patch.h"
#include "epilogue.h"

namespace fastgan {

// Whether it can compute the call, of those that direct_conv_takes, and is faster at it than products over a shifted
// image.
bool few_outputs_takes(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

// What direct_conv does.
void few_outputs_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g,
                      const PlanarResult& result);

}  // namespace fastgan
