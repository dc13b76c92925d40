// What launchers of CUDA kernels need of torch: its stream, activations by name, errors with the op's name.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "activation.h"
#include "stable_compat.h"

namespace fastgan {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's current stream of the tensor's device, which the caller has made the current one.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Act parse_act(const char* op, const std::string& name) {
  const std::optional<Act> act = find_act(name);
  STD_TORCH_CHECK(act, op, ": unknown activation ", name);
  return *act;
}

// Of the launch just made.
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

}  // namespace fastgan
