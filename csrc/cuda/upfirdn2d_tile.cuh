// What the kernels of upfirdn2d.cuh have in common: where a block's tile lies, loading what it sees, the epilogue.
#pragma once

#include <cmath>

#include "activation.cuh"
#include "ptx.h"
#include "upfirdn2d_plan.h"

namespace fastgan {

__device__ inline int divide(unsigned n, const Divisor& by) {
  return static_cast<int>((__umulhi(n, by.multiplier) + n) >> by.shift);
}

// Divides n, and returns the remainder.
__device__ inline int split_off(int& n, const Divisor& by) {
  const int quotient = divide(static_cast<unsigned>(n), by);
  const int rest = n - quotient * static_cast<int>(by.divisor);
  n = quotient;
  return rest;
}

// Where a tile begins along one axis.
struct FirOrigin {
  int out;    // its first result; below zero where tiles are shifted
  int in;     // the first input in shared memory
  int lead;   // inputs there before the first one that is seen
  int phase;  // of the upsampled axis from input `in` + `lead` on, where the first result's tap 0 lies: 0 ... up - 1
};

// kUp: the axis' factor where the compiler knows it and tiles are shifted, else 0. align: a power of two that the first
// input in shared memory is a multiple of.
template <int kUp>
__device__ inline FirOrigin fir_origin(const FirAxis& axis, int tile, int align) {
  const int64_t out = (static_cast<int64_t>(tile) << axis.tile_log2) - axis.shift;
  const int64_t position = out * axis.down - axis.pad;
  int64_t first = position;
  if constexpr (kUp > 0) {
    static_assert((kUp & (kUp - 1)) == 0);
    first = position >> fir_log2(kUp);
  } else if (axis.up > 1) {
    first = position / axis.up;
    first -= first * axis.up > position;
  }
  const int lead = static_cast<int>(first & (align - 1));
  return {static_cast<int>(out), static_cast<int>(first) - lead, lead, static_cast<int>(position - first * axis.up)};
}

struct FirPlace {
  FirOrigin across, along;
  int first_unit, units;  // those that are there, of a tile's
  int sample;             // NHWC
};

// kStep: floats between neighbouring columns in shared memory, 1 in NCHW, kFirChunk in NHWC.
template <typename T, int kStep, int kUp>
__device__ inline FirPlace fir_place(const FirParams& p) {
  FirPlace at{};
  int block = static_cast<int>(blockIdx.x), group = 0, tile_x = 0;
  // In the order of memory: neighbouring blocks share what they see of the image.
  if constexpr (kStep == 1) {
    tile_x = split_off(block, p.tiles_x);
    const int tile_y = split_off(block, p.tiles_y);
    group = block;
    at.along = fir_origin<kUp>(p.along, tile_y, 1);
  } else {
    group = split_off(block, p.groups);
    tile_x = split_off(block, p.tiles_x);
    at.along = fir_origin<kUp>(p.along, split_off(block, p.tiles_y), 1);
    at.sample = block;
  }
  at.across = fir_origin<kUp>(p.across, tile_x, kStep == 1 && p.wide_in ? static_cast<int>(16 / sizeof(T)) : 1);
  at.first_unit = group << p.unit_log2;
  at.units = min(1 << p.unit_log2, p.units - at.first_unit);
  return at;
}

// ---------------------------------------------------------------------------------------------------------------------
// The image

// 16 bytes of the image as float, or zeros unless they are `there`.
template <typename T>
__device__ inline void load_wide(float* target, const T* source, bool there) {
  if constexpr (sizeof(T) == 4) {
    copy_async_or_zero<16>(target, source, there);
  } else {
    const uint4 loaded = there ? __ldg(reinterpret_cast<const uint4*>(source)) : uint4{};
    const T* values = reinterpret_cast<const T*>(&loaded);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      *reinterpret_cast<float4*>(target + i) =
          make_float4(static_cast<float>(values[i]), static_cast<float>(values[i + 1]),
                      static_cast<float>(values[i + 2]), static_cast<float>(values[i + 3]));
    }
  }
}

template <typename T>
__device__ inline void load_one(float* target, const T* source, bool there) {
  if constexpr (sizeof(T) == 4) {
    copy_async_or_zero<4>(target, source, there);
  } else {
    *target = there ? static_cast<float>(*source) : 0.0f;
  }
}

