// norm_act on the GPU: torch's tensors for the kernels of norm_act.cuh, which says how they work.

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "image.h"
#include "norm_act_launch.h"

namespace fastgan {
namespace {

using OptionalTensor = std::optional<Tensor>;

NormCall make_call(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, bool batch, bool fixed,
                   double eps, const std::string& act, double alpha, double gain) {
  NormCall call{};
  const auto of_samples = [](const OptionalTensor& t) { return t && t->dim() == 2 ? t->size(1) : 0; };
  call.x = x.const_data_ptr();
  call.weight = weight ? static_cast<const float*>(weight->const_data_ptr()) : nullptr;
  call.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  call.weight_stride = of_samples(weight), call.bias_stride = of_samples(bias);
  call.samples = x.size(0), call.channels = x.size(1), call.pixels = x.size(2) * x.size(3);
  call.batch = batch, call.fixed = fixed;
  call.act = parse_act("norm_act", act);
  call.alpha = static_cast<float>(alpha), call.gain = static_cast<float>(gain), call.eps = static_cast<float>(eps);
  return call;
}

// Doubles that live until the launches are made; then torch's allocator may give them away on the same stream.
struct Workspace {
  const Tensor& like;
  std::vector<Tensor> tensors;

  double* operator()(int64_t size) {
    tensors.push_back(torch::stable::new_empty(like, {size}, ScalarType::Double));
    return static_cast<double*>(tensors.back().mutable_data_ptr());
  }
};

// Of shared memory, no less than what the kernels declare themselves.
constexpr int kDeclaredBytes = 1024;

// What a launch may ask for.
int most_shared_bytes(const char* op, const Tensor& x) {
  int bytes = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(x.get_device_index()));
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
  return bytes - kDeclaredBytes;
}

struct Launch {
  const char* op;
  cudaStream_t stream;

  void operator()(void (*kernel)(NormCall), int64_t blocks, int tiles, int shared_bytes, const NormCall& call) const {
    STD_TORCH_CHECK(blocks <= INT32_MAX && tiles <= 65535, op, ": x is too large for one launch");
    // 48 KiB in all are there without being asked for.
    if (shared_bytes + kDeclaredBytes > 48 * 1024) {
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
    }
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles));
    kernel<<<grid, call.plan.threads, shared_bytes, stream>>>(call);
    check_launch(op);
  }
};

template <typename F>
void dispatch_norm_dtype(const char* op, ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Half:
      return f.template operator()<__half>();
    case ScalarType::BFloat16:
      return f.template operator()<__nv_bfloat16>();
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(dtype));
  }
}

// One pixel in NCHW is the same memory as in NHWC, where neighbours are read side by side.
bool as_rows(const Tensor& x, bool channels_last) { return channels_last || x.size(2) * x.size(3) == 1; }

std::tuple<Tensor, Tensor, Tensor> norm_act(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                            const OptionalTensor& mean, const OptionalTensor& var, bool batch,
                                            double eps, std::string act, double alpha, double gain) {
  const char* const op = "norm_act";
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const bool fixed = mean.has_value(), channels_last = is_channels_last(x);
  const Tensor source = in_layout(x, channels_last);
  Tensor y = torch::stable::empty_like(source);
  const auto statistic = [&] {
    if (fixed) {
      return torch::stable::new_empty(x, {0}, ScalarType::Double);
    }
    // Of a batch without samples there are none to compute.
    return batch ? torch::stable::new_zeros(x, {x.size(1)}, ScalarType::Double)
                 : torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Double);
  };
  Tensor new_mean = statistic(), new_var = statistic();
  if (x.numel() == 0) {
    return {y, new_mean, new_var};
  }
  NormCall call = make_call(source, weight, bias, batch, fixed, eps, act, alpha, gain);
  call.out = y.mutable_data_ptr();
  // Given ones are only read.
  const auto data = [](const OptionalTensor& given, Tensor& found) {
    return static_cast<double*>(given ? const_cast<void*>(given->const_data_ptr()) : found.mutable_data_ptr());
  };
  call.mean = data(mean, new_mean), call.var = data(var, new_var);
  dispatch_norm_dtype(op, x.scalar_type(), [&]<typename T>() {
    launch_norm_forward<T>(call, as_rows(x, channels_last), most_shared_bytes(op, x), Workspace{x, {}},
                           Launch{op, current_stream(x)});
  });
  return {y, new_mean, new_var};
}

// Uninitialised, or without elements where it is not wanted; zeros where there is nothing to sum.
Tensor parameter_grad(const Tensor& x, const OptionalTensor& parameter, bool wanted) {
  if (!wanted) {
    return torch::stable::new_empty(x, {0}, ScalarType::Float);
  }
  return x.numel() == 0 ? torch::stable::new_zeros(*parameter, parameter->sizes())
                        : torch::stable::new_empty(*parameter, parameter->sizes());
}

std::tuple<Tensor, Tensor, Tensor> norm_act_grad(const Tensor& gy, const Tensor& x, const OptionalTensor& weight,
                                                 const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                                                 bool batch, bool fixed, double eps, std::string act, double alpha,
                                                 double gain, bool need_x, bool need_weight, bool need_bias) {
  const char* const op = "norm_act_grad";
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const bool channels_last = is_channels_last(x);
  const Tensor source = in_layout(x, channels_last), cotangent = in_layout(gy, channels_last);
  Tensor grad_x = need_x ? torch::stable::empty_like(source) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = parameter_grad(x, weight, need_weight), grad_bias = parameter_grad(x, bias, need_bias);
  if (x.numel() == 0) {
    return {grad_x, grad_weight, grad_bias};
  }
  NormCall call = make_call(source, weight, bias, batch, fixed, eps, act, alpha, gain);
  call.gy = cotangent.const_data_ptr();
  call.out = need_x ? grad_x.mutable_data_ptr() : nullptr;
  call.grad_weight = need_weight ? static_cast<float*>(grad_weight.mutable_data_ptr()) : nullptr;
  call.grad_bias = need_bias ? static_cast<float*>(grad_bias.mutable_data_ptr()) : nullptr;
  // These kernels only read them.
  call.mean = static_cast<double*>(const_cast<void*>(mean.const_data_ptr()));
  call.var = static_cast<double*>(const_cast<void*>(var.const_data_ptr()));
  dispatch_norm_dtype(op, x.scalar_type(), [&]<typename T>() {
    launch_norm_backward<T>(call, as_rows(x, channels_last), most_shared_bytes(op, x), Workspace{x, {}},
                            Launch{op, current_stream(x)});
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, m) {
  m.impl("norm_act_cuda", TORCH_BOX(&norm_act));
  m.impl("norm_act_grad_cuda", TORCH_BOX(&norm_act_grad));
}

}  // namespace fastgan
