// scaled_conv2d: y = clamp(gain * act(out_scale * conv(in_scale * x, w) + noise * strength + bias)) + residual_gain *
// residual.
//
// The dense product goes through torch's convolution, at few pixels through few_pixels.h; in_scale is applied in one
// pass over x, everything that follows in one pass over the product, block by block in the first-level cache. Half
// types are computed in float and rounded once, at the end: an unscaled product never exists in half precision. Source:
// Karras et al. 2020 (StyleGAN2), section 2.2, for scaling activations instead of weights.

#include <array>
#include <limits>

#include "activation.h"
#include "convert.h"
#include "few_pixels.h"
#include "image.h"

namespace fastgan {
namespace {

// One block of the epilogue: scale and shift are constants of the block (kPerElement false) or vectors along it.
template <typename C>
struct EpilogueBlock {
  const C* c;
  C* y;
  int64_t n;
  const C* scale;
  const C* shift;
  const C* noise;  // already multiplied by its strength; null for none
  Act act;
  C alpha, gain, clamp;
};

template <Act A, bool kPerElement, bool kNoise, typename C>
FASTGAN_INLINE void epilogue_loop(const EpilogueBlock<C>& b) {
  // Copies: a store through y could otherwise change what b refers to, and every value would be loaded again.
  const C *const c = b.c, *const scale = b.scale, *const shift = b.shift, *const noise = b.noise;
  C* const y = b.y;
  const C alpha = b.alpha, gain = b.gain, clamp = b.clamp, scale0 = scale[0], shift0 = shift[0];
  const int64_t n = b.n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    C z = c[i] * (kPerElement ? scale[i] : scale0) + (kPerElement ? shift[i] : shift0);
    if constexpr (kNoise) z += noise[i];
    const C v = act_value<A>(z, alpha) * gain;
    // In this form, and not with min and max, a NaN passes.
    y[i] = v > clamp ? clamp : (v < -clamp ? -clamp : v);
  }
}

template <typename C>
FASTGAN_INLINE void epilogue_any(const EpilogueBlock<C>& b, bool per_element) {
  dispatch_act(b.act, [&]<Act A>() FASTGAN_LAMBDA_INLINE {
    if (per_element) {
      epilogue_loop<A, true, false>(b);
    } else if (b.noise) {
      epilogue_loop<A, false, true>(b);
    } else {
      epilogue_loop<A, false, false>(b);
    }
  });
}

FASTGAN_MULTIVERSION void epilogue_block(const EpilogueBlock<float>& b, bool per_element) {
  epilogue_any(b, per_element);
}
void epilogue_block(const EpilogueBlock<double>& b, bool per_element) { epilogue_any(b, per_element); }

template <typename C>
FASTGAN_INLINE void axpy_loop(C a, const C* __restrict__ x, C* __restrict__ y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}
FASTGAN_MULTIVERSION void axpy(float a, const float* x, float* y, int64_t n) { axpy_loop(a, x, y, n); }
void axpy(double a, const double* x, double* y, int64_t n) { axpy_loop(a, x, y, n); }

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

// Per-channel values laid along one block of an image: entry i is the value of element i's channel.
template <typename C>
struct ChannelRow {
  std::vector<C> values;
  int64_t sample = -1;