// A piece of the image into shared memory: of all units of the tile the columns from `column` on and the rows from
// `row` on, up to the last ones that are seen; zeros beside the image.
template <typename T, int kStep, bool kWide>
__device__ inline void load_fir_piece(const FirParams& p, const FirPlace& at, int column, int row, float* inputs) {
  constexpr int kVector = kWide ? 16 / sizeof(T) : 1;
  const T* x = static_cast<const T*>(p.x);
  const FirAxis &across = p.across, &along = p.along;
  const int columns = min(across.in, at.across.in + at.across.lead + across.span);
  const int rows = min(along.in, at.along.in + along.span);
  constexpr int kRunLoads = kStep / kVector;
  const int loads = (kStep == 1 ? across.held / kVector << p.unit_log2 : across.held * kRunLoads) * along.held;
#pragma unroll 4
  for (int i = threadIdx.x; i < loads; i += kFirThreads) {
    int rest = i, unit = 0, w = 0;
    if constexpr (kStep > 1) {
      unit = rest % kRunLoads * kVector;
      rest /= kRunLoads;
    }
    w = column + split_off(rest, p.runs) * (kStep == 1 ? kVector : 1);
    const int h = row + split_off(rest, p.rows);
    if constexpr (kStep == 1) {
      unit = rest;
    }
    const bool there = unit < at.units && w >= 0 && w < columns && h >= 0 && h < rows;
    const T* source = x;
    if constexpr (kStep == 1) {
      source += (static_cast<int64_t>(at.first_unit + unit) * along.in + h) * across.in + w;
    } else {
      source += ((static_cast<int64_t>(at.sample) * along.in + h) * across.in + w) * p.channels + at.first_unit + unit;
    }
    if constexpr (kWide) {
      load_wide(inputs + i * kVector, source, there);
    } else {
      load_one(inputs + i, source, there);
    }
  }
}

template <typename T, int kStep>
__device__ inline void load_fir_inputs(const FirParams& p, const FirPlace& at, int column, int row, float* inputs) {
  if (p.wide_in) {
    load_fir_piece<T, kStep, true>(p, at, column, row, inputs);
  } else {
    load_fir_piece<T, kStep, false>(p, at, column, row, inputs);
  }
  commit_copies();
  wait_copies<0>();
}

// ---------------------------------------------------------------------------------------------------------------------
// The epilogue

