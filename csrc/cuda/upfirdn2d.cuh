// Device code of upfirdn2d: insert zeros, pad or crop, filter, keep every down-th pixel, and the epilogue, in one pass
// over the image.
//
// A block loads what its tile of results sees into shared memory, once, filters it there, and sends the sums through
// the epilogue to memory (upfirdn2d_plan.h has the tiles, upfirdn2d_tile.cuh the first and the last part). No inserted
// zero is multiplied: of the results, up neighbours share their inputs, each with its own phase of the filter
// (polyphase filtering: Vaidyanathan, "Multirate Systems and Filter Banks", 1993, section 4.3).
//
// Where factors and taps are known to the compiler (kFirCases), a thread goes down a column of the tile and keeps the
// latest rows in registers: filtered along x, if the filter is one vector for both axes or a matrix of rank one, which
// the block finds out itself; else as they are. Any other call is served by gather_fir.
//
// The filter is read by each block, so that launches on several streams and in graphs have their own.
#pragma once

#include <cfloat>
#include <type_traits>

#include "upfirdn2d_tile.cuh"

namespace fastgan {

// ---------------------------------------------------------------------------------------------------------------------
// Factors and taps known

template <int kUp, int kDown, int kTaps>
struct FirMarch {
  // Inputs along one axis that kUp neighbouring results see; of the first one tap 0 lies on the first input.
  static constexpr int kWindow = ((kUp - 1) * kDown + kTaps - 1) / kUp + 1;
  static constexpr int kStrip = fir_strip({kUp, kDown, kTaps});
  static constexpr int kInputRows = kWindow + (kStrip / kUp - 1) * kDown;
  static_assert((kUp == 1 || kDown == 1) && (kUp == 1 || kUp == 2 || kUp == 4));
  static_assert(kStrip % kUp == 0);
};

// The tap'th row and column factors, or the whole matrix, in registers.
template <int kTaps, bool kFull>
struct FirTaps {
  float x[kFull ? 1 : kTaps], y[kFull ? 1 : kTaps], full[kFull ? kTaps * kTaps : 1];
};

// What a row of inputs leaves behind: its results along x, or with kFull the inputs themselves.
template <int kUp, int kDown, int kTaps, int kStep, bool kFull>
__device__ __forceinline__ void read_fir_row(const float* source, const FirTaps<kTaps, kFull>& taps,
                                             float (&row)[kFull ? FirMarch<kUp, kDown, kTaps>::kWindow : kUp]) {
  constexpr int kWindow = FirMarch<kUp, kDown, kTaps>::kWindow;
  float window[kWindow];
#pragma unroll
  for (int i = 0; i < kWindow; ++i) {
    window[i] = source[i * kStep];
  }
  if constexpr (kFull) {
#pragma unroll
    for (int i = 0; i < kWindow; ++i) {
      row[i] = window[i];
    }
  } else {
#pragma unroll
    for (int o = 0; o < kUp; ++o) {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        if ((o * kDown + k) % kUp == 0) {
          sum += taps.x[k] * window[(o * kDown + k) / kUp];
        }
      }
      row[o] = sum;
    }
  }
}

// Result (oy, ox) of a group of kUp x kUp, from the rows that a ring holds; `first` is where the oldest lies.
template <int kUp, int kDown, int kTaps, bool kFull, int kRow>
__device__ __forceinline__ float sum_fir_rows(const float (&ring)[FirMarch<kUp, kDown, kTaps>::kWindow][kRow],
                                              const FirTaps<kTaps, kFull>& taps, int first, int oy, int ox) {
  constexpr int kWindow = FirMarch<kUp, kDown, kTaps>::kWindow;
  float sum = 0;
#pragma unroll
  for (int ky = 0; ky < kTaps; ++ky) {
    if ((oy * kDown + ky) % kUp != 0) {
      continue;
    }
    const float (&row)[kRow] = ring[(first + (oy * kDown + ky) / kUp) % kWindow];
    if constexpr (kFull) {
#pragma unroll
      for (int kx = 0; kx < kTaps; ++kx) {
        if ((ox * kDown + kx) % kUp == 0) {
          sum += taps.full[ky * kTaps + kx] * row[(ox * kDown + kx) / kUp];
        }
      }
    } else {
      sum += taps.y[ky] * row[ox];
    }
  }
  return sum;
}

