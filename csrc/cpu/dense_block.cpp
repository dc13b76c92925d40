// dense_block: convolutions of 3x3 each of which reads the image and the results of all before it, and a residual, by
// Winograd's filtering over tiles that are transformed once for all of them. Nothing is concatenated. Source: Wang et
// al. 2018 (ESRGAN), figure 4; Huang et al. 2017 (DenseNet).

#include "algorithm.h"
#include "conv_choice.h"
#include "empty.h"
#include "epilogue.h"
#include "large_buffer.h"
#include "recorded_calls.h"
#include "winograd_conv.h"

namespace fastgan {
namespace {

const ConvGeometry kSame{{1, 1}, {1, 1}, {0, 0}, {1, 1}, false, 1};

int64_t dense_block_tile(Tensor x, std::vector<Tensor> weights, std::string precision) {
  return growing_tile(x, weights, kSame, asks_for_high("dense_block", precision));
}

// A contiguous image like x, of so many channels, in memory that somebody else owns.
Tensor image_at(float* data, const Tensor& x, int64_t channels) {
  const int64_t h = x.size(2), w = x.size(3);
  const std::vector<int64_t> sizes{x.size(0), channels, h, w}, strides{channels * h * w, h * w, w, 1};
  return torch::stable::from_blob(data, {sizes.data(), sizes.size()}, {strides.data(), strides.size()}, x.device(),
                                  ScalarType::Float);
}

void run_dense_block(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, Act act,
                     double alpha, double gain, double residual_scale, const std::string& precision,
                     const Tensor& out) {
  const int64_t tile = dense_block_tile(x, weights, precision);
  STD_TORCH_CHECK(tile, "dense_block: this op takes what _dense_block_tile has a tile for");
  const Tensor residual = in_layout(x, false);
  GrowingTiles tiles{.most = weights.back().size(1)};
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  int64_t channels = 0;
  for (size_t i = 0; i + 1 < weights.size(); ++i) channels += weights[i].size(0);
  // Not tensors: what torch asks malloc for, aligned, it does not find again, and the heap grows with every call.
  const LargeBuffer between(channels * pixels);
  float* next = between.get();
  Tensor features = x;
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool last = i + 1 == weights.size();
    const EpilogueArgs args{std::nullopt,
                            std::nullopt,
                            std::nullopt,
                            biases.empty() ? std::nullopt : std::optional(biases[i]),
                            last ? std::optional(residual) : std::nullopt,
                            last ? Act::kLinear : act,
                            alpha,
                            last ? residual_scale : gain,
                            std::numeric_limits<double>::infinity(),
                            1.0};
    const Tensor y = last ? out : image_at(next, x, weights[i].size(0));
    count_call(Algorithm::kWinograd);
    growing_winograd_conv(features, weights[i], kSame, tile, tiles, PlanarResult(args, y, nullptr));
    features = y;
    next += weights[i].size(0) * pixels;
  }
}

Tensor dense_block(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, std::string act, double alpha,
                   double gain, double residual_scale, std::string precision) {
  const Tensor y = empty_dense(x.sizes(), ScalarType::Float, false);
  run_dense_block(x, weights, biases, parse_act("dense_block", act), alpha, gain, residual_scale, precision, y);
  return y;
}

// dense_block of float32 in NCHW, into `out`.
void dense_block_into(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, std::string act, double alpha,
                      double gain, double residual_scale, std::string precision, Tensor out) {
  run_dense_block(x, weights, biases, parse_act("dense_block", act), alpha, gain, residual_scale, precision, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("_dense_block_tile", TORCH_BOX(&dense_block_tile));
  m.impl("dense_block", TORCH_BOX(&dense_block));
  m.impl("_dense_block_into", TORCH_BOX(&Recordable<&dense_block_into>::call));
}

}  // namespace fastgan
