// The part of the CPU library that belongs to no single op: a probe that proves the path from Python to a kernel.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>

namespace fastgan {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 4096;

// y[i] = x[i] + i for a contiguous float32 x: a wrong index, a skipped element or a stale library all show.
Tensor probe(const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float || !x.is_contiguous()) {
    throw std::runtime_error("_probe: x must be contiguous float32");
  }
  Tensor y = torch::stable::empty_like(x);
  const float* __restrict__ source = static_cast<const float*>(x.data_ptr());
  float* __restrict__ target = static_cast<float*>(y.data_ptr());
  torch::stable::parallel_for(0, x.numel(), kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      target[i] = source[i] + static_cast<float>(i);
    }
  });
  return y;
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("_probe", TORCH_BOX(&fastgan::probe));
}