// A strip of kStrip rows x kUp columns of results. Rows of inputs lie `pitch` apart, rows of results `out_pitch`.
template <int kUp, int kDown, int kTaps, int kStep, bool kFull>
__device__ __forceinline__ void march_fir(const float* __restrict__ inputs, int pitch,
                                          const FirTaps<kTaps, kFull>& taps, float* __restrict__ results,
                                          int out_pitch) {
  using March = FirMarch<kUp, kDown, kTaps>;
  // What neighbouring results in NCHW are stored as.
  using Group = std::conditional_t<kUp == 1, float, std::conditional_t<kUp == 2, float2, float4> >;
  float ring[March::kWindow][kFull ? March::kWindow : kUp];
#pragma unroll
  for (int i = 0; i < March::kInputRows; ++i) {
    read_fir_row<kUp, kDown, kTaps, kStep, kFull>(inputs + i * pitch, taps, ring[i % March::kWindow]);
    const int ready = i - (March::kWindow - 1);
    if (ready < 0 || ready % kDown != 0) {
      continue;
    }
#pragma unroll
    for (int oy = 0; oy < kUp; ++oy) {
      const int row = ready / kDown * kUp + oy;
      alignas(sizeof(Group)) float sums[kUp];
#pragma unroll
      for (int ox = 0; ox < kUp; ++ox) {
        sums[ox] = sum_fir_rows<kUp, kDown, kTaps, kFull>(ring, taps, ready, oy, ox);
      }
      if constexpr (kStep == 1) {
        // Counted in groups: of floats, nvcc does not see that the address is aligned.
        reinterpret_cast<Group*>(results)[row * (out_pitch / kUp)] = *reinterpret_cast<const Group*>(sums);
      } else {
#pragma unroll
        for (int ox = 0; ox < kUp; ++ox) {
          results[row * out_pitch + ox * kStep] = sums[ox];
        }
      }
    }
  }
}

// All strips of the tile.
template <int kUp, int kDown, int kTaps, int kStep, bool kFull>
__device__ __forceinline__ void march_fir_tile(const FirParams& p, const FirPlace& at, const float* inputs,
                                               const FirTaps<kTaps, kFull>& taps, float* tile) {
  constexpr int kStrip = FirMarch<kUp, kDown, kTaps>::kStrip;
  const FirAxis &across = p.across, &along = p.along;
  const int group_log2 = across.tile_log2 - fir_log2(kUp), strip_log2 = along.tile_log2 - fir_log2(kStrip);
  const int pitch = across.held * kStep, out_pitch = kStep << across.tile_log2;
  for (int i = threadIdx.x; i < 1 << (group_log2 + strip_log2 + p.unit_log2); i += kFirThreads) {
    const int rest = kStep == 1 ? i : i / kStep;
    const int group = rest & ((1 << group_log2) - 1);
    const int strip = rest >> group_log2 & ((1 << strip_log2) - 1);
    const int unit = kStep == 1 ? i >> (group_log2 + strip_log2) : i % kStep;
    const int row = strip * (kStrip / kUp * kDown), column = at.across.lead + group * kDown;
    const float* source = inputs + row * pitch + column * kStep;
    float* target = tile + strip * kStrip * out_pitch + group * kUp * kStep;
    source += kStep == 1 ? unit * along.held * pitch : unit;
    target += kStep == 1 ? unit * out_pitch << along.tile_log2 : unit;
    march_fir<kUp, kDown, kTaps, kStep, kFull>(source, pitch, taps, target, out_pitch);
  }
}

// Factor k of a correlation, in the filter's memory.
__device__ inline int fir_tap_index(const FirParams& p, int taps, int k) { return p.flip ? k : taps - 1 - k; }

// The first warp writes a kTaps x kTaps matrix as a column times a row, and returns whether it is that, to a few
// roundings of its elements: then half the products are enough.
template <int kTaps>
__device__ inline bool split_fir_matrix(const float* matrix, float* row, float* column) {
  static_assert(kTaps * kTaps == 16, "a power of two up to a warp");
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % 16;
  const float value = matrix[lane];
  float largest = fabsf(value);
  int pivot = lane;
  for (int distance = 8; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAll, largest, distance);
    const int other_lane = __shfl_xor_sync(kAll, pivot, distance);
    // All lanes have to agree, whatever is equal.
    if (other > largest || (other == largest && other_lane < pivot)) {
      largest = other, pivot = other_lane;
    }
  }
  pivot = __shfl_sync(kAll, pivot, 0);
  const float in_row = __shfl_sync(kAll, value, pivot / kTaps * kTaps + lane % kTaps);
  const float in_column = __shfl_sync(kAll, value, lane / kTaps * kTaps + pivot % kTaps);
  const float factor = in_column / __shfl_sync(kAll, value, pivot);
  // Written so that a NaN, or a matrix of zeros, has no such factors.
  const bool equal = fabsf(factor * in_row - value) <= 4 * FLT_EPSILON * fabsf(value);
  if (threadIdx.x < kTaps) {
    row[lane] = in_row;
  }
  if (threadIdx.x < kTaps * kTaps && lane % kTaps == 0) {
    column[lane / kTaps] = factor;
  }
  return __all_sync(kAll, equal);
}

