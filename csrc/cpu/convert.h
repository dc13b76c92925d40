// Blocks of half-precision values to and from the float buffers in which kernels compute.
#pragma once

#include "common.h"

namespace fastgan {

void widen(const BFloat16* source, float* target, int64_t n);
void widen(const Half* source, float* target, int64_t n);
void narrow(const float* source, BFloat16* target, int64_t n);
void narrow(const float* source, Half* target, int64_t n);

// The block in the compute type: the data itself where it already has that type, else a copy in buffer.
inline const float* as_compute(const float* data, int64_t, float*) { return data; }
inline const double* as_compute(const double* data, int64_t, double*) { return data; }
template <typename T>
const float* as_compute(const T* data, int64_t n, float* buffer) {
  widen(data, buffer, n);
  return buffer;
}

// Where a block of results is computed: in place where T is the compute type, else in buffer, which flush() then rounds
// to T.
inline float* result_buffer(float* data, float*) { return data; }
inline double* result_buffer(double* data, double*) { return data; }
template <typename T>
float* result_buffer(T*, float* buffer) {
  return buffer;
}
inline void flush(const float*, float*, int64_t) {}
inline void flush(const double*, double*, int64_t) {}
template <typename T>
void flush(const float* buffer, T* data, int64_t n) {
  narrow(buffer, data, n);
}

}  // namespace fastgan
