// scaled_conv2d's 3x3 convolutions of half types on the GPU's tensor cores, those of modulated_conv2d: torch's tensors
// for the kernel of modulated_conv2d.cuh, which says how it works.

#include "modulated_conv2d.cuh"

#include <array>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "launch.h"

namespace fastgan {
namespace {

// The twin op's name, which is what a caller of it knows.
constexpr char kName[] = "scaled_conv2d_cuda";

// A number of the current device.
int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  STD_TORCH_CHECK(
      cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess, kName,
      ": the GPU does not answer");
  return value;
}

// [N, C, H, W] that lies as [N, H, W, C].
Tensor empty_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype) {
  const std::array<int64_t, 4> sizes{n, c, h, w}, strides{h * w * c, 1, w * c, c};
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), strides.data(), static_cast<int32_t>(dtype),
                                                         device, like.get_device_index(), &handle));
  return Tensor(handle);
}

// What the kernel's 16-byte copies need. A view that begins elsewhere is copied once.
Tensor aligned(const Tensor& image, const char* argument) {
  bool fits = image.stride(1) == 1;
  for (const int64_t axis : {0, 2, 3}) {
    fits = fits && (image.size(axis) == 1 || image.stride(axis) % 8 == 0);
  }
  STD_TORCH_CHECK(fits && image.size(1) % 8 == 0, kName, ": ", argument,
                  " must be channels_last with a multiple of 8 channels");
  return reinterpret_cast<uintptr_t>(image.const_data_ptr()) % 16 == 0 ? image : torch::stable::clone(image);
}

const float* address(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// From one sample or channel to the next; 0 where all share one.
int64_t step(const Tensor& tensor, int64_t axis) { return tensor.size(axis) == 1 ? 0 : tensor.stride(axis); }
int64_t step(const std::optional<Tensor>& tensor, int64_t axis) { return tensor ? step(*tensor, axis) : 0; }

void set_activation(ModulatedConv& conv, const std::string& act, double alpha, double gain,
                    std::optional<double> clamp) {
  STD_TORCH_CHECK(act == "linear" || act == "relu" || act == "lrelu", kName,
                  ": act must be linear, relu or lrelu, got ", act);
  conv.relu = act == "relu";
  conv.slope = act == "lrelu" ? static_cast<float>(alpha) : 1;
  conv.gain = static_cast<float>(gain);
  conv.clamp = static_cast<float>(clamp.value_or(std::numeric_limits<double>::infinity()));
}

template <typename T>
void launch_conv(ModulatedConv conv, const Tensor& like) {
  const ConvTileKind kind = plan_conv(conv, device_attribute(cudaDevAttrMultiProcessorCount));
  const int64_t blocks = conv_tiles(conv) * conv.splits;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), kName, ": x has more tiles than a launch, got ", blocks);
  std::optional<Tensor> partial, counters;
  if (conv.splits > 1) {
    partial = torch::stable::new_empty(like, {conv_partial_size(conv, kind)}, ScalarType::Float);
    counters = torch::stable::new_zeros(like, {conv_tiles(conv)}, ScalarType::Int);
    conv.partial = static_cast<float*>(partial->mutable_data_ptr());
    conv.counters = static_cast<unsigned*>(counters->mutable_data_ptr());
  }
  const cudaStream_t stream = current_stream(like);
  with_conv_tile(kind, [&](auto tile) {
    using Tile = decltype(tile);
    modulated_conv_kernel<T, Tile><<<static_cast<unsigned>(blocks), Tile::kThreads, Tile::kSharedBytes, stream>>>(conv);
  });
  check_launch(kName);
}

std::tuple<Tensor, Tensor> modulated_conv2d(const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& in_scale,
                                            const std::optional<Tensor>& out_scale, const std::optional<Tensor>& noise,
                                            const std::optional<Tensor>& noise_strength,
                                            const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                            std::vector<int64_t> stride, std::vector<int64_t> padding,
                                            std::vector<int64_t> output_padding, std::vector<int64_t> dilation,
                                            bool transposed, int64_t groups, std::string precision, std::string act,
                                            double alpha, double gain, std::optional<double> clamp,
                                            double residual_gain, bool save_conv) {
  const std::vector<int64_t> ones{1, 1};
  // Precision is about float32 alone, output_padding about transposed convolutions, residual_gain about a residual.
  static_cast<void>(precision), static_cast<void>(output_padding), static_cast<void>(residual_gain);
  STD_TORCH_CHECK(stride == ones && padding == ones && dilation == ones && !transposed && groups == 1 && !residual &&
                      weight.size(2) == 3 && weight.size(3) == 3,
                  kName, ": it computes 3x3 convolutions of stride 1 and padding 1 without groups or a residual");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8, kName,
                  ": it needs a GPU of compute capability 8.0 or later");
  const int64_t n = x.size(0), c_out = weight.size(0), height = x.size(2), width = x.size(3);
  STD_TORCH_CHECK(c_out % 8 == 0, kName, ": weight must have a multiple of 8 output channels, got ", c_out);
  const ScalarType dtype = x.scalar_type();
  const Tensor y = empty_channels_last(x, n, c_out, height, width, dtype);
  const Tensor product = save_conv ? empty_channels_last(x, n, c_out, height, width, ScalarType::Float)
                                   : torch::stable::new_empty(x, {0}, ScalarType::Float);
  if (n == 0) {
    return {y, product};
  }
  const Tensor image = aligned(x, "x"), filters = aligned(weight, "weight");
  ModulatedConv conv{};
  conv.x = image.const_data_ptr(), conv.weight = filters.const_data_ptr();
  conv.x_n = step(image, 0), conv.x_h = step(image, 2), conv.x_w = step(image, 3);
  conv.weight_o = step(filters, 0), conv.weight_h = filters.stride(2), conv.weight_w = filters.stride(3);
  conv.in_scale = address(in_scale), conv.in_scale_n = step(in_scale, 0), conv.in_scale_c = step(in_scale, 1);
  conv.out_scale = address(out_scale), conv.out_scale_n = step(out_scale, 0), conv.out_scale_c = step(out_scale, 1);
  conv.noise = address(noise), conv.noise_n = step(noise, 0);
  conv.strength = address(noise_strength), conv.bias = address(bias);
  conv.y = y.mutable_data_ptr();
  conv.product = save_conv ? static_cast<float*>(product.mutable_data_ptr()) : nullptr;
  conv.samples = static_cast<int>(n), conv.c_in = static_cast<int>(x.size(1)), conv.c_out = static_cast<int>(c_out);
  conv.height = static_cast<int>(height), conv.width = static_cast<int>(width);
  set_activation(conv, act, alpha, gain, clamp);
  STD_TORCH_CHECK(weight.scalar_type() == dtype && (dtype == ScalarType::Half || dtype == ScalarType::BFloat16), kName,
                  ": x and weight must be float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  dtype == ScalarType::Half ? launch_conv<__half>(conv, x) : launch_conv<__nv_bfloat16>(conv, x);
  return {y, product};
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, m) { m.impl("scaled_conv2d_cuda", TORCH_BOX(&fastgan::modulated_conv2d)); }
