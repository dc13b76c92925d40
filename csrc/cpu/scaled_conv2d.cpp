// scaled_conv2d: y = clamp(gain * act(out_scale * conv(in_scale * x, w) + noise * strength + bias)) + residual_gain *
// residual.
//
// The dense product and the weight's gradient are products of our own where those are the fastest, with scales and
// epilogue inside them. Elsewhere they go through torch's convolution: in_scale is applied in one pass over x,
// everything that follows in one pass over the product, block by block in the first-level cache. Half types are
// computed in float and rounded once, at the end: an unscaled product never exists in half precision. Source: Karras et
// al. 2020 (StyleGAN2), section 2.2, for scaling activations instead of weights.

#include <array>
#include <limits>

#include "bf16.h"
#include "conv_choice.h"
#include "convert.h"
#include "direct_conv.h"
#include "direct_weight_grad.h"
#include "epilogue.h"
#include "few_outputs.h"
#include "few_pixels.h"
#include "image.h"
#include "packed_direct.h"
#include "recorded_calls.h"
#include "unfolded_conv.h"
#include "winograd_conv.h"

namespace fastgan {
namespace {

template <typename C>
FASTGAN_INLINE void multiply_loop(const C* x, const C* scale, bool per_element, C* y, int64_t n) {
  const C constant = scale[0];
  if (per_element) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * scale[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * constant;
  }
}
FASTGAN_MULTIVERSION void multiply(const float* x, const float* scale, bool per_element, float* y, int64_t n) {
  multiply_loop(x, scale, per_element, y, n);
}
void multiply(const double* x, const double* scale, bool per_element, double* y, int64_t n) {
  multiply_loop(x, scale, per_element, y, n);
}

bool is_half(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half; }

// What scaled_input returns for a scale or a half type, its values not yet there.
Tensor empty_input(const Tensor& x) {
  return empty_image(x, is_half(x) ? ScalarType::Float : x.scalar_type(), is_channels_last(x));
}

// in_scale * x in the compute type, dense in x's own layout; x itself where there is nothing to do.
Tensor scaled_input(const Tensor& x, const std::optional<Tensor>& in_scale) {
  if (!in_scale && !is_half(x)) return x;
  const ScalarType dtype = x.scalar_type();
  const bool channels_last = is_channels_last(x);
  const Tensor source = in_layout(x, channels_last);
  Tensor out = empty_input(x);
  const ImageBlocks blocks(x, channels_last);
  dispatch_dtype("scaled_conv2d", dtype, [&]<typename T>() {
    using C = accumulate_t<T>;
    const Scales<C> scales(in_scale);
    const T* const from = source.const_data_ptr<T>();
    C* const to = out.mutable_data_ptr<C>();
    torch::stable::parallel_for(0, blocks.count(), blocks.grain(), [&](int64_t begin, int64_t end) {
      ChannelRow<C> row;
      std::vector<C> buffer(sizeof(T) == 2 ? std::max(kBlock, blocks.c) : 0);
      for (int64_t i = begin; i < end; ++i) {
        const auto b = blocks.at(i);
        row.fill(blocks, b, [&](int64_t channel) { return scales.at(b.sample, channel); });
        multiply(as_compute(from + b.offset, b.size, buffer.data()), row.values.data(), !blocks.planar, to + b.offset,
                 b.size);
      }
    });
  });
  return out;
}

// relu(in_scale * x), of float32 in NCHW.
Tensor rectified_input(const Tensor& x, const std::optional<Tensor>& in_scale) {
  const Tensor out = empty_image(x, ScalarType::Float, false);
  const std::optional<Tensor> none;
  constexpr double kNoClamp = std::numeric_limits<double>::infinity();
  run_epilogue<float>(in_layout(x, false), out, false,
                      {in_scale, none, none, none, none, Act::kRelu, 0.0, 1.0, kNoClamp, 1.0});
  return out;
}

// The dense product by torch's convolution, or at very few pixels by few_pixels.h.
Tensor convolution(Algorithm algorithm, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const ConvGeometry& g, Storage storage) {
  if (algorithm == Algorithm::kFewPixels) return convolve_few_pixels(x, weight, bias, g, storage);
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{from(x),         from(weight),     from(bias),         from(g.stride),
                                    from(g.padding), from(g.dilation), from(g.transposed), from(g.output_padding),
                                    from(g.groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

bool is_fused(Algorithm algorithm) { return algorithm != Algorithm::kFewPixels && algorithm != Algorithm::kTorch; }

// The whole op by products of our own, into y and `saved`, if any: scales and epilogue happen inside them.
void fused_products(const ConvChoice& choice, const Tensor& x, const Tensor& weight, const ScaledImage& image,
                    const ConvGeometry& g, Storage storage, const EpilogueArgs& args, const Tensor& y, float* saved,
                    bool y_grouped) {
  const auto residual = args.residual ? std::optional(in_layout(*args.residual, false)) : std::nullopt;
  const EpilogueArgs dense = args.with_residual(residual);
  const PlanarResult result(dense, y, saved, y_grouped);
  if (choice.algorithm == Algorithm::kPackedDirect) {
    packed_direct_conv(x, weight, image, g, storage, result);
  } else if (choice.algorithm == Algorithm::kUnfolded) {
    unfolded_conv(x, weight, image, g, result);
  } else if (choice.algorithm == Algorithm::kWinograd) {
    winograd_conv(x, weight, image, g, choice.tile, storage, result);
  } else {
    direct_conv(x, weight, image, g, result);
  }
}

std::vector<int64_t> result_sizes(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  return {x.size(0), weight.size(g.transposed ? 1 : 0), result_size(x, weight, g, 0), result_size(x, weight, g, 1)};
}

std::tuple<Tensor, Tensor> scaled_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& in_scale,
                                         const std::optional<Tensor>& out_scale, const std::optional<Tensor>& noise,
                                         const std::optional<Tensor>& noise_strength, const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& residual, std::vector<int64_t> stride,
                                         std::vector<int64_t> padding, std::vector<int64_t> output_padding,
                                         std::vector<int64_t> dilation, bool transposed, int64_t groups,
                                         std::string precision, std::string act_name, double alpha, double gain,
                                         std::optional<double> clamp, double residual_gain, bool save_conv) {
  const Act act = parse_act("scaled_conv2d", act_name);
  const ScalarType dtype = x.scalar_type();
  const ConvGeometry geometry{stride, padding, output_padding, dilation, transposed, groups};
  const bool half = is_half(x);
  // A bias alone rides along in torch's convolution: no pass of ours is the cheapest pass.
  const bool only_bias =
      act == Act::kLinear && gain == 1.0 && !clamp && !out_scale && !noise && !residual && !half && !save_conv;
  const std::optional<Tensor> riding = only_bias ? bias : std::nullopt;
  const Tensor wide_x = half ? scaled_input(x, in_scale) : x, wide_weight = scaled_input(weight, std::nullopt);
  const ConvChoice choice = choose_convolution(wide_x, wide_weight, riding, geometry, half,
                                               asks_for_high("scaled_conv2d", precision), nullptr);
  count_call(choice.algorithm);
  const EpilogueArgs args{out_scale,    noise,    noise_strength,
                          bias,         residual, act,
                          alpha,        gain,     clamp.value_or(std::numeric_limits<double>::infinity()),
                          residual_gain};
  if (is_fused(choice.algorithm)) {
    const std::vector<int64_t> size = result_sizes(x, weight, geometry);
    const Tensor y = empty_dense({size.data(), size.size()}, ScalarType::Float, false),
                 c = save_conv ? empty_dense({size.data(), size.size()}, ScalarType::Float, false)
                               : torch::stable::new_empty(x, {0});
    fused_products(choice, x, weight, {x, in_scale}, geometry, Storage::kFloat, args, y,
                   save_conv ? c.mutable_data_ptr<float>() : nullptr, false);
    return {y, c};
  }
  Tensor c = convolution(choice.algorithm, half ? wide_x : scaled_input(x, in_scale), wide_weight, riding, geometry,
                         Storage::kFloat);
  const Tensor nothing = torch::stable::new_empty(c, {0});
  if (only_bias) return {c, nothing};

  if (!is_dense(c)) c = in_layout(c, false);
  const bool channels_last = is_channels_last(c);
  const Tensor y = half || save_conv ? empty_image(c, dtype, channels_last) : c;
  const auto dense_residual = residual ? std::optional(in_layout(*residual, channels_last)) : std::nullopt;
  dispatch_dtype("scaled_conv2d", dtype,
                 [&]<typename T>() { run_epilogue<T>(c, y, channels_last, args.with_residual(dense_residual)); });
  return {y, save_conv ? c : nothing};
}

Storage parse_storage(const std::string& name) {
  STD_TORCH_CHECK(name == "fp32" || name == "bf16", "scaled_conv2d: storage must be one of fp32, bf16, got '", name,
                  "'");
  return name == "bf16" ? Storage::kBfloat16 : Storage::kFloat;
}

// Which images of a call that an algorithm serves may be grouped (image.h): x, y.
std::pair<bool, bool> takes_grouped(Algorithm algorithm, const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  const bool whole_x = x.size(1) % kGroup == 0, whole_y = weight.size(g.transposed ? 1 : 0) % kGroup == 0;
  if (algorithm == Algorithm::kDirect) return {whole_x && few_outputs_takes(x, weight, g), false};
  const bool takes = algorithm == Algorithm::kPackedDirect || algorithm == Algorithm::kWinograd;
  return {takes && whole_x, takes && whole_y};
}

// The same for Python, of a call with an epilogue without a residual.
std::vector<int64_t> grouped_images(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                                    const std::vector<int64_t>& padding, const std::vector<int64_t>& output_padding,
                                    const std::vector<int64_t>& dilation, bool transposed, int64_t groups, bool reflect,
                                    const std::string& algorithm, int64_t tile) {
  const ConvGeometry g{stride, padding, output_padding, dilation, transposed, groups, reflect};
  const auto [x_too, y_too] = takes_grouped(chosen_convolution(x, weight, g, algorithm, tile).algorithm, x, weight, g);
  return {x_too, y_too};
}

// scaled_conv2d of float32 in NCHW, or of grouped images, by the algorithm that is asked for, into `out`; with
// `rectify`, of relu(in_scale * x). `storage` is that of few pixels' weights, Winograd's and packed ones; the other
// algorithms read the weight as it is.
void scaled_conv2d_into(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& in_scale,
                        const std::optional<Tensor>& out_scale, const std::optional<Tensor>& noise,
                        const std::optional<Tensor>& noise_strength, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& output_padding,
                        const std::vector<int64_t>& dilation, bool transposed, int64_t groups, bool reflect,
                        bool rectify, const std::string& algorithm, int64_t tile, const std::string& storage_name,
                        const std::string& act, double alpha, double gain, std::optional<double> clamp,
                        double residual_gain, const Tensor& out, bool x_grouped, bool y_grouped) {
  struct Plan {
    ConvGeometry geometry;
    ConvChoice choice;
    Storage storage;
    Act act;
  };
  const auto plan = planned<Plan>(x, weight, [&] {
    const ConvGeometry g{stride, padding, output_padding, dilation, transposed, groups, reflect};
    return Plan{g, chosen_convolution(x, weight, g, algorithm, tile), parse_storage(storage_name),
                parse_act("scaled_conv2d", act)};
  });
  const auto& [geometry, choice, storage, activation] = *plan;
  const auto [x_may, y_may] = takes_grouped(choice.algorithm, x, weight, geometry);
  STD_TORCH_CHECK((x_may || !x_grouped) && ((y_may && !residual) || !y_grouped), "_scaled_conv2d_into: by ", algorithm,
                  " there are no grouped images here, or none with a residual");
  count_call(choice.algorithm);
  const EpilogueArgs args{out_scale,    noise,    noise_strength,
                          bias,         residual, activation,
                          alpha,        gain,     clamp.value_or(std::numeric_limits<double>::infinity()),
                          residual_gain};
  if (is_fused(choice.algorithm)) {
    fused_products(choice, x, weight, {x, in_scale, rectify, x_grouped}, geometry, storage, args, out, nullptr,
                   y_grouped);
    return;
  }
  const Tensor input = rectify ? rectified_input(x, in_scale) : scaled_input(x, in_scale);
  const Tensor c = in_layout(convolution(choice.algorithm, input, weight, std::nullopt, geometry, storage), false);
  const auto dense_residual = residual ? std::optional(in_layout(*residual, false)) : std::nullopt;
  run_epilogue<float>(c, out, false, args.with_residual(dense_residual));
}

// An epilogue alone, of a float32 image in NCHW, into `out`.
void epilogue_into(const Tensor& x, const std::optional<Tensor>& out_scale, const std::optional<Tensor>& noise,
                   const std::optional<Tensor>& noise_strength, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, std::string act, double alpha, double gain,
                   std::optional<double> clamp, double residual_gain, const Tensor& out) {
  const auto dense_residual = residual ? std::optional(in_layout(*residual, false)) : std::nullopt;
  run_epilogue<float>(in_layout(x, false), out, false,
                      {out_scale, noise, noise_strength, bias, dense_residual, parse_act("epilogue", act), alpha, gain,
                       clamp.value_or(std::numeric_limits<double>::infinity()), residual_gain});
}

// What scaled_conv2d would choose for these tensors, as conv_choice.h's `tell` says it; nothing is computed.
std::string explain_scaled_conv2d(const Tensor& x, const Tensor& weight, std::vector<int64_t> stride,
                                  std::vector<int64_t> padding, std::vector<int64_t> output_padding,
                                  std::vector<int64_t> dilation, bool transposed, int64_t groups,
                                  std::string precision) {
  const bool half = is_half(x);
  Candidates told;
  const ConvChoice choice =
      choose_convolution(half ? empty_input(x) : x, half ? empty_input(weight) : weight, std::nullopt,
                         {stride, padding, output_padding, dilation, transposed, groups}, half,
                         asks_for_high("scaled_conv2d", precision), &told);
  return tell(choice, told);
}

// Each algorithm that can serve a float32 call, in one line "name<TAB>tile<TAB>predicted ms, 0 for unknown"; the one
// that the call would choose comes first.
std::string convolution_candidates(const Tensor& x, const Tensor& weight, std::vector<int64_t> stride,
                                   std::vector<int64_t> padding, std::vector<int64_t> output_padding,
                                   std::vector<int64_t> dilation, bool transposed, int64_t groups, bool reflect,
                                   std::string precision) {
  return tell_candidates(x, weight, {stride, padding, output_padding, dilation, transposed, groups, reflect},
                         asks_for_high("scaled_conv2d", precision));
}

Tensor scaled_conv2d_weight_grad(const Tensor& x, const Tensor& g, const std::optional<Tensor>& in_scale,
                                 const std::optional<Tensor>& g_scale, std::vector<int64_t> weight_size,
                                 std::vector<int64_t> stride, std::vector<int64_t> padding,
                                 std::vector<int64_t> dilation, int64_t groups, std::string precision) {
  asks_for_high("scaled_conv2d_weight_grad", precision);  // Its tiles are small enough for high too.
  if (const auto grad = direct_weight_grad(x, g, in_scale, g_scale, weight_size,
                                           {stride, padding, {0, 0}, dilation, false, groups})) {
    return *grad;
  }
  count_call(Algorithm::kTorchWeightGrad);
  using torch::stable::detail::from;
  const Tensor wide_x = scaled_input(x, in_scale), wide_g = scaled_input(g, g_scale);
  // torch asks for the weight but reads its sizes only.
  const Tensor shape_of_weight = torch::stable::new_empty(wide_x, weight_size);
  constexpr std::array<bool, 3> kWeightOnly{false, true, false};
  std::array<StableIValue, 11> stack{from(wide_g),
                                     from(wide_x),
                                     from(shape_of_weight),
                                     from(std::optional<std::vector<int64_t>>()),
                                     from(stride),
                                     from(padding),
                                     from(dilation),
                                     from(false),
                                     from(std::vector<int64_t>{0, 0}),
                                     from(groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(kWeightOnly.data(), 3))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  using torch::stable::detail::to;
  // The stack owns all three results: taking them off it frees the two that were not asked for.
  const std::array<Tensor, 3> results{to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  return results[1];
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("scaled_conv2d", TORCH_BOX(&scaled_conv2d));
  m.impl("scaled_conv2d_weight_grad", TORCH_BOX(&scaled_conv2d_weight_grad));
  m.impl("_explain_scaled_conv2d", TORCH_BOX(&explain_scaled_conv2d));
  m.impl("_scaled_conv2d_into", TORCH_BOX(&Recordable<&scaled_conv2d_into>::call));
  m.impl("_epilogue_into", TORCH_BOX(&Recordable<&epilogue_into>::call));
  m.impl("_grouped_images", TORCH_BOX(&grouped_images));
  m.impl("_convolution_candidates", TORCH_BOX(&convolution_candidates));
}

}  // namespace fastgan
