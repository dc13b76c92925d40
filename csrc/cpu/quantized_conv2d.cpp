// scaled_conv2d in 8 bits: y = epilogue(out_scale * weight_scale * step * conv(q, weight)) with q =
// clamp(round(in_scale * x / step), low, high) and a weight in int8. Sums are exact; what follows is float32.
//
// Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
// Inference", section 2; a zero point is a low that is not -high, so that zero stays zero and padding is none's
// concern.

#include <array>
#include <limits>

#include "conv_choice.h"
#include "empty.h"
#include "epilogue.h"
#include "packed_direct.h"
#include "recorded_calls.h"
#include "winograd.h"
#include "winograd_conv.h"
#include "winograd_plan.h"

namespace fastgan {
namespace {

// What sums are multiplied by, [N or 1, C_out]: factor * weight_scale * out_scale.
Tensor factors_of(const Tensor& weight_scale, const std::optional<Tensor>& out_scale, double factor) {
  const int64_t channels = weight_scale.numel();
  const std::array<int64_t, 2> sizes{out_scale ? out_scale->size(0) : 1, channels}, strides{channels, 1};
  const Tensor result = empty_cpu(sizes.data(), strides.data(), 2, ScalarType::Float);
  const float* const of_weight = weight_scale.const_data_ptr<float>();
  const Scales<float> of_result(out_scale);
  float* const to = result.mutable_data_ptr<float>();
  for (int64_t n = 0; n < sizes[0]; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      to[n * channels + c] = static_cast<float>(factor * of_weight[c]) * of_result.at(n, c);
    }
  }
  return result;
}

// What the sums of a tile's products are too large by.
double weight_factor_of(const Tensor& x, const Tensor& weight, const ConvGeometry& g, int64_t tile) {
  if (!tile) return 1;
  const int64_t r = taps_per_axis(ConvPlan(x, weight, g), weight.size(2)) == 3 ? 3 : 2;
  return static_cast<double>(whole_factors(tile, r).weight_factor);
}

void quantized_conv2d_into(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                           const std::optional<Tensor>& in_scale, const std::optional<Tensor>& out_scale, double step,
                           int64_t low, int64_t high, const std::optional<Tensor>& noise,
                           const std::optional<Tensor>& noise_strength, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& residual, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, const std::vector<int64_t>& output_padding,
                           const std::vector<int64_t>& dilation, bool transposed, int64_t groups, bool reflect,
                           int64_t tile, const std::string& act, double alpha, double gain, std::optional<double> clamp,
                           double residual_gain, const Tensor& out) {
  struct Plan {
    ConvGeometry geometry;
    double weight_factor;
    Act act;
  };
  const auto plan = planned<Plan>(x, weight, [&] {
    const ConvGeometry g{stride, padding, output_padding, dilation, transposed, groups, reflect};
    const Refusal refusal = refused_by_quantized(x, weight, g, tile);
    STD_TORCH_CHECK(!refusal, "quantized_conv2d: it cannot serve this call: ", text_of(refusal));
    return Plan{g, weight_factor_of(x, weight, g, tile), parse_act("quantized_conv2d", act)};
  });
  const auto& [geometry, weight_factor, activation] = *plan;
  STD_TORCH_CHECK(low <= 0 && high >= 0 && low < high && high - low <= 255,
                  "quantized_conv2d: low and high must be at most 255 apart and have 0 between them, got ", low,
                  " and ", high);
  STD_TORCH_CHECK(weight_scale.numel() == weight.size(transposed ? 1 : 0),
                  "quantized_conv2d: weight_scale must have a value for each of ", weight.size(transposed ? 1 : 0),
                  " output channels, got ", weight_scale.numel());
  count_call(tile ? Algorithm::kQuantizedWinograd : Algorithm::kQuantizedDirect);
  const std::optional<Tensor> factor = factors_of(weight_scale, out_scale, step / weight_factor);
  const auto dense_residual = residual ? std::optional(in_layout(*residual, false)) : std::nullopt;
  const EpilogueArgs args{factor,       noise,          noise_strength,
                          bias,         dense_residual, activation,
                          alpha,        gain,           clamp.value_or(std::numeric_limits<double>::infinity()),
                          residual_gain};
  const Quantization quantization{static_cast<float>(1 / step), static_cast<float>(low), static_cast<float>(high)};
  const PlanarResult result(args, out, nullptr);
  const ScaledImage image(x, in_scale);
  if (tile) return quantized_winograd_conv(x, weight, image, geometry, tile, quantization, result);
  quantized_direct_conv(x, weight, image, geometry, quantization, result);
}

// The tiles that can serve a call, one line "tile<TAB>predicted ms" each, the best first.
std::string explain_quantized_conv2d(const Tensor& x, const Tensor& weight, std::vector<int64_t> stride,
                                     std::vector<int64_t> padding, std::vector<int64_t> output_padding,
                                     std::vector<int64_t> dilation, bool transposed, int64_t groups, bool reflect) {
  std::string lines;
  for (const Candidate& c :
       quantized_tiles(x, weight, {stride, padding, output_padding, dilation, transposed, groups, reflect})) {
    lines += std::to_string(c.m) + '\t' + std::to_string(c.predicted_ms) + '\n';
  }
  return lines;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("_quantized_conv2d_into", TORCH_BOX(&Recordable<&quantized_conv2d_into>::call));
  m.impl("_quantized_tiles", TORCH_BOX(&explain_quantized_conv2d));
}

}  // namespace fastgan