  // Fills the row with f(channel) for the longest block of a sample; a planar block needs its first entry only.
  template <typename F>
  void fill(const ImageBlocks& blocks, const ImageBlocks::Block& b, F&& f) {
    if (blocks.planar) {
      values.resize(1);
      values[0] = f(b.channel);
    } else if (sample != b.sample || static_cast<int64_t>(values.size()) < b.size) {
      values.resize(b.size);
      for (int64_t i = 0; i < b.size; ++i) values[i] = i < blocks.c ? f(i) : values[i - blocks.c];
      sample = b.sample;
    }
  }
};

// in_scale * x in the compute type, dense in x's own layout; x itself where there is nothing to do.
Tensor scaled_input(const Tensor& x, const std::optional<Tensor>& in_scale) {
  const ScalarType dtype = x.scalar_type();
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  if (!in_scale && !half) return x;
  const bool channels_last = is_channels_last(x);
  const Tensor source = in_layout(x, channels_last);
  Tensor out = empty_image(x, half ? ScalarType::Float : dtype, channels_last);
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

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const ConvGeometry& g) {
  if (const auto y = convolve_few_pixels(x, weight, bias, g)) return *y;
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{from(x),         from(weight),     from(bias),         from(g.stride),
                                    from(g.padding), from(g.dilation), from(g.transposed), from(g.output_padding),
                                    from(g.groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct EpilogueArgs {
  const std::optional<Tensor>&out_scale, &noise, &noise_strength, &bias, &residual;
  Act act;
  double alpha, gain, clamp, residual_gain;
};

template <typename T>
void run_epilogue(const Tensor& c, const Tensor& y, bool channels_last, const EpilogueArgs& e) {
  using C = accumulate_t<T>;
  const ImageBlocks blocks(c, channels_last);
  const Scales<C> scales(e.out_scale);
  const C* const bias = e.bias ? e.bias->const_data_ptr<C>() : nullptr;
  const C* const noise = e.noise ? e.noise->const_data_ptr<C>() : nullptr;
  const int64_t noise_stride = e.noise && e.noise->size(0) > 1 ? blocks.pixels : 0;
  const C strength = e.noise_strength ? *e.noise_strength->const_data_ptr<C>() : C(1);
  const T* const residual = e.residual ? e.residual->const_data_ptr<T>() : nullptr;
  const C* const from = c.const_data_ptr<C>();
  T* const to = y.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, blocks.count(), blocks.grain(), [&](int64_t begin, int64_t end) {
    const int64_t longest = std::max(kBlock, blocks.c);
    std::vector<C> noise_row(noise ? longest : 0), out_buffer(sizeof(T) == 2 ? longest : 0);
    std::vector<C> residual_buffer(residual && sizeof(T) == 2 ? longest : 0);
    ChannelRow<C> scale, shift, noisy_shift;
    for (int64_t i = begin; i < end; ++i) {
      const auto b = blocks.at(i);
      scale.fill(blocks, b, [&](int64_t channel) { return scales.at(b.sample, channel); });
      shift.fill(blocks, b, [&](int64_t channel) { return bias ? bias[channel] : C(0); });
      C* const out = result_buffer(to + b.offset, out_buffer.data());
      EpilogueBlock<C> block{from + b.offset, out,   b.size,     scale.values.data(), shift.values.data(),
                             nullptr,         e.act, C(e.alpha), C(e.gain),           C(e.clamp)};
      if (noise) {
        const C* const pixels = noise + b.sample * noise_stride + b.pixel;
        if (blocks.planar) {
          for (int64_t p = 0; p < b.pixels; ++p) noise_row[p] = strength * pixels[p];
          block.noise = noise_row.data();
        } else {
          for (int64_t p = 0; p < b.pixels; ++p) {
            for (int64_t channel = 0; channel < blocks.c; ++channel) {
              noise_row[p * blocks.c + channel] = shift.values[channel] + strength * pixels[p];
            }
          }
          block.shift = noise_row.data();
        }
      }
      epilogue_block(block, !blocks.planar);
      if (residual)
        axpy(C(e.residual_gain), as_compute(residual + b.offset, b.size, residual_buffer.data()), out, b.size);
      flush(out, to + b.offset, b.size);
    }
  });
}

std::tuple<Tensor, Tensor> scaled_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& in_scale,
                                         const std::optional<Tensor>& out_scale, const std::optional<Tensor>& noise,
                                         const std::optional<Tensor>& noise_strength, const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& residual, std::vector<int64_t> stride,
                                         std::vector<int64_t> padding, std::vector<int64_t> output_padding,
                                         std::vector<int64_t> dilation, bool transposed, int64_t groups,
                                         std::string act_name, double alpha, double gain, std::optional<double> clamp,
                                         double residual_gain, bool save_conv) {
  const Act act = parse_act("scaled_conv2d", act_name);
  const ScalarType dtype = x.scalar_type();
  const ConvGeometry geometry{stride, padding, output_padding, dilation, transposed, groups};
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  const bool only_bias =
      act == Act::kLinear && gain == 1.0 && !clamp && !out_scale && !noise && !residual && !half && !save_conv;
  // A bias alone rides along in torch's convolution: no pass of ours is the cheapest pass.
  Tensor c = convolution(scaled_input(x, in_scale), scaled_input(weight, std::nullopt), only_bias ? bias : std::nullopt,
                         geometry);
  const Tensor nothing = torch::stable::new_empty(c, {0});
  if (only_bias) return {c, nothing};

  if (!is_dense(c)) c = in_layout(c, false);
  const bool channels_last = is_channels_last(c);
  const Tensor y = half || save_conv ? empty_image(c, dtype, channels_last) : c;
  const auto dense_residual = residual ? std::optional(in_layout(*residual, channels_last)) : std::nullopt;
  const EpilogueArgs args{out_scale,    noise,          noise_strength,
                          bias,         dense_residual, act,
                          alpha,        gain,           clamp.value_or(std::numeric_limits<double>::infinity()),
                          residual_gain};
  dispatch_dtype("scaled_conv2d", dtype, [&]<typename T>() { run_epilogue<T>(c, y, channels_last, args); });
  return {y, save_conv ? c : nothing};
}

Tensor scaled_conv2d_weight_grad(const Tensor& x, const Tensor& g, const std::optional<Tensor>& in_scale,
                                 const std::optional<Tensor>& g_scale, std::vector<int64_t> weight_size,
                                 std::vector<int64_t> stride, std::vector<int64_t> padding,
                                 std::vector<int64_t> dilation, int64_t groups) {
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
}

}  // namespace fastgan
