// CUDA's qualifiers, vector types and built-in variables, as g++ understands them.
#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// Shared variables are declared with FASTGAN_SHARED and FASTGAN_DYNAMIC_SHARED of cuda/device.h: a plain one would be
// one variable of the whole process here, and outside of every check.
#define __shared__ _Pragma("GCC error \"declare shared memory with FASTGAN_SHARED or FASTGAN_DYNAMIC_SHARED\"")

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

// The alignments are CUDA's: they are what a vector access has to keep to.
#define SIMT_VECTOR_TYPES(name, T, align2, align4)              \
  struct alignas(align2) name##2 { T x, y; };                   \
  struct name##3 { T x, y, z; };                                \
  struct alignas(align4) name##4 { T x, y, z, w; };             \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; } \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTOR_TYPES(float, float, 8, 16)
SIMT_VECTOR_TYPES(int, int, 8, 16)
SIMT_VECTOR_TYPES(uchar, unsigned char, 2, 4)
SIMT_VECTOR_TYPES(short, short, 4, 8)
SIMT_VECTOR_TYPES(ushort, unsigned short, 4, 8)
#undef SIMT_VECTOR_TYPES
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Of the thread that runs: the machine sets them whenever it passes from one thread to another.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;
