// The part of the CPU library that belongs to no single op: a probe that proves the path from Python to a kernel.

#include <array>
#include <atomic>
#include <string_view>

#include "algorithm.h"
#include "common.h"

namespace fastgan {
namespace {

// In the order of Algorithm.
constexpr std::array<std::string_view, 13> kAlgorithms{
    "packed_direct",      "few_pixels",         "unfolded_conv",
    "winograd",           "direct_conv",        "torch",
    "quantized_winograd", "quantized_direct",   "unfolded_weight_grad",
    "dense_weight_grad",  "direct_weight_grad", "winograd_weight_grad",
    "torch_weight_grad"};
static_assert(kAlgorithms.size() == static_cast<size_t>(Algorithm::kTorchWeightGrad) + 1);
std::array<std::atomic<int64_t>, kAlgorithms.size()> calls_of;

constexpr int64_t kMostResults = 4, kMostTaps = 3;
std::array<std::array<std::atomic<int64_t>, kMostTaps + 1>, kMostResults + 1> winograd_calls_of;

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

std::string_view algorithm_name(Algorithm algorithm) { return kAlgorithms[static_cast<size_t>(algorithm)]; }

void count_call(Algorithm algorithm) {
  calls_of[static_cast<size_t>(algorithm)].fetch_add(1, std::memory_order_relaxed);
}

void count_winograd(int64_t m, int64_t r) { winograd_calls_of[m][r].fetch_add(1, std::memory_order_relaxed); }

}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) { m.impl("_probe", TORCH_BOX(&fastgan::probe)); }

// How many convolutions, or gradients of weights, of this process the named algorithm has computed; -1 for a name that
// is none.
extern "C" __attribute__((visibility("default"))) int64_t fastgan_algorithm_calls(const char* name) {
  for (size_t i = 0; i < fastgan::kAlgorithms.size(); ++i) {
    if (fastgan::kAlgorithms[i] == name) return fastgan::calls_of[i].load(std::memory_order_relaxed);
  }
  return -1;
}

// How many of Winograd's calls ran with F(m x m, r x r); -1 for sizes beyond the largest.
extern "C" __attribute__((visibility("default"))) int64_t fastgan_winograd_calls(int64_t m, int64_t r) {
  if (m < 0 || m > fastgan::kMostResults || r < 0 || r > fastgan::kMostTaps) return -1;
  return fastgan::winograd_calls_of[m][r].load(std::memory_order_relaxed);
}

#if defined(FASTGAN_SANITIZE)
// What the sanitizers have to catch before their silence means anything: x[n] of a tensor of n floats, and a sum that
// does not fit its type.
extern "C" __attribute__((visibility("default"))) float fastgan_read_beyond(const float* x, int64_t n) { return x[n]; }
extern "C" __attribute__((visibility("default"))) int32_t fastgan_overflow(int32_t x) { return x + 1; }
#endif

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
