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

// How x lies as bytes; nothing where it cannot be handed on so: of several samples, of channels that fill no group, or
// where some pixel of it is never read.
ByteLayout byte_layout_of(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (g.reflect || refused_by_quantized(x, weight, g, 0)) return {};
  const ByteLayout l = byte_layout(x, weight, g);
  const bool whole = l.top >= 0 && l.left >= 0 && l.top + x.size(2) <= l.rows && l.left + x.size(3) <= l.columns;
  return whole && x.size(0) == 1 && x.size(1) == l.depth ? l : ByteLayout{};
}

// What the sums of a tile's products are too large by.
double weight_factor_of(const Tensor& x, const Tensor& weight, const ConvGeometry& g, int64_t tile) {
  if (!tile) return 1;
  const int64_t r = taps_per_axis(ConvPlan(x, weight, g), weight.size(2)) == 3 ? 3 : 2;
  return static_cast<double>(whole_factors(tile, r).weight_factor);
}

// Where results of one sample go as bytes: an image [C, H, W] of bytes, channels side by side, for each rounding.
std::vector<ByteImage> byte_images(const std::vector<Tensor>& images, const std::vector<double>& steps,
                                   const std::vector<int64_t>& lows, const std::vector<int64_t>& highs,
                                   const Tensor& result) {
  const size_t count = images.size();
  STD_TORCH_CHECK(steps.size() == count && lows.size() == count && highs.size() == count,
                  "quantized_conv2d: byte_images must have a step, a low and a high each, got ", count, " of them and ",
                  steps.size(), ", ", lows.size(), " and ", highs.size());
  std::vector<ByteImage> found;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& image = images[i];
    STD_TORCH_CHECK(image.scalar_type() == ScalarType::Byte && image.dim() == 3 && image.stride(0) == 1 &&
                        image.size(0) == result.size(1) && image.size(1) == result.size(2) &&
                        image.size(2) == result.size(3) && image.size(0) % kGroup == 0 && result.size(0) == 1,
                    "quantized_conv2d: byte_images must be uint8 [C, H, W] of one sample's result with channels side "
                    "by side, ",
                    kGroup, " at a time");
    found.push_back({static_cast<uint8_t*>(image.mutable_data_ptr()),
                     image.stride(1),
                     image.stride(2),
                     {static_cast<float>(1 / steps[i]), static_cast<float>(lows[i]), static_cast<float>(highs[i])}});
  }
  return found;
}

// x's bytes as quantized_direct_conv reads them, or null.
uint8_t* bytes_of(const std::optional<Tensor>& bytes, const ByteLayout& layout) {
  if (!bytes) return nullptr;
  STD_TORCH_CHECK(bytes->scalar_type() == ScalarType::Byte && bytes->is_contiguous() && bytes->dim() == 3 &&
                      bytes->size(0) == layout.rows && bytes->size(1) == layout.columns &&
                      bytes->size(2) == layout.depth && layout.depth > 0,
                  "quantized_conv2d: x_bytes must be uint8, contiguous, as _byte_layout has it");
  return static_cast<uint8_t*>(bytes->mutable_data_ptr());
}

void quantized_conv2d_into(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                           const std::optional<Tensor>& in_scale, const std::optional<Tensor>& out_scale, double step,
                           int64_t low, int64_t high, const std::optional<Tensor>& noise,
                           const std::optional<Tensor>& noise_strength, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& residual, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, const std::vector<int64_t>& output_padding,
                           const std::vector<int64_t>& dilation, bool transposed, int64_t groups, bool reflect,
                           int64_t tile, const std::string& act, double alpha, double gain, std::optional<double> clamp,
                           double residual_gain, const std::optional<Tensor>& x_bytes,
                           const std::vector<Tensor>& images, const std::vector<double>& steps,
                           const std::vector<int64_t>& lows, const std::vector<int64_t>& highs, const Tensor& out) {
  struct Plan {
    ConvGeometry geometry;
    double weight_factor;
    Act act;
    ByteLayout x_bytes;
  };
  const auto plan = planned<Plan>(x, weight, [&] {
    const ConvGeometry g{stride, padding, output_padding, dilation, transposed, groups, reflect};
    const Refusal refusal = refused_by_quantized(x, weight, g, tile);
    STD_TORCH_CHECK(!refusal, "quantized_conv2d: it cannot serve this call: ", text_of(refusal));
    return Plan{g, weight_factor_of(x, weight, g, tile), parse_act("quantized_conv2d", act),
                x_bytes ? byte_layout_of(x, weight, g) : ByteLayout{}};
  });
  const auto& [geometry, weight_factor, activation, layout] = *plan;
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
  if (!tile) {
    const std::vector<ByteImage> results = byte_images(images, steps, lows, highs, out);
    STD_TORCH_CHECK(results.empty() || !(noise || residual), "quantized_conv2d: byte_images take no noise or residual");
    return quantized_direct_conv(x, weight, image, bytes_of(x_bytes, layout), geometry, quantization, result, results);
  }
  STD_TORCH_CHECK(!x_bytes && images.empty(), "quantized_conv2d: with tiles it reads and writes floats");
  quantized_winograd_conv(x, weight, image, geometry, tile, quantization, result);
}

// Rows, columns and depth of x_bytes, and the row and the column of x's first pixel; zeros where there can be none.
std::vector<int64_t> tell_byte_layout(const Tensor& x, const Tensor& weight, std::vector<int64_t> stride,
                                      std::vector<int64_t> padding, std::vector<int64_t> output_padding,
                                      std::vector<int64_t> dilation, bool transposed, int64_t groups, bool reflect) {
  const ByteLayout l =
      byte_layout_of(x, weight, {stride, padding, output_padding, dilation, transposed, groups, reflect});
  return {l.rows, l.columns, l.depth, l.top, l.left};
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
  m.impl("_byte_layout", TORCH_BOX(&tell_byte_layout));
}

}  // namespace fastgan
