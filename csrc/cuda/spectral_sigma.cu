// spectral_sigma on the GPU: torch's tensors for the kernel of spectral_sigma.cuh, which says how it works.
//
// Addresses and shapes travel as the kernel's parameter, so a CUDA graph may be captured at any call, on any stream.

#include "spectral_sigma.cuh"

#include <tuple>
#include <vector>

#include "launch.h"

namespace fastgan {
namespace {

template <typename T>
void launch_sigma(const std::vector<SigmaWeight>& layers, int64_t n_iter, bool hook, double eps, const Tensor& like) {
  const bool read = n_iter == 0;
  const SigmaPlan plan = plan_sigma(layers, sizeof(T), hook, read);
  const Tensor workspace = torch::stable::new_empty(like, {plan.workspace});
  const Tensor counters = torch::stable::new_zeros(like, {plan.counters}, ScalarType::Int);
  const cudaStream_t stream = current_stream(like);
  SigmaBatch batch{};
  batch.eps = static_cast<float>(eps);
  batch.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  batch.counters = static_cast<unsigned*>(counters.mutable_data_ptr());
  const auto kernel = read ? sigma_kernel<T, true> : sigma_kernel<T, false>;
  for (int64_t iteration = 0; iteration < (read ? 1 : n_iter); ++iteration) {
    for (size_t begin = 0; begin < layers.size(); begin += kSigmaLayers) {
      const int blocks = sigma_batch(plan, begin, iteration > 0, batch);
      kernel<<<blocks, kSigmaThreads, kSigmaSharedBytes, stream>>>(batch);
      check_launch("spectral_sigma");
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> spectral_sigma(std::vector<Tensor> weights, std::vector<Tensor> us,
                                                  std::vector<Tensor> vs, int64_t n_iter, bool hook, double eps,
                                                  std::vector<int64_t> dims) {
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  const int64_t count = static_cast<int64_t>(weights.size());
  int64_t rows = 0, columns = 0;
  for (int64_t i = 0; i < count; ++i) {
    rows += us[i].numel(), columns += vs[i].numel();
  }
  Tensor sigma = torch::stable::new_empty(us[0], {count});
  Tensor u = torch::stable::new_empty(us[0], {rows});
  Tensor v = torch::stable::new_empty(us[0], {columns});
  float *sigma_out = static_cast<float*>(sigma.mutable_data_ptr()), *u_out = static_cast<float*>(u.mutable_data_ptr()),
        *v_out = static_cast<float*>(v.mutable_data_ptr());
  std::vector<SigmaWeight> layers;
  for (int64_t i = 0; i < count; ++i) {
    us[i] = torch::stable::contiguous(us[i]);
    vs[i] = torch::stable::contiguous(vs[i]);
    const auto describe = [&](const Tensor& weight) {
      SigmaWeight layer{weight.const_data_ptr(),
                        {},
                        {},
                        dims[i],
                        static_cast<const float*>(us[i].const_data_ptr()),
                        static_cast<const float*>(vs[i].const_data_ptr()),
                        u_out,
                        v_out,
                        sigma_out + i};
      for (int64_t axis = 0; axis < weight.dim(); ++axis) {
        layer.sizes.push_back(weight.size(axis));
        layer.strides.push_back(weight.stride(axis));
      }
      return layer;
    };
    layers.push_back(describe(weights[i]));
    if (!sigma_columns(layers.back())) {
      weights[i] = torch::stable::contiguous(weights[i]);
      layers.back() = describe(weights[i]);
    }
    u_out += us[i].numel(), v_out += vs[i].numel();
  }
  switch (weights[0].scalar_type()) {
    case ScalarType::Float:
      launch_sigma<float>(layers, n_iter, hook, eps, us[0]);
      break;
    case ScalarType::Half:
      launch_sigma<__half>(layers, n_iter, hook, eps, us[0]);
      break;
    case ScalarType::BFloat16:
      launch_sigma<__nv_bfloat16>(layers, n_iter, hook, eps, us[0]);
      break;
    default:
      STD_TORCH_CHECK(false, "spectral_sigma: dtype must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(weights[0].scalar_type()));
  }
  return std::make_tuple(sigma, u, v);
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, m) { m.impl("spectral_sigma_cuda", TORCH_BOX(&fastgan::spectral_sigma)); }
