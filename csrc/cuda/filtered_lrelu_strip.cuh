// filtered_lrelu for separable filters whose sizes are known to the compiler: StyleGAN3's.
//
// A block owns a strip of the output, kWidth columns wide, and walks down it. Rows of x come into shared memory as
// float and are upsampled along x there. Then each thread has one column of z: it keeps the kWindow values that the
// next z needs, and kPending unfinished sums of outputs, in registers all the way down. So z itself, four or more times
// the size of the image, is nowhere in memory, and nothing is computed twice but the first rows of a strip and the
// columns that two strips share. What leaves the registers is downsampled along y already; along x it is downsampled
// from shared memory.
//
// Which tap meets z[q] depends on (q - pad) mod up. Along x, a strip begins at a column where it is up - 1, and throws
// the columns before its own away; along y it is a template argument, the same for all strips since they begin at
// multiples of 16 rows.
//
// Source: Karras et al., "Alias-Free Generative Adversarial Networks", 2021, section 3.2 and appendix C.
#pragma once

#include "filtered_lrelu_common.cuh"

namespace fastgan {

// Where a strip's shared memory has what.
template <class Strip>
struct FlreluStripMemory {
  float *up_taps, *down_taps;
  float* input;        // [kInputRows, kInputPitch]
  float* upsampled;    // [kInputRows, kPitch], along x
  float* downsampled;  // [kOutputRows, kPitch], along y

  // The filters come last: the tiles are read in vectors.
  __device__ explicit FlreluStripMemory(float* memory)
      : up_taps(memory + Strip::kSharedFloats - Strip::kUpTaps - Strip::kDownTaps),
        down_taps(up_taps + Strip::kUpTaps),
        input(memory),
        upsampled(input + Strip::kInputRows * Strip::kInputPitch),
        downsampled(upsampled + Strip::kInputRows * Strip::kPitch) {}
};

// values[i] = source[i], both aligned to `kVector` floats.
template <int kVector, int kCount>
__device__ __forceinline__ void load_floats(const float* source, float (&values)[kCount]) {
  static_assert(kCount % kVector == 0 && (kVector == 1 || kVector == 2 || kVector == 4));
#pragma unroll
  for (int i = 0; i < kCount; i += kVector) {
    if constexpr (kVector == 4) {
      const float4 loaded = *reinterpret_cast<const float4*>(source + i);
      values[i] = loaded.x, values[i + 1] = loaded.y, values[i + 2] = loaded.z, values[i + 3] = loaded.w;
    } else if constexpr (kVector == 2) {
      const float2 loaded = *reinterpret_cast<const float2*>(source + i);
      values[i] = loaded.x, values[i + 1] = loaded.y;
    } else {
      values[i] = source[i];
    }
  }
}

// Rows of the input, but for the first, to rows of z's columns: a warp has a row, a lane four columns.
template <class Strip>
__device__ __forceinline__ void flrelu_up_along(const FlreluStripMemory<Strip>& memory, int skipped) {
  constexpr int kGroups = 4 / Strip::kUp, kVector = kGroups == 4 ? 4 : kGroups;
  constexpr int kNeeded = (Strip::kWindow + kGroups - 1 + kVector - 1) / kVector * kVector;
  float taps[Strip::kUpTaps];
  load_floats<1>(memory.up_taps, taps);
  const int lane = threadIdx.x % 32;
  for (int row = skipped + threadIdx.x / 32; row < Strip::kInputRows; row += kFlreluStripThreads / 32) {
    float inputs[kNeeded], z[4];
    load_floats<kVector>(memory.input + row * Strip::kInputPitch + lane * kGroups, inputs);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      z[i] = 0;
#pragma unroll
      for (int m = 0; m < Strip::kWindow; ++m) {
        z[i] += taps[Strip::kUp - 1 - i % Strip::kUp + Strip::kUp * m] * inputs[i / Strip::kUp + m];
      }
    }
    *reinterpret_cast<float4*>(memory.upsampled + row * Strip::kPitch + lane * 4) = make_float4(z[0], z[1], z[2], z[3]);
  }
}

// What a thread remembers of its column from chunk to chunk.
template <class Strip>
struct FlreluColumn {
  float window[Strip::kWindow];    // the inputs below z[row - 1], upsampled along x
  float pending[Strip::kPending];  // outputs of which z[row - 1] is a part, the oldest first
  int row;                         // of z, the next
  uint32_t signs, next_signs;      // those of this row in the lowest bits; recorded, they come in from above
  int column;                      // of z
  bool live;                       // it has one
};

template <class Strip>
__device__ __forceinline__ void load_flrelu_window(const float* source, FlreluColumn<Strip>& column) {
  if (column.live) {
#pragma unroll
    for (int m = 0; m < Strip::kWindow; ++m) {
      column.window[m] = source[m * Strip::kPitch];
    }
  }
}