// Filters a tile whose inputs lie in shared memory, with what the filter turns out to be.
template <int kUp, int kDown, int kTaps, int kStep>
__device__ __forceinline__ void filter_fir_tile(const FirParams& p, const FirPlace& at, const float* inputs,
                                                float* tile, const float* matrix, const float* row, const float* column,
                                                bool full) {
  if constexpr (kTaps <= 4) {
    if (full) {
      FirTaps<kTaps, true> taps;
#pragma unroll
      for (int k = 0; k < kTaps * kTaps; ++k) {
        taps.full[k] = matrix[k];
      }
      march_fir_tile<kUp, kDown, kTaps, kStep, true>(p, at, inputs, taps, tile);
      return;
    }
  }
  FirTaps<kTaps, false> taps;
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    taps.x[k] = row[k], taps.y[k] = column[k];
  }
  march_fir_tile<kUp, kDown, kTaps, kStep, false>(p, at, inputs, taps, tile);
}

// Of kFirCases[kCase].
template <typename T, int kCase, int kStep>
__global__ void __launch_bounds__(kFirThreads, 2) fir_kernel(const __grid_constant__ FirParams p) {
  constexpr FirCase kFir = kFirCases[kCase];
  constexpr int kTaps = kFir.taps;
  constexpr bool kMatrices = kTaps <= 4;
  FASTGAN_DYNAMIC_SHARED(float, inputs);
  FASTGAN_SHARED(float, matrix, [kMatrices ? kTaps * kTaps : kTaps]);
  FASTGAN_SHARED(float, row, [kTaps]);
  FASTGAN_SHARED(float, column, [kTaps]);
  FASTGAN_SHARED(bool, full, );
  const FirPlace at = fir_place<T, kStep, kFir.up>(p);
  const int factors = p.filter_stride == 0 ? kTaps : kTaps * kTaps, thread = threadIdx.x;
  if (thread < 32) {
    if (thread < factors) {
      const float factor = __ldg(p.f + fir_tap_index(p, factors, thread));
      if (kMatrices && p.filter_stride != 0) {
        matrix[thread] = factor;
      } else {
        row[thread] = factor;
        column[thread] = factor;
      }
    }
    bool rank_one = true;
    if constexpr (kMatrices) {
      if (p.filter_stride != 0) {
        __syncwarp();
        rank_one = split_fir_matrix<kTaps>(matrix, row, column);
      }
    }
    if (thread == 0) {
      full = !rank_one;
    }
  }
  load_fir_inputs<T, kStep>(p, at, at.across.in, at.along.in, inputs);
  __syncthreads();
  float* const tile = inputs + p.tile_offset;
  // Of one vector, the factors of both axes share their registers.
  filter_fir_tile<kFir.up, kFir.down, kTaps, kStep>(p, at, inputs, tile, matrix, row, kMatrices ? column : row, full);
  __syncthreads();
  finish_fir<T, kStep>(p, at, tile);
}

// ---------------------------------------------------------------------------------------------------------------------
// Any factors and taps

// The taps of a result that meet inputs begin ... end of those that are seen: the first one, its input, how many.
struct FirMeeting {
  int tap, input, count;
};

__device__ inline FirMeeting fir_meeting(const FirAxis& axis, const FirOrigin& origin, int result, int begin, int end) {
  const int position = result * axis.down + origin.phase + origin.lead * axis.up;
  FirMeeting m{(axis.up - position % axis.up) % axis.up, (position + axis.up - 1) / axis.up, 0};
  if (m.input < begin) {
    m.tap += (begin - m.input) * axis.up;
    m.input = begin;
  }
  m.count = m.tap < axis.taps ? max(0, min((axis.taps - 1 - m.tap) / axis.up + 1, end - m.input)) : 0;
  return m;
}

__device__ inline float fir_factor(const FirParams& p, const FirAxis& axis, int k) {
  return p.f ? __ldg(p.f + fir_tap_index(p, axis.taps, k)) : 1.0f;
}

__device__ inline float fir_factor(const FirParams& p, int ky, int kx) {
  if (p.filter_stride == 0) {
    return fir_factor(p, p.along, ky) * fir_factor(p, p.across, kx);
  }
  const int row = fir_tap_index(p, p.along.taps, ky), column = fir_tap_index(p, p.across.taps, kx);
  return __ldg(p.f + static_cast<int64_t>(row) * p.filter_stride + column);
}

// A piece of the inputs, from (row, column) of what the tile sees, and the tile's results from it: added to the sums
// before, unless it is the `first` piece along the axes that are summed.
struct FirPiece {
  int row, column;
  bool first;
};

