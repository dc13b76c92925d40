// The part of the CPU library that belongs to no single op: a probe that proves the path from Python to a kernel.

#include "common.h"

namespace fastgan {
namespace {

// y[i] = x[i] + i for a contiguous float32 x: a wrong index, a skipped element or a stale library all show.
Tensor probe(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "_probe: x must be contiguous float32");
  Tensor y = torch::stable::empty_like(x);
  const float* __restrict__ source = static_cast<const float*>(x.data_ptr());
  float* __restrict__ target = static_cast<float*>(y.data_ptr());
  torch::stable::parallel_for(0, x.numel(), kGrainElements, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      target[i] = source[i] + static_cast<float>(i);
    }
  });
  return y;
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) { m.impl("_probe", TORCH_BOX(&fastgan::probe)); }

// The clone of FASTGAN_MULTIVERSION (common.h) that the loader chooses on this machine: same names, same order.
extern "C" __attribute__((visibility("default"))) const char* fastgan_simd_level() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
  if (__builtin_cpu_supports("x86-64-v4")) {
    return "x86-64-v4 (AVX-512)";
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    return "x86-64-v3 (AVX2, FMA)";
  }
#endif
  return "baseline";
}