template <int kVector>
__device__ inline void load_floats(const float* source, float (&values)[kVector]) {
  if constexpr (kVector % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(source + i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  } else {
    values[0] = *source;
  }
}

// Results on their way: where they lie, and what is added to them before the activation.
struct FirSpot {
  int64_t offset;  // in y and in the residual
  const float *noise, *bias;
};

// Of element i of the tile, [unit, row, column] or [row, column, unit]; whether there is such a result.
template <int kStep>
__device__ inline bool find_fir_spot(const FirParams& p, const FirPlace& at, int i, FirSpot& spot) {
  const FirAxis &across = p.across, &along = p.along;
  const int pixel = kStep == 1 ? i : i / kStep;
  const int column = pixel & ((1 << across.tile_log2) - 1);
  const int row = pixel >> across.tile_log2 & ((1 << along.tile_log2) - 1);
  const int unit = kStep == 1 ? i >> (across.tile_log2 + along.tile_log2) : i % kStep;
  const int w = at.across.out + column, h = at.along.out + row;
  if (unit >= at.units || w < 0 || w >= across.out || h < 0 || h >= along.out) {
    return false;
  }
  const int first = at.first_unit + unit;
  int sample = at.sample, channel = first;
  if constexpr (kStep == 1) {
    sample = first;
    channel = split_off(sample, p.per_sample);
  }
  const int64_t in_plane = static_cast<int64_t>(h) * across.out + w,
                plane = static_cast<int64_t>(along.out) * across.out;
  spot.offset = kStep == 1 ? first * plane + in_plane : (sample * plane + in_plane) * p.channels + channel;
  spot.noise = p.noise ? p.noise + sample * p.noise_stride + in_plane : nullptr;
  spot.bias = p.bias ? p.bias + channel : nullptr;
  return true;
}

// act(fir_gain sum + strength noise + bias) of a curved one, in place. One by one and apart from the rest, for written
// out for vectors the curved functions would be most of the kernel.
template <int kStep>
__device__ inline void curve_fir_tile(const FirParams& p, const FirPlace& at, float strength, float* tile) {
  const int log2 = p.across.tile_log2 + p.along.tile_log2 + p.unit_log2;
#pragma unroll 1
  for (int i = threadIdx.x; i < 1 << log2; i += kFirThreads) {
    FirSpot spot;
    if (find_fir_spot<kStep>(p, at, i, spot)) {
      const float noise = spot.noise ? strength * __ldg(spot.noise) : 0.0f;
      const float z = tile[i] * p.fir_gain + noise + (spot.bias ? __ldg(spot.bias) : 0.0f);
      with_act(p.act, [&](auto act) {
        // The others are left to finish_fir_vector.
        if constexpr (is_curved(act)) {
          tile[i] = act_value<decltype(act)::value>(z, 0.0f);
        }
      });
    }
  }
}

// y = clamp(gain act(fir_gain sum + strength noise + bias)) + residual_gain residual of kVector results, whose sums,
// or values of a curved activation, lie in shared memory.
template <typename T, int kStep, int kVector>
__device__ inline void finish_fir_vector(const FirParams& p, const FirSpot& spot, float strength, const float* sums) {
  float values[kVector], along[kVector];
  const auto each = [&](auto&& step) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values[i] = step(values[i], i);
    }
  };
  load_floats(sums, values);
  alignas(16) T residual[kVector];
  if (p.residual) {
    const T* source = static_cast<const T*>(p.residual) + spot.offset;
    if constexpr (kVector > 1) {
      *reinterpret_cast<uint4*>(residual) = __ldg(reinterpret_cast<const uint4*>(source));
    } else {
      residual[0] = *source;
    }
  }
  if (is_curved(p.act)) {
    each([&](float value, int) { return value * p.gain; });
  } else {
    // One of the two is the same for the whole vector.
    const float* const scalar = kStep == 1 ? spot.bias : spot.noise;
    const float* const vector = kStep == 1 ? spot.noise : spot.bias;
    const float shift = scalar ? (kStep == 1 ? 1.0f : strength) * __ldg(scalar) : 0.0f;
    each([&](float value, int) { return value * p.fir_gain + shift; });
    if (vector) {
      load_floats(vector, along);
      each([&](float value, int i) { return value + (kStep == 1 ? strength : 1.0f) * along[i]; });
    }
    if (p.act == Act::kRelu) {
      // Zero times -infinity would be a NaN.
      each([](float value, int) { return value < 0 ? 0.0f : value; });
    }
    const float below = p.slope * p.gain;
    each([&](float value, int) { return value * (value < 0 ? below : p.gain); });
  }
  if (p.clamp < INFINITY) {
    // fminf would make a bound of a NaN.
    each([&](float value, int) { return value > p.clamp ? p.clamp : (value < -p.clamp ? -p.clamp : value); });
  }
  if (p.residual) {
    each([&](float value, int i) { return value + p.residual_gain * static_cast<float>(residual[i]); });
  }
  alignas(16) T out[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    out[i] = static_cast<T>(values[i]);
  }
  T* target = static_cast<T*>(p.y) + spot.offset;
  if constexpr (kVector > 1) {
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(out);
  } else {
    *target = out[0];
  }
}

template <typename T, int kStep, int kVector>
__device__ inline void finish_fir_tile(const FirParams& p, const FirPlace& at, float strength, const float* tile) {
  const int log2 = p.across.tile_log2 + p.along.tile_log2 + p.unit_log2;
  for (int i = threadIdx.x * kVector; i < 1 << log2; i += kFirThreads * kVector) {
    FirSpot spot;
    if (find_fir_spot<kStep>(p, at, i, spot)) {
      finish_fir_vector<T, kStep, kVector>(p, spot, strength, tile + i);
    }
  }
}

// The tile of sums through the epilogue to memory.
template <typename T, int kStep>
__device__ inline void finish_fir(const FirParams& p, const FirPlace& at, float* tile) {
  const float strength = p.strength ? __ldg(p.strength) : 1.0f;
  if (is_curved(p.act)) {
    curve_fir_tile<kStep>(p, at, strength, tile);
    __syncthreads();
  }
  if (p.wide_out) {
    finish_fir_tile<T, kStep, 16 / sizeof(T)>(p, at, strength, tile);
  } else {
    finish_fir_tile<T, kStep, 1>(p, at, strength, tile);
  }
}

}  // namespace fastgan