// mid[row, result along x] from the inputs of a piece.
template <int kStep>
__device__ inline void gather_along_x(const FirParams& p, const FirPlace& at, const FirPiece& piece,
                                      const float* inputs, float* mid) {
  const FirAxis& across = p.across;
  const int width = 1 << across.tile_log2;
  for (int i = threadIdx.x; i < p.along.held << (across.tile_log2 + p.unit_log2); i += kFirThreads) {
    // Both are [.., row, column, ..] of whole planes or whole pixels, so that rows and units need not be told apart.
    const int unit = kStep == 1 ? 0 : i % kStep, rest = kStep == 1 ? i : i / kStep;
    const int result = rest & (width - 1), row = rest >> across.tile_log2;
    const FirMeeting m = fir_meeting(across, at.across, result, piece.column, piece.column + across.held);
    const float* source = inputs + (row * across.held + m.input - piece.column) * kStep + unit;
    float sum = 0;
    for (int k = 0; k < m.count; ++k) {
      sum += fir_factor(p, across, m.tap + k * across.up) * source[k * kStep];
    }
    mid[i] = piece.first ? sum : mid[i] + sum;
  }
}

// tile[row, column] from the inputs of a piece, or in the second of two passes from mid.
template <int kStep>
__device__ inline void gather_tile(const FirParams& p, const FirPlace& at, const FirPiece& piece, const float* inputs,
                                   float* tile) {
  const FirAxis &across = p.across, &along = p.along;
  const int plane_log2 = across.tile_log2 + along.tile_log2;
  const int pitch = (p.two_passes ? 1 << across.tile_log2 : across.held) * kStep;
  for (int i = threadIdx.x; i < 1 << (plane_log2 + p.unit_log2); i += kFirThreads) {
    const int unit = kStep == 1 ? i >> plane_log2 : i % kStep, rest = kStep == 1 ? i : i / kStep;
    const int result = rest & ((1 << across.tile_log2) - 1);
    const int row = rest >> across.tile_log2 & ((1 << along.tile_log2) - 1);
    const FirMeeting y = fir_meeting(along, at.along, row, piece.row, piece.row + along.held);
    const float* source = inputs + (kStep == 1 ? unit * along.held * pitch : unit) + (y.input - piece.row) * pitch;
    float sum = 0;
    if (p.two_passes) {
      for (int k = 0; k < y.count; ++k) {
        sum += fir_factor(p, along, y.tap + k * along.up) * source[k * pitch + result * kStep];
      }
    } else {
      const FirMeeting x = fir_meeting(across, at.across, result, piece.column, piece.column + across.held);
      source += (x.input - piece.column) * kStep;
      for (int ky = 0; ky < y.count; ++ky) {
        for (int kx = 0; kx < x.count; ++kx) {
          sum += fir_factor(p, y.tap + ky * along.up, x.tap + kx * across.up) * source[ky * pitch + kx * kStep];
        }
      }
    }
    tile[i] = piece.first ? sum : tile[i] + sum;
  }
}

template <typename T, int kStep>
__global__ void __launch_bounds__(kFirThreads, 2) fir_kernel_any(const __grid_constant__ FirParams p) {
  FASTGAN_DYNAMIC_SHARED(float, inputs);
  float *const tile = inputs + p.tile_offset, *const mid = inputs + p.mid_offset;
  const FirPlace at = fir_place<T, kStep, 0>(p);
  const int columns = at.across.lead + p.across.span;
  for (int row = 0; row < p.along.span; row += p.along.held) {
    for (int column = 0; column < columns; column += p.across.held) {
      load_fir_inputs<T, kStep>(p, at, at.across.in + column, at.along.in + row, inputs);
      __syncthreads();
      if (p.two_passes) {
        gather_along_x<kStep>(p, at, {row, column, column == 0}, inputs, mid);
      } else {
        gather_tile<kStep>(p, at, {row, column, row == 0 && column == 0}, inputs, tile);
      }
      __syncthreads();
    }
    if (p.two_passes) {
      gather_tile<kStep>(p, at, {row, 0, row == 0}, mid, tile);
      __syncthreads();
    }
  }
  finish_fir<T, kStep>(p, at, tile);
}

// ---------------------------------------------------------------------------------------------------------------------

using FirKernel = void (*)(const FirParams);

template <typename T, int kStep, int kCase = 0>
FirKernel choose_fir_kernel(int fir_case) {
  if constexpr (kCase < static_cast<int>(std::size(kFirCases))) {
    return fir_case == kCase ? fir_kernel<T, kCase, kStep> : choose_fir_kernel<T, kStep, kCase + 1>(fir_case);
  } else {
    return fir_kernel_any<T, kStep>;
  }
}

// The kernel of a plan, of T's and the layout's.
template <typename T>
FirKernel fir_kernel_of(const FirPlan& plan, bool channels_last) {
  return channels_last ? choose_fir_kernel<T, kFirChunk>(plan.fir_case) : choose_fir_kernel<T, 1>(plan.fir_case);
}

}  // namespace fastgan