// a from z; advances the signs by a row.
template <class Strip, FlreluMode kMode>
__device__ __forceinline__ float flrelu_strip_activate(const FlreluCall& call, const FlreluPlace& place, float z,
                                                       FlreluColumn<Strip>& column) {
  const bool inside = column.row >= 0 && column.row < call.across.mid;
  float a;
  if constexpr (kMode == FlreluMode::kReplay) {
    if (column.row >= 0 && column.row % kFlreluSignRows == 0) {
      column.signs = column.next_signs;
      column.next_signs = flrelu_signs(call, place.plane, column.row / kFlreluSignRows + 1, column.column);
    }
    a = flrelu_replay(call, z, column.signs);
    column.signs >>= 2;
  } else {
    uint32_t sign;
    a = flrelu_activate(call, z, sign);
    if constexpr (kMode == FlreluMode::kRecord) {
      column.signs = column.signs >> 2 | (inside ? sign : 0u) << 30;
    }
  }
  ++column.row;
  return inside ? a : 0.0f;
}

// A chunk of the thread's column. kTap: the first tap that meets the first row of z.
template <class Strip, FlreluMode kMode, int kTap>
__device__ __forceinline__ void flrelu_column(const FlreluCall& call, const FlreluPlace& place,
                                              const FlreluStripMemory<Strip>& memory, const float* source,
                                              FlreluColumn<Strip>& column) {
  constexpr int kUp = Strip::kUp, kDown = Strip::kDown, kWindow = Strip::kWindow, kPending = Strip::kPending;
  float* target = memory.downsampled + threadIdx.x;
  float up_taps[Strip::kUpTaps], down_taps[Strip::kDownTaps];
  load_floats<1>(memory.up_taps, up_taps);
  load_floats<1>(memory.down_taps, down_taps);
#pragma unroll
  for (int k = 0; k < Strip::kUpTaps; ++k) {
    up_taps[k] *= call.fir_gain;
  }
#pragma unroll 1
  for (int step = 0; step < Strip::kChunk / Strip::kStep; ++step) {
#pragma unroll
    for (int r = 0; r < Strip::kStep; ++r) {
      const int tap = (kTap - r % kUp + kUp) % kUp;
      if (tap == kUp - 1) {
#pragma unroll
        for (int m = 0; m < kWindow - 1; ++m) {
          column.window[m] = column.window[m + 1];
        }
        column.window[kWindow - 1] = *source;
        source += Strip::kPitch;
      }
      float z = 0;
#pragma unroll
      for (int m = 0; m < kWindow; ++m) {
        z += up_taps[tap + kUp * m] * column.window[m];
      }
      const float a = flrelu_strip_activate<Strip, kMode>(call, place, z, column);
      // z meets tap k of the newest sum, k + down of the one before, and so on.
      const int k = r % kDown;
#pragma unroll
      for (int j = 0; j < kPending; ++j) {
        const float before = k > 0 ? column.pending[j] : j < kPending - 1 ? column.pending[j + 1] : 0.0f;
        column.pending[j] = before + down_taps[k + kDown * (kPending - 1 - j)] * a;
      }
      if (k == kDown - 1) {
        *target = column.pending[0];
        target += Strip::kPitch;
      }
    }
    if constexpr (kMode == FlreluMode::kRecord) {
      // Behind the last row of a word or of z.
      const int last = min(column.row, call.across.mid) - 1, rest = column.row % kFlreluSignRows;
      const bool full = rest == 0 || column.row >= call.across.mid;
      if (full && column.row - Strip::kStep <= last && last < place.own_y && column.column < place.own_x) {
        record_flrelu_signs(call, place.plane, last / kFlreluSignRows, column.column,
                            rest == 0 ? column.signs : column.signs >> 2 * (kFlreluSignRows - rest));
      }
    }
  }
}

