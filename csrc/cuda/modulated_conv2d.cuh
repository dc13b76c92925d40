// Device code of modulated_conv2d: a 3x3 convolution of stride 1 and padding 1 on tensor cores, with scales around it
// and all that follows it in one launch.
//
//   y[n, o] = clamp(gain act(out_scale[n, o] sum_i W[o, i] * (in_scale[n, i] x[n, i]) + noise strength + bias[o]))
//
// An implicit matrix product: rows are pixels, columns output channels, the depth runs over input channels and taps. A
// block (modulated_conv2d_plan.h) stages kConvDepth channels of its pixels with the border around them, once for all
// nine taps, and of the weight one tap after the other, kConvStages of them: cp.async brings the next ones while the
// tensor cores multiply. A pixel is read once by each block that has it, a weight once by each tile.
//
// in_scale is multiplied onto the staged pixels by the thread that copied them, just before the barrier that shows them
// to the others: in float32, rounded once. On the fragments that warps load it would be the same product nine times,
// for every tap, and again in each warp that has other channels of the same pixels; and a border would have to be kept
// from becoming 0 * infinity. In float16 the largest |in_scale| of the sample is divided out first and multiplied onto
// the sums: what half cannot hold, the layer's result may.
//
// Sums are in an order that depends on the shapes alone, also where blocks share the depth.
//
// Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN (2020), section 2.2 and equation 3.
#pragma once

#include <cstring>
#include <type_traits>

#include "modulated_conv2d_plan.h"
#include "ptx.h"

namespace fastgan {

template <typename T>
__device__ inline uint32_t pack_pair(float x, float y) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(x, y);
    memcpy(&bits, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    memcpy(&bits, &pair, 4);
  }
  return bits;
}

template <typename T>
__device__ inline float2 unpack_pair(uint32_t bits) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 pair;
    memcpy(&pair, &bits, 4);
    return __half22float2(pair);
  } else {
    __nv_bfloat162 pair;
    memcpy(&pair, &bits, 4);
    return __bfloat1622float2(pair);
  }
}

// Where 16 bytes of a row of kConvDepth channels lie, in units of 16 bytes: `chunk` is which, 0 ... 3. Two rows fill
// the 32 banks, so 16 bytes are in the banks 4 (row % 2 * 4 + (chunk ^ row / 2 % 4)) and the three behind: of one
// chunk, eight rows that differ modulo 8 are in different ones.
__device__ inline int conv_chunk(int row, int chunk) { return row * 4 + (chunk ^ (row / 2 & 3)); }

// What a block works on: its first sample, row, column and output channel.
struct ConvPlace {
  int sample, y, x, o;
};

// The part of the depth is the fastest part of a block's number, then output channels: blocks that run at the same time
// read the same pixels.
template <typename Tile>
__device__ inline ConvPlace conv_place(const ModulatedConv& conv) {
  ConvPlace place;
  int index = blockIdx.x / conv.splits;
  place.o = index % conv.tiles_o * Tile::kOutputs;
  index /= conv.tiles_o;
  place.x = index % conv.tiles_x * Tile::kWidth;
  index /= conv.tiles_x;
  place.y = index % conv.tiles_y * Tile::kHeight;
  place.sample = index / conv.tiles_y * Tile::kSamples;
  return place;
}

// Calls f(16 bytes of shared memory, sample within the tile, source, whether it is there) for each piece that this
// thread has of a stage's pixels: always the same eight channels.
template <typename T, typename Tile, typename F>
__device__ inline void visit_pixels(const ModulatedConv& conv, const ConvPlace& place, int stage, uint4* pixels, F f) {
  const int chunk = threadIdx.x % 4, channel = stage * kConvDepth + chunk * 8;
  // Beside the sums there are no registers for several at once.
#pragma unroll 1
  for (int slot = threadIdx.x / 4; slot < Tile::kSlots; slot += Tile::kThreads / 4) {
    const int sample = slot / Tile::kSlotsOfSample, n = place.sample + sample;
    const int y = place.y + slot / Tile::kPitch % (Tile::kHeight + 2) - 1, x = place.x + slot % Tile::kPitch - 1;
    const bool there = channel < conv.c_in && n < conv.samples && y >= 0 && y < conv.height && x >= 0 && x < conv.width;
    // An address that may be formed even where nothing is read from it.
    const int64_t offset = there ? n * conv.x_n + y * conv.x_h + x * conv.x_w + channel : 0;
    f(pixels + conv_chunk(slot, chunk), sample, static_cast<const T*>(conv.x) + offset, there);
  }
}

