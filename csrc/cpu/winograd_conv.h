// Dense convolutions of float images through Winograd's minimal filtering: a third to a half of the products.
#pragma once

#include <optional>

#include "channel_patch.h"
#include "conv_geometry.h"
#include "epilogue.h"
#include "large_buffer.h"
#include "storage.h"

namespace fastgan {

// Why it cannot compute the call.
Refusal refused_by_winograd(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

// The tile size m of F(m x m, r x r) that the call should use, r being 2 or 3; 0 where it should not. `high` admits
// only tiles whose error is at most 3 times that of torch's convolution; `rival_ms` is the predicted time of what would
// serve the call otherwise, where that is not torch's convolution; `told`, if any, gets what was thought of: each tile,
// and torch's convolution where its time was predicted.
//
// Every plane and phase of the call (conv_plan.h) needs a kernel of 2, 3 or 4 taps each way: 3x3, 4x4 of stride 1 and
// 2, 6x6 of stride 2, and their transposes.
int64_t winograd_tile(const Tensor& x, const Tensor& weight, const ConvGeometry& g, bool high,
                      std::optional<double> rival_ms, Candidates* told);

// Transformed tiles of an image that grows by channels, as a dense block's does: each convolution transforms those that
// are new to it and multiplies with all. Every convolution has the same sizes but for its channels, which are multiples
// of kGroup (channel_patch.h).
struct GrowingTiles {
  int64_t most;          // channels in the end
  int64_t channels = 0;  // so far
  int64_t threads = 0;   // for which the tiles were divided into blocks, once and for all
  LargeBuffer data = {};
};

// What direct_conv does, with tiles of m x m. Error: at most 1e-5 of the largest result (m = 4), 2e-6 (m = 2, 3); with
// transformed weights stored in bfloat16 that rounding's, of 2^-9 each, comes on top.
void winograd_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g, int64_t m,
                   Storage storage, const PlanarResult& result);

// What direct_conv does with x rounded to whole numbers and a weight in int8, times
// whole_factors(m, r).weight_factor (winograd.h), without the quantisation's step. Sums of integers are exact,
// whichever the tile; those of m = 1 are the plain sums, of weights that stay in 8 bits.
void quantized_winograd_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g,
                             int64_t m, const Quantization& quantization, const PlanarResult& result);

// What computes such a convolution: tiles of 1 to 3 by quantized_winograd_conv, 0 by quantized_direct_conv
// (packed_direct.h). Why it cannot.
Refusal refused_by_quantized(const Tensor& x, const Tensor& weight, const ConvGeometry& g, int64_t m);

// The tiles that can serve it, the one that should first, with their predicted times.
Candidates quantized_tiles(const Tensor& x, const Tensor& weight, const ConvGeometry& g);

// The tile size for such convolutions of x and what they add to it, in their order; 0 where they should be computed one
// by one.
int64_t growing_tile(const Tensor& x, const std::vector<Tensor>& weights, const ConvGeometry& g, bool high);

// The convolution of all channels so far and of x, which become channels so far.
void growing_winograd_conv(const Tensor& x, const Tensor& weight, const ConvGeometry& g, int64_t m, GrowingTiles& tiles,
                           const PlanarResult& result);

}  // namespace fastgan
