// upfirdn2d on the GPU: torch's tensors for the kernels of upfirdn2d.cuh, which says how they work.
//
// Addresses, factors and the filter's address travel as the kernel's parameter, so a CUDA graph may be captured at any
// call, on any stream.

#include "upfirdn2d.cuh"

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "image.h"

namespace fastgan {

// Compiled in files of their own: all of them together take two minutes for two architectures.
extern template FirKernel fir_kernel_of<__half>(const FirPlan&, bool);
extern template FirKernel fir_kernel_of<__nv_bfloat16>(const FirPlan&, bool);

namespace {

constexpr const char* kOp = "upfirdn2d";

// An uninitialised [n, c, h, w] of x's dtype on its device.
Tensor empty_image(const Tensor& x, const std::array<int64_t, 4>& sizes, bool channels_last) {
  const auto [n, c, h, w] = sizes;
  const std::array<int64_t, 4> strides =
      channels_last ? std::array<int64_t, 4>{h * w * c, 1, w * c, c} : std::array<int64_t, 4>{c * h * w, h * w, w, 1};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), strides.data(),
                                                         static_cast<int32_t>(x.scalar_type()),
                                                         aoti_torch_device_type_cuda(), x.get_device_index(), &handle));
  return Tensor(handle);
}

// before, after: the paddings. Sizes fit into an int with what the kernels add to them.
FirAxis make_axis(int64_t in, int64_t up, int64_t down, int64_t taps, int64_t before, int64_t after) {
  constexpr int64_t kMostPixels = int64_t{1} << 30, kMostFactor = 1 << 24;
  const int64_t out = (in * up + before + after - taps + down) / down;
  STD_TORCH_CHECK(std::max({in, out, taps, before, -before}) < kMostPixels && std::max(up, down) < kMostFactor, kOp,
                  ": the CUDA kernel takes sides, taps and paddings below 2^30 and factors below 2^24, got ", in,
                  " pixels, up ", up, ", down ", down, ", ", taps, " taps, padding ", before, ", ", after);
  FirAxis axis{};
  axis.in = static_cast<int>(in), axis.out = static_cast<int>(out), axis.taps = static_cast<int>(taps);
  axis.up = static_cast<int>(up), axis.down = static_cast<int>(down), axis.pad = static_cast<int>(before);
  return axis;
}

// The activation and its slope below zero, unless it is a curved one.
void set_act(FirParams& p, const std::string& name, double alpha) {
  p.act = parse_act(kOp, name);
  p.slope = p.act == Act::kLrelu ? static_cast<float>(alpha) : 1.0f;
}

const float* floats(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// p has all but the images and how many samples of them a launch takes.
template <typename T>
void launch_fir(FirParams p, const Tensor& x, const std::optional<Tensor>& residual, const Tensor& y,
                bool channels_last) {
  const int64_t samples = x.size(0), in_sample = x.size(1) * x.size(2) * x.size(3);
  const int64_t out_sample = y.size(1) * y.size(2) * y.size(3);
  const int64_t step = fir_samples(samples, y.size(1), y.size(2), y.size(3));
  const float* noise = p.noise;
  for (int64_t first = 0; first < samples; first += step) {
    p.samples = static_cast<int>(std::min(step, samples - first));
    p.x = static_cast<const T*>(x.const_data_ptr()) + first * in_sample;
    p.y = static_cast<T*>(y.mutable_data_ptr()) + first * out_sample;
    p.residual = residual ? static_cast<const T*>(residual->const_data_ptr()) + first * out_sample : nullptr;
    p.noise = noise ? noise + first * p.noise_stride : nullptr;
    const FirPlan plan = plan_fir(p, channels_last, sizeof(T));
    fir_kernel_of<T>(
        plan, channels_last)<<<static_cast<unsigned>(plan.blocks), kFirThreads, plan.shared_bytes, current_stream(x)>>>(
        plan.params);
    check_launch(kOp);
  }
}

// f, noise, noise_strength and bias are contiguous and float32.
Tensor upfirdn2d(const Tensor& x, const std::optional<Tensor>& f, const std::optional<Tensor>& noise,
                 const std::optional<Tensor>& noise_strength, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual, std::vector<int64_t> up, std::vector<int64_t> down,
                 std::vector<int64_t> padding, bool flip_filter, double fir_gain, std::string act, double alpha,
                 double gain, std::optional<double> clamp, double residual_gain) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const bool channels_last = is_channels_last(x);
  FirParams p{};
  const int64_t taps_x = f ? f->size(-1) : 1, taps_y = f ? f->size(0) : 1;
  p.across = make_axis(x.size(3), up[0], down[0], taps_x, padding[0], padding[1]);
  p.along = make_axis(x.size(2), up[1], down[1], taps_y, padding[2], padding[3]);
  Tensor y = empty_image(x, {x.size(0), x.size(1), p.along.out, p.across.out}, channels_last);
  if (x.size(0) == 0) {
    return y;
  }
  const Tensor source = in_layout(x, channels_last);
  const auto dense_residual = residual ? std::optional(in_layout(*residual, channels_last)) : std::nullopt;
  p.f = floats(f), p.noise = floats(noise), p.strength = floats(noise_strength), p.bias = floats(bias);
  p.noise_stride = noise && noise->size(0) > 1 ? y.size(2) * y.size(3) : 0;
  p.channels = static_cast<int>(x.size(1));
  p.filter_stride = f && f->dim() == 2 ? p.across.taps : 0;
  p.flip = flip_filter;
  set_act(p, act, alpha);
  p.fir_gain = static_cast<float>(fir_gain), p.gain = static_cast<float>(gain);
  p.clamp = static_cast<float>(clamp.value_or(std::numeric_limits<double>::infinity()));
  p.residual_gain = static_cast<float>(residual_gain);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      launch_fir<float>(p, source, dense_residual, y, channels_last);
      break;
    case ScalarType::Half:
      launch_fir<__half>(p, source, dense_residual, y, channels_last);
      break;
    case ScalarType::BFloat16:
      launch_fir<__nv_bfloat16>(p, source, dense_residual, y, channels_last);
      break;
    default:
      STD_TORCH_CHECK(false, kOp, ": dtype must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
  return y;
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, m) { m.impl("upfirdn2d_cuda", TORCH_BOX(&fastgan::upfirdn2d)); }