// The rows of the output that a chunk has finished; its first is `first`, counted from the strip's own first.
template <typename T, class Strip>
__device__ __forceinline__ void flrelu_down_along(const FlreluCall& call, const FlreluPlan& plan,
                                                  const FlreluPlace& place, const FlreluStripMemory<Strip>& memory,
                                                  int first, int rows) {
  constexpr int kOutputs = 4 / Strip::kDown;
  constexpr int kNeeded = (Strip::kDownTaps + (kOutputs - 1) * Strip::kDown + 3) / 4 * 4;
  float taps[Strip::kDownTaps];
  load_floats<1>(memory.down_taps, taps);
  const int width = call.along.out, lane = threadIdx.x % 32, x = place.out_x + lane * kOutputs;
  if (lane >= Strip::kWidth / kOutputs || x >= width) {
    return;
  }
  T* image = static_cast<T*>(call.y) + place.plane * call.across.out * width;
  for (int row = threadIdx.x / 32; row < Strip::kOutputRows; row += kFlreluStripThreads / 32) {
    if (first + row < 0 || first + row >= rows) {
      continue;
    }
    float inputs[kNeeded], sums[kOutputs];
    load_floats<4>(memory.downsampled + row * Strip::kPitch + lane * 4, inputs);
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      sums[i] = 0;
#pragma unroll
      for (int k = 0; k < Strip::kDownTaps; ++k) {
        sums[i] += taps[k] * inputs[i * Strip::kDown + k];
      }
    }
    T* target = image + static_cast<int64_t>(place.out_y + first + row) * width + x;
    if constexpr (kOutputs == 2) {
      if (plan.pairs) {
        store_flrelu_pair(target, sums[0], sums[1]);
        continue;
      }
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      if (x + i < width) {
        target[i] = T(sums[i]);
      }
    }
  }
}

// flrelu_column with the tap that the first row meets, kTap or less, as its template argument.
template <class Strip, FlreluMode kMode, int kTap = Strip::kUp - 1>
__device__ __forceinline__ void flrelu_column_from(int tap, const FlreluCall& call, const FlreluPlace& place,
                                                   const FlreluStripMemory<Strip>& memory, const float* source,
                                                   FlreluColumn<Strip>& column) {
  if constexpr (kTap > 0) {
    if (tap != kTap) {
      flrelu_column_from<Strip, kMode, kTap - 1>(tap, call, place, memory, source, column);
      return;
    }
  }
  flrelu_column<Strip, kMode, kTap>(call, place, memory, source, column);
}

// Four blocks to a multiprocessor leave 128 registers to a thread: left to itself, the compiler spills to fit five.
template <typename T, class Strip, FlreluMode kMode>
__global__ void __launch_bounds__(kFlreluStripThreads, 4)
    flrelu_strip_kernel(const FlreluCall call, const FlreluPlan plan, int64_t first_block) {
  FASTGAN_DYNAMIC_SHARED(float, shared);
  const FlreluStripMemory<Strip> memory(shared);
  const FlreluPlace place = flrelu_place(call, plan, first_block + blockIdx.x);
  const FlreluStart along = flrelu_start(call.along, place.mid_x), across = flrelu_start(call.across, place.mid_y);
  // Columns of z to the left of the first one.
  const int lead = Strip::kUp - 1 - along.tap;
  load_flrelu_filter(call.fu, Strip::kUpTaps, call.correlate, memory.up_taps);
  load_flrelu_filter(call.fd, Strip::kDownTaps, call.correlate, memory.down_taps);

  FlreluColumn<Strip> column{};
  column.row = place.mid_y, column.column = place.mid_x + threadIdx.x;
  column.live = threadIdx.x < (Strip::kWidth - 1) * Strip::kDown + Strip::kDownTaps && column.column >= 0 &&
                column.column < call.along.mid;
  const float* source = memory.upsampled + threadIdx.x + lead;
  if constexpr (kMode == FlreluMode::kReplay) {
    const int group = floor_divide(place.mid_y, kFlreluSignRows), row = place.mid_y - group * kFlreluSignRows;
    column.signs = flrelu_signs(call, place.plane, group, column.column) >> 2 * row;
    column.next_signs = flrelu_signs(call, place.plane, row == 0 ? group : group + 1, column.column);
  }

  // The chunk before the first has the window before the first row of z in its last rows. If that row begins with a new
  // input, the window is the inputs before it.
  int input_row = across.input - (across.tap == Strip::kUp - 1 ? 1 : 0) + Strip::kWindow - Strip::kInputRows;
  const int before = 1 - Strip::kPending - Strip::kOutputRows;
  const int rows = min(plan.height, call.across.out - place.out_y);
  for (int first = before; first < rows; first += Strip::kOutputRows, input_row += Strip::kInputRows) {
    const int skipped = first == before ? Strip::kInputRows - Strip::kWindow : 0;
    load_flrelu_tile<T>(call, plan, place.plane, input_row, along.input, Strip::kInputRows, Strip::kInputPitch,
                        memory.input, skipped);
    __syncthreads();
    flrelu_up_along(memory, skipped);
    __syncthreads();
    if (first == before) {
      load_flrelu_window(source + skipped * Strip::kPitch, column);
      continue;
    }
    if (column.live) {
      flrelu_column_from<Strip, kMode>(across.tap, call, place, memory, source, column);
    } else {
      for (int row = 0; row < Strip::kOutputRows; ++row) {
        memory.downsampled[row * Strip::kPitch + threadIdx.x] = 0;
      }
    }
    __syncthreads();
    flrelu_down_along<T>(call, plan, place, memory, first, rows);
  }
}

}  // namespace fastgan
