// The probe of csrc/cpu/library.cpp on a GPU: `fastgan doctor` runs it to prove driver, architecture and launch.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "stable_compat.h"

namespace fastgan {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
// Enough blocks to fill any GPU several times over; a grid-stride loop covers what is left.
constexpr int64_t kMaxBlocks = 4096;

__global__ void probe_kernel(const float* __restrict__ x,  // [numel]
                             float* __restrict__ y,        // [numel]
                             int64_t numel) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < numel; i += stride) {
    y[i] = x[i] + static_cast<float>(i);
  }
}

Tensor probe(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "_probe: x must be contiguous float32");
  Tensor y = torch::stable::empty_like(x);
  const int64_t numel = x.numel();
  // A grid of zero blocks is a launch error.
  if (numel == 0) {
    return y;
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const auto blocks = static_cast<unsigned>(std::min((numel + kThreads - 1) / kThreads, kMaxBlocks));
  probe_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const float*>(x.data_ptr()),
                                                                           static_cast<float*>(y.data_ptr()), numel);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, m) { m.impl("_probe", TORCH_BOX(&fastgan::probe)); }