template <typename T, typename Tile>
__device__ inline void copy_pixels(const ModulatedConv& conv, const ConvPlace& place, int stage, uint4* pixels) {
  visit_pixels<T, Tile>(conv, place, stage, pixels, [](uint4* target, int, const T* source, bool there) {
    copy_async_or_zero<16>(target, source, there);
  });
}

// One tap of kOutputs channels: rows of kConvDepth input channels.
template <typename T, typename Tile>
__device__ inline void copy_weights(const ModulatedConv& conv, const ConvPlace& place, int stage, int tap,
                                    uint4* weights) {
  const int chunk = threadIdx.x % 4, channel = stage * kConvDepth + chunk * 8;
  const T* weight = static_cast<const T*>(conv.weight) + tap / 3 * conv.weight_h + tap % 3 * conv.weight_w;
  for (int row = threadIdx.x / 4; row < Tile::kOutputs; row += Tile::kThreads / 4) {
    const int o = place.o + row;
    const bool there = channel < conv.c_in && o < conv.c_out;
    const int64_t offset = there ? o * conv.weight_o + channel : 0;
    copy_async_or_zero<16>(weights + conv_chunk(row, chunk), weight + offset, there);
  }
}

// The largest |in_scale| of each of the tile's samples, or 1 for 0 and where there is none.
template <typename Tile>
__device__ inline void find_peaks(const ModulatedConv& conv, const ConvPlace& place, float* peaks) {
  for (int sample = threadIdx.x / 32; sample < Tile::kSamples; sample += Tile::kThreads / 32) {
    const int n = place.sample + sample;
    float peak = 0;
    for (int c = threadIdx.x % 32; conv.in_scale && n < conv.samples && c < conv.c_in; c += 32) {
      peak = fmaxf(peak, fabsf(__ldg(conv.in_scale + n * conv.in_scale_n + c * conv.in_scale_c)));
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, lanes));
    }
    if (threadIdx.x % 32 == 0) {
      peaks[sample] = peak == 0 ? 1 : peak;
    }
  }
  __syncthreads();
}

// in_scale onto the pixels of a stage that this thread has copied. The border stays 0, whatever the scale.
template <typename T, typename Tile>
__device__ inline void scale_pixels(const ModulatedConv& conv, const ConvPlace& place, int stage, uint4* pixels,
                                    const float* peaks) {
  if (!conv.in_scale) {
    return;
  }
  float scale[8];
  int loaded = -1;
  const int channel = stage * kConvDepth + threadIdx.x % 4 * 8;
  visit_pixels<T, Tile>(conv, place, stage, pixels, [&](uint4* target, int sample, const T*, bool there) {
    if (!there) {
      return;
    }
    if (sample != loaded) {
      loaded = sample;
      const float peak = std::is_same_v<T, __half> ? peaks[sample] : 1;
      const float* source = conv.in_scale + (place.sample + sample) * conv.in_scale_n + channel * conv.in_scale_c;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        scale[k] = __ldg(source + k * conv.in_scale_c) / peak;
      }
    }
    uint4 piece = *target;
    const auto scaled = [&](uint32_t bits, int k) {
      const float2 pair = unpack_pair<T>(bits);
      return pack_pair<T>(pair.x * scale[k], pair.y * scale[k + 1]);
    };
    piece.x = scaled(piece.x, 0), piece.y = scaled(piece.y, 2);
    piece.z = scaled(piece.z, 4), piece.w = scaled(piece.w, 6);
    *target = piece;
  });
}

// The sums of a thread: of fragment (i, j) those of lane l, as mma_16816 lays them out.
template <typename Tile>
using ConvSums = float[Tile::kRowFragments][Tile::kColumnFragments][4];

// Of a warp: its first pixel and its first output channel within the tile.
template <typename Tile>
__device__ inline int warp_pixel() {
  return threadIdx.x / 32 % Tile::kWarpRows * Tile::kRowFragments * 16;
}
template <typename Tile>
__device__ inline int warp_output() {
  return threadIdx.x / 32 / Tile::kWarpRows * Tile::kColumnFragments * 8;
}

// sums += the pixels that a tap meets times the tap's weights.
template <typename T, typename Tile>
__device__ inline void multiply_tap(const uint4* pixels, const uint4* weights, int tap, ConvSums<Tile>& sums) {
  const int lane = threadIdx.x % 32, pixel = warp_pixel<Tile>() + lane % 16;
  const int sample = pixel / Tile::kWidth % Tile::kSamples, y = pixel / (Tile::kWidth * Tile::kSamples) + tap / 3;
  const int slot = sample * Tile::kSlotsOfSample + y * Tile::kPitch + pixel % Tile::kWidth + tap % 3;
  const int row = warp_output<Tile>() + lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int chunk = 0; chunk < 4; chunk += 2) {
    uint32_t b[Tile::kColumnFragments / 2][4];
#pragma unroll
    for (int j = 0; j < Tile::kColumnFragments / 2; ++j) {
      load_matrices(b[j], weights + conv_chunk(row + 16 * j, chunk + lane / 8 % 2));
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowFragments; ++i) {
      uint32_t a[4];
      load_matrices(a, pixels + conv_chunk(slot + i * Tile::kSlotsOfFragment, chunk + lane / 16));
#pragma unroll
      for (int j = 0; j < Tile::kColumnFragments; ++j) {
        const uint32_t column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        mma_16816<T>(sums[i][j], a, column);
      }
    }
  }
}

