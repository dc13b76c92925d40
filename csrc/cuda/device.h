// What kernel text includes: CUDA's headers for nvcc, csrc/simt for g++, and the two ways in which both declare shared
// memory.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// FASTGAN_SHARED(float, tile, [32][33]); is __shared__ float tile[32][33];
#define FASTGAN_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
// FASTGAN_DYNAMIC_SHARED(float, memory); declares float* memory, all that the launch asked for. `type` is the smallest
// piece that threads write separately.
#define FASTGAN_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char fastgan_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(fastgan_dynamic_shared)

#else

#include "../simt/simt.h"

#define FASTGAN_SHARED(type, name, ...) SIMT_SHARED(type, name, __VA_ARGS__)
#define FASTGAN_DYNAMIC_SHARED(type, name) SIMT_DYNAMIC_SHARED(type, name)

#endif
