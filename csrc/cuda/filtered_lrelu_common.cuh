// What filtered_lrelu's two kernels share: positions, loads, the activation and its signs, stores.
#pragma once

#include "device.h"
#include "filtered_lrelu_plan.h"

namespace fastgan {

// Where a block's outputs lie, and the z below them.
struct FlreluPlace {
  int64_t plane;
  int out_x, out_y, mid_x, mid_y;
  int own_x, own_y;  // of z, the end of what this block records: then the next block begins, or the image ends
};

__device__ inline FlreluPlace flrelu_place(const FlreluCall& call, const FlreluPlan& plan, int64_t block) {
  const int64_t tiles = static_cast<int64_t>(plan.tiles_x) * plan.tiles_y;
  FlreluPlace place;
  place.plane = block / tiles;
  const int64_t tile = block - place.plane * tiles;
  const int tile_y = static_cast<int>(tile / plan.tiles_x), tile_x = static_cast<int>(tile % plan.tiles_x);
  place.out_x = tile_x * plan.width, place.out_y = tile_y * plan.height;
  place.mid_x = place.out_x * call.along.down + call.along.offset;
  place.mid_y = place.out_y * call.across.down + call.across.offset;
  place.own_x = tile_x == plan.tiles_x - 1 ? call.along.mid : place.mid_x + plan.width * call.along.down;
  place.own_y = tile_y == plan.tiles_y - 1 ? call.across.mid : place.mid_y + plan.height * call.across.down;
  return place;
}

// Division that rounds down; the divisor is positive.
__device__ inline int floor_divide(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// The first input below z[q], and the tap that it meets there; the next input meets the tap `up` further on.
struct FlreluStart {
  int input, tap;
};
__device__ inline FlreluStart flrelu_start(const FlreluAxis& axis, int q) {
  const int input = floor_divide(q - axis.pad + axis.up - 1, axis.up);
  return {input, input * axis.up - (q - axis.pad)};
}

// Filters to shared memory, in the order of a correlation.
__device__ inline void load_flrelu_filter(const float* filter, int taps, bool correlate, float* shared) {
  for (int k = threadIdx.x; k < taps; k += blockDim.x) {
    shared[k] = filter ? filter[correlate ? k : taps - 1 - k] : 1.0f;
  }
}

// x + bias at rows row ... row + rows, but for the first `skipped` of them, and columns column ... column + width into
// the tile, zero outside the image. A thread asks for kBatch words before it waits for the first.
template <typename T, typename Word>
__device__ __forceinline__ void load_flrelu_words(const FlreluCall& call, int64_t plane, int row, int column, int rows,
                                                  int width, float* tile, int skipped) {
  constexpr int kItems = sizeof(Word) / sizeof(T), kBatch = sizeof(Word) >= 8 ? 2 : 4;
  const int in_width = call.along.in, in_height = call.across.in;
  const T* image = static_cast<const T*>(call.x) + plane * in_height * in_width;
  const float bias = call.bias ? call.bias[plane % call.channels] : 0.0f;
  const int first = floor_divide(column, kItems), words = kItems == 1 ? width : (width + kItems - 2) / kItems + 1;
  for (int begin = skipped * words + threadIdx.x; begin < rows * words; begin += kBatch * blockDim.x) {
    Word loaded[kBatch];
    bool inside[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = begin + j * blockDim.x, y = row + i / words, x = (first + i % words) * kItems;
      inside[j] = i < rows * words && y >= 0 && y < in_height && x >= 0 && x < in_width;
      if (inside[j]) {
        loaded[j] = __ldg(reinterpret_cast<const Word*>(image + static_cast<int64_t>(y) * in_width + x));
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = begin + j * blockDim.x, tile_row = i / words, x = (first + i % words) * kItems;
      const T* items = reinterpret_cast<const T*>(&loaded[j]);
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const int tile_column = x + k - column;
        if (i < rows * words && tile_column >= 0 && tile_column < width) {
          tile[tile_row * width + tile_column] = inside[j] ? static_cast<float>(items[k]) + bias : 0.0f;
        }
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void load_flrelu_tile(const FlreluCall& call, const FlreluPlan& plan, int64_t plane, int row,
                                                 int column, int rows, int width, float* tile, int skipped = 0) {
  if (plan.load_bytes == 16) {
    load_flrelu_words<T, uint4>(call, plane, row, column, rows, width, tile, skipped);
  } else if (plan.load_bytes == 8) {
    load_flrelu_words<T, uint2>(call, plane, row, column, rows, width, tile, skipped);
  } else if (plan.load_bytes == 4) {
    load_flrelu_words<T, unsigned>(call, plane, row, column, rows, width, tile, skipped);
  } else if constexpr (sizeof(T) < 4) {
    load_flrelu_words<T, T>(call, plane, row, column, rows, width, tile, skipped);
  }
}

// clamp(gain * lrelu(z)), and z's two bits as csrc/cuda/filtered_lrelu_plan.h has them. A NaN stays one.
__device__ __forceinline__ float flrelu_activate(const FlreluCall& call, float z, uint32_t& sign) {
  const bool positive = z > 0.0f;
  const float value = z * (positive ? call.gain : call.slope_gain), magnitude = fabsf(value);
  sign = (positive ? 0u : 1u) | (call.clamps && !(magnitude <= call.clamp) ? 2u : 0u);
  return magnitude > call.clamp ? copysignf(call.clamp, value) : value;
}

// z times the slope that the two lowest bits say.
__device__ __forceinline__ float flrelu_replay(const FlreluCall& call, float z, uint32_t signs) {
  const float value = z * (signs & 1u ? call.slope_gain : call.gain);
  return signs & 2u ? 0.0f : value;
}

// The word of signs of rows 16 group ... of a column, zero outside.
__device__ inline uint32_t flrelu_signs(const FlreluCall& call, int64_t plane, int group, int column) {
  const int groups = (call.across.mid + kFlreluSignRows - 1) / kFlreluSignRows;
  if (group < 0 || group >= groups || column < 0 || column >= call.along.mid) {
    return 0;
  }
  return __ldg(call.signs + (plane * groups + group) * call.along.mid + column);
}

__device__ inline void record_flrelu_signs(const FlreluCall& call, int64_t plane, int group, int column,
                                           uint32_t word) {
  const int groups = (call.across.mid + kFlreluSignRows - 1) / kFlreluSignRows;
  call.signs[(plane * groups + group) * call.along.mid + column] = word;
}

__device__ inline void store_flrelu_pair(float* target, float a, float b) {
  *reinterpret_cast<float2*>(target) = make_float2(a, b);
}
__device__ inline void store_flrelu_pair(__half* target, float a, float b) {
  *reinterpret_cast<__half2*>(target) = __floats2half2_rn(a, b);
}
__device__ inline void store_flrelu_pair(__nv_bfloat16* target, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(target) = __floats2bfloat162_rn(a, b);
}

}  // namespace fastgan