// The block's part of the depth, in `memory`: two stages of pixels, then kConvStages taps of the weight.
template <typename T, typename Tile>
__device__ inline void multiply_conv(const ModulatedConv& conv, const ConvPlace& place, uint4* memory,
                                     const float* peaks, ConvSums<Tile>& sums) {
  constexpr int kPixels = Tile::kPixelBytes / 16, kWeights = Tile::kWeightBytes / 16;
  // A stage's pixels come with the group of the first tap before, and are scaled at the last one.
  static_assert(kConvStages <= kConvTaps);
  uint4* const weights = memory + 2 * kPixels;
  const int first = blockIdx.x % conv.splits * conv.depth_of_split;
  const int stages = min(conv.depth_of_split, (conv.c_in + kConvDepth - 1) / kConvDepth - first);
  const int steps = stages * kConvTaps;
  const auto request_weights = [&](int step) {
    if (step < steps) {
      copy_weights<T, Tile>(conv, place, first + step / kConvTaps, step % kConvTaps,
                            weights + step % kConvStages * kWeights);
    }
  };
  copy_pixels<T, Tile>(conv, place, first, memory);
  for (int step = 0; step < kConvStages - 1; ++step) {
    request_weights(step);
    commit_copies();
  }
  wait_copies<kConvStages - 2>();
  scale_pixels<T, Tile>(conv, place, first, memory, peaks);
  for (int step = 0; step < steps; ++step) {
    const int stage = step / kConvTaps, tap = step % kConvTaps;
    wait_copies<kConvStages - 2>();
    // Now all have this tap's weights, and nobody reads those of the tap before or the pixels of the stage before.
    __syncthreads();
    request_weights(step + kConvStages - 1);
    uint4* const next = memory + (stage + 1) % 2 * kPixels;
    const bool more = stage + 1 < stages;
    if (tap == 0 && more) {
      copy_pixels<T, Tile>(conv, place, first + stage + 1, next);
    }
    commit_copies();
    if (tap == kConvTaps - 1 && more) {
      scale_pixels<T, Tile>(conv, place, first + stage + 1, next, peaks);
    }
    multiply_tap<T, Tile>(memory + stage % 2 * kPixels, weights + step % kConvStages * kWeights, tap, sums);
  }
}

// Where several blocks share the depth: writes this one's sums, and in the last block to come here adds all of them, in
// the order of the depth. Whether this is that block.
template <typename Tile>
__device__ inline bool join_splits(const ModulatedConv& conv, ConvSums<Tile>& sums) {
  FASTGAN_SHARED(bool, last, );
  constexpr int kFragments = Tile::kRowFragments * Tile::kColumnFragments;
  const int tile = blockIdx.x / conv.splits;
  const auto of_split = [&](int64_t split) {
    return reinterpret_cast<float4*>(conv.partial) +
           (int64_t{tile} * conv.splits + split) * kFragments * Tile::kThreads + threadIdx.x;
  };
  float4* const own = of_split(blockIdx.x % conv.splits);
#pragma unroll
  for (int k = 0; k < kFragments; ++k) {
    const float* d = sums[k / Tile::kColumnFragments][k % Tile::kColumnFragments];
    own[k * Tile::kThreads] = make_float4(d[0], d[1], d[2], d[3]);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(conv.counters + tile, 1u) == static_cast<unsigned>(conv.splits) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) {
    return false;
  }
  memset(sums, 0, sizeof sums);
#pragma unroll 1
  for (int split = 0; split < conv.splits; ++split) {
#pragma unroll
    for (int k = 0; k < kFragments; ++k) {
      // Past the first-level cache, which does not see other blocks.
      const float4 part = __ldcg(of_split(split) + k * Tile::kThreads);
      float* d = sums[k / Tile::kColumnFragments][k % Tile::kColumnFragments];
      d[0] += part.x, d[1] += part.y, d[2] += part.z, d[3] += part.w;
    }
  }
  return true;
}

