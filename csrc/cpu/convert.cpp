#include "convert.h"

namespace fastgan {
namespace {

template <typename From, typename To>
FASTGAN_INLINE void convert_loop(const From* __restrict__ source, To* __restrict__ target, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) target[i] = static_cast<To>(static_cast<float>(source[i]));
}

}  // namespace

FASTGAN_MULTIVERSION void widen(const BFloat16* source, float* target, int64_t n) { convert_loop(source, target, n); }
FASTGAN_MULTIVERSION void widen(const Half* source, float* target, int64_t n) { convert_loop(source, target, n); }
FASTGAN_MULTIVERSION void narrow(const float* source, BFloat16* target, int64_t n) { convert_loop(source, target, n); }
FASTGAN_MULTIVERSION void narrow(const float* source, Half* target, int64_t n) { convert_loop(source, target, n); }

}  // namespace fastgan
