// filtered_lrelu for whatever filters, separable or not, and factors: sizes are known at run time.
//
// A block owns a tile of the output. The input below it comes into shared memory, becomes z there (through its rows
// upsampled along x, if fu is separable), activated, and is downsampled from there (through its columns downsampled
// along y, if fd is separable). A tap never meets an inserted zero. filtered_lrelu_plan.h chooses the tile.
#pragma once

#include "filtered_lrelu_common.cuh"

namespace fastgan {

// The input's rows upsampled along x.
__device__ inline void flrelu_tile_up_along(const FlreluCall& call, const FlreluTile& tile, const FlreluPlace& place,
                                            const FlreluStart& start, float* shared) {
  for (int i = threadIdx.x; i < tile.in_height * tile.mid_width; i += kFlreluTileThreads) {
    const int row = i / tile.mid_width, column = i % tile.mid_width;
    const FlreluStart at = flrelu_start(call.along, place.mid_x + column);
    const float* input = shared + tile.first + row * tile.in_width + at.input - start.input;
    float sum = 0;
    for (int tap = at.tap; tap < call.along.up_taps; tap += call.along.up) {
      sum += shared[tile.up_filter + tap] * *input++;
    }
    shared[tile.second + i] = sum;
  }
}

// z at a position of the tile.
__device__ inline float flrelu_tile_z(const FlreluCall& call, const FlreluTile& tile, const FlreluPlace& place,
                                      const FlreluStart& start_x, const FlreluStart& start_y, int row, int column,
                                      const float* shared) {
  const FlreluStart y = flrelu_start(call.across, place.mid_y + row);
  const int input_row = y.input - start_y.input;
  const float* filter = shared + tile.up_filter;
  float sum = 0;
  if (call.up_separable) {
    const float* input = shared + tile.second + input_row * tile.mid_width + column;
    for (int tap = y.tap; tap < call.across.up_taps; tap += call.across.up, input += tile.mid_width) {
      sum += filter[tap] * *input;
    }
  } else {
    const FlreluStart x = flrelu_start(call.along, place.mid_x + column);
    const float* input = shared + tile.first + input_row * tile.in_width + x.input - start_x.input;
    for (int tap_y = y.tap; tap_y < call.across.up_taps; tap_y += call.across.up, input += tile.in_width) {
      const float* value = input;
      for (int tap_x = x.tap; tap_x < call.along.up_taps; tap_x += call.along.up) {
        sum += filter[tap_y * call.along.up_taps + tap_x] * *value++;
      }
    }
  }
  return sum * call.fir_gain;
}

// The activated z. A thread has the rows of one word of signs in one column.
__device__ inline void flrelu_tile_activate(const FlreluCall& call, const FlreluTile& tile, const FlreluPlace& place,
                                            const FlreluStart& start_x, const FlreluStart& start_y, float* shared) {
  const bool record = call.mode == FlreluMode::kRecord;
  // Where a filter is shorter than its factor, some of z between two tiles reaches no output, but has its bits.
  const int width = record ? max(tile.mid_width, place.own_x - place.mid_x) : tile.mid_width;
  const int height = record ? max(tile.mid_height, place.own_y - place.mid_y) : tile.mid_height;
  const int first_group = floor_divide(place.mid_y, kFlreluSignRows);
  const int groups = floor_divide(place.mid_y + height - 1, kFlreluSignRows) - first_group + 1;
  for (int i = threadIdx.x; i < groups * width; i += kFlreluTileThreads) {
    const int group = first_group + i / width, column = i % width, x = place.mid_x + column;
    uint32_t signs = 0;
    if (call.mode == FlreluMode::kReplay) {
      signs = flrelu_signs(call, place.plane, group, x);
    }
    for (int bit = 0; bit < 2 * kFlreluSignRows; bit += 2) {
      const int y = group * kFlreluSignRows + bit / 2, row = y - place.mid_y;
      if (row < 0 || row >= tile.mid_height || column >= tile.mid_width) {
        continue;
      }
      float a = 0;
      if (y >= 0 && y < call.across.mid && x >= 0 && x < call.along.mid) {
        const float z = flrelu_tile_z(call, tile, place, start_x, start_y, row, column, shared);
        uint32_t sign = 0;
        a = call.mode == FlreluMode::kReplay ? flrelu_replay(call, z, signs >> bit) : flrelu_activate(call, z, sign);
        signs |= sign << bit;
      }
      shared[tile.mid + row * tile.mid_width + column] = a;
    }
    if (record && group * kFlreluSignRows < place.own_y && x < place.own_x) {
      record_flrelu_signs(call, place.plane, group, x, signs);
    }
  }
}

// The columns of z downsampled along y.
__device__ inline void flrelu_tile_down_across(const FlreluCall& call, const FlreluTile& tile, int rows,
                                               float* shared) {
  for (int i = threadIdx.x; i < rows * tile.mid_width; i += kFlreluTileThreads) {
    const int row = i / tile.mid_width, column = i % tile.mid_width;
    const float* value = shared + tile.mid + row * call.across.down * tile.mid_width + column;
    float sum = 0;
    for (int tap = 0; tap < call.across.down_taps; ++tap, value += tile.mid_width) {
      sum += shared[tile.down_filter + tap] * *value;
    }
    shared[tile.first + i] = sum;
  }
}

// One output; without separable fd from z itself.
__device__ inline float flrelu_tile_output(const FlreluCall& call, const FlreluTile& tile, int row, int column,
                                           const float* shared) {
  const float* filter = shared + tile.down_filter;
  const int rows = call.down_separable ? 1 : call.across.down_taps;
  const int base =
      call.down_separable ? tile.first + row * tile.mid_width : tile.mid + row * call.across.down * tile.mid_width;
  const float* value = shared + base + column * call.along.down;
  float sum = 0;
  for (int y = 0; y < rows; ++y, value += tile.mid_width) {
    for (int x = 0; x < call.along.down_taps; ++x) {
      sum += *filter++ * value[x];
    }
  }
  return sum;
}

// Shared memory lets hardly more than four blocks onto a multiprocessor: to fit five, the compiler would spill.
template <typename T>
__global__ void __launch_bounds__(kFlreluTileThreads, 4)
    flrelu_tile_kernel(const FlreluCall call, const FlreluPlan plan, int64_t first_block) {
  FASTGAN_DYNAMIC_SHARED(float, shared);
  const FlreluTile tile = flrelu_tile(call, plan.width, plan.height);
  const FlreluPlace place = flrelu_place(call, plan, first_block + blockIdx.x);
  const FlreluStart along = flrelu_start(call.along, place.mid_x), across = flrelu_start(call.across, place.mid_y);
  load_flrelu_filter(call.fu, call.along.up_taps * (call.up_separable ? 1 : call.across.up_taps), call.correlate,
                     shared + tile.up_filter);
  load_flrelu_filter(call.fd, call.along.down_taps * (call.down_separable ? 1 : call.across.down_taps), call.correlate,
                     shared + tile.down_filter);
  load_flrelu_tile<T>(call, plan, place.plane, across.input, along.input, tile.in_height, tile.in_width,
                      shared + tile.first);
  __syncthreads();
  if (call.up_separable) {
    flrelu_tile_up_along(call, tile, place, along, shared);
    __syncthreads();
  }
  flrelu_tile_activate(call, tile, place, along, across, shared);
  __syncthreads();
  const int rows = min(plan.height, call.across.out - place.out_y), width = call.along.out;
  if (call.down_separable) {
    flrelu_tile_down_across(call, tile, rows, shared);
    __syncthreads();
  }
  const int columns = min(plan.width, width - place.out_x);
  T* image = static_cast<T*>(call.y) + place.plane * call.across.out * width;
  for (int i = threadIdx.x; i < rows * columns; i += kFlreluTileThreads) {
    const int row = i / columns, column = i % columns;
    image[static_cast<int64_t>(place.out_y + row) * width + place.out_x + column] =
        T(flrelu_tile_output(call, tile, row, column, shared));
  }
}

}  // namespace fastgan