// clamp(gain act(z)), written so that a NaN stays one.
__device__ inline float activate_conv(const ModulatedConv& conv, float z) {
  const float activated = z < 0 ? (conv.relu ? 0 : z * conv.slope) : z;
  const float y = activated * conv.gain;
  return y > conv.clamp ? conv.clamp : y < -conv.clamp ? -conv.clamp : y;
}

// Rows 8 half ... 8 half + 7 of all fragments into `staged` [kPixels / 2, kResultPitch]. Half a warp stores four
// pixels' eight floats at once, and kResultPitch shifts each pixel by eight banks.
template <typename Tile>
__device__ inline void stage_sums(const ConvSums<Tile>& sums, int half, float* staged) {
  const int lane = threadIdx.x % 32, row = warp_pixel<Tile>() / 2 + lane / 4;
  const int column = warp_output<Tile>() + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < Tile::kRowFragments; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnFragments; ++j) {
      *reinterpret_cast<float2*>(staged + (row + 8 * i) * Tile::kResultPitch + column + 8 * j) =
          half == 0 ? make_float2(sums[i][j][0], sums[i][j][1]) : make_float2(sums[i][j][2], sums[i][j][3]);
    }
  }
}

// Everything behind the sums that stage_sums has left, four channels per thread: a warp writes 256 bytes of results in
// a row, or two of 128.
template <typename T, typename Tile>
__device__ inline void finish_sums(const ModulatedConv& conv, const ConvPlace& place, const float* peaks, int half,
                                   const float* staged) {
  constexpr int kPieces = Tile::kOutputs / 4;
  // A thread has always the same channels.
  static_assert(Tile::kThreads % kPieces == 0);
  const int column = threadIdx.x % kPieces * 4, o = place.o + column;
  const float strength = conv.strength ? __ldg(conv.strength) : 1;
  for (int row = threadIdx.x / kPieces; row < Tile::kPixels / 2 && o < conv.c_out; row += Tile::kThreads / kPieces) {
    const int pixel = row / 8 * 16 + half * 8 + row % 8;
    const int sample = pixel / Tile::kWidth % Tile::kSamples, n = place.sample + sample;
    const int x = place.x + pixel % Tile::kWidth, y = place.y + pixel / (Tile::kWidth * Tile::kSamples);
    if (n >= conv.samples || y >= conv.height || x >= conv.width) {
      continue;
    }
    const int64_t within = int64_t{y} * conv.width + x;
    const int64_t target = (int64_t{n} * conv.height * conv.width + within) * conv.c_out + o;
    const float4 sum = *reinterpret_cast<const float4*>(staged + row * Tile::kResultPitch + column);
    float z[4] = {sum.x, sum.y, sum.z, sum.w};
    if (std::is_same_v<T, __half>) {
      const float peak = peaks[sample];
      z[0] *= peak, z[1] *= peak, z[2] *= peak, z[3] *= peak;
    }
    if (conv.product) {
      *reinterpret_cast<float4*>(conv.product + target) = make_float4(z[0], z[1], z[2], z[3]);
    }
    const float noise = conv.noise ? __ldg(conv.noise + n * conv.noise_n + within) * strength : 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float scale =
          conv.out_scale ? __ldg(conv.out_scale + n * conv.out_scale_n + (o + k) * conv.out_scale_c) : 1;
      z[k] = activate_conv(conv, z[k] * scale + noise + (conv.bias ? __ldg(conv.bias + o + k) : 0));
    }
    *reinterpret_cast<uint2*>(static_cast<T*>(conv.y) + target) =
        make_uint2(pack_pair<T>(z[0], z[1]), pack_pair<T>(z[2], z[3]));
  }
}

// One tile per block, or its part of the depth. Empty before sm_80, which has neither cp.async nor this mma: who
// launches knows.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResidentBlocks)
    modulated_conv_kernel(const __grid_constant__ ModulatedConv conv) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  FASTGAN_DYNAMIC_SHARED(uint32_t, memory);
  FASTGAN_SHARED(float, peaks, [Tile::kSamples]);
  const ConvPlace place = conv_place<Tile>(conv);
  if (std::is_same_v<T, __half>) {
    find_peaks<Tile>(conv, place, peaks);
  }
  ConvSums<Tile> sums = {};
  multiply_conv<T, Tile>(conv, place, reinterpret_cast<uint4*>(memory), peaks, sums);
  if (conv.splits > 1 && !join_splits<Tile>(conv, sums)) {
    return;
  }
  // Half of the sums at a time: shared memory has no room for more, and the registers that they leave are needed.
  float* const staged = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Of what lies there nothing is read any more.
    __syncthreads();
    stage_sums<Tile>(sums, half, staged);
    __syncthreads();
    finish_sums<T, Tile>(conv, place, peaks, half, staged);
  }
#endif
}

}  // namespace fastgan
