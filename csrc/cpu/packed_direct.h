// Dense convolutions as sums of products, without a transform, of weights that were once brought into the order in
// which they are read: of floats where reading the weights is most of the work, and of bytes where VNNI multiplies
// them.
#pragma once

#include <vector>

#include "channel_patch.h"
#include "conv_geometry.h"
#include "epilogue.h"
#include "storage.h"
#include "word_sums.h"

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

// How x lies as bytes for quantized_direct_conv: rows and columns with the padding, bytes of a pixel, and the row and
// the column of the first pixel.
struct ByteLayout {
  int64_t rows = 0, columns = 0, depth = 0, top = 0, left = 0;
};
ByteLayout byte_layout(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

// packed_direct_conv with x rounded to whole numbers and a weight in int8, without the quantisation's step. Sums are
// exact. Of one sample and channels in groups of kGroup, x may be at `bytes` already, but for the padding, which is
// filled here; else that is null. And the result, where it has neither noise nor residual, may go to `results`; where
// there are none of these it goes to `result`.
void quantized_direct_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, uint8_t* bytes,
                           const ConvGeometry& g, const Quantization& quantization, const PlanarResult& result,
                           const std::vector<ByteImage>& results);

}  // namespace fastgan
