// mma.sync and ldmatrix on the machine; cuda/ptx.h says what the functions do.
#pragma once

#include <cstdint>
#include <type_traits>

#include "error.h"
#include "half.h"

namespace simt {

// d [16, 8] += a [16, 16] b [16, 8], the fragments of one lane.
void mma(float* d, const uint32_t* a, const uint32_t* b, float (*value)(uint16_t), Site site);
void load_matrices(uint32_t* fragments, unsigned count, const void* row, bool transposed, Site site, const void* code);

}  // namespace simt

namespace fastgan {

template <typename T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Site site = simt::Site::here()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  simt::mma(d, a, b, std::is_same_v<T, __half> ? simt::from_half : simt::from_bfloat16, site);
}

template <int kMatrices, bool kTransposed = false>
__attribute__((noinline)) void load_matrices(uint32_t (&fragments)[kMatrices], const void* row,
                                             simt::Site site = simt::Site::here()) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  simt::load_matrices(fragments, kMatrices, row, kTransposed, site, __builtin_return_address(0));
}

}  // namespace fastgan
