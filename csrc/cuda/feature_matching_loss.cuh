// Device code of feature_matching_loss: the loss of all maps in one launch and one read of both sides, their gradients,
// and the gradient of these.
//
// The gradient of l1 needs only the sign of every difference, which the forward pass keeps in two bits: of 256 values,
// bits 2k and 2k + 1 of word j belong to value 16 k + j; 1 above zero, 2 below, 0 equal, 3 NaN. A warp has such a block
// at a time, and its lanes 2k and 2k + 1 have the values 16 k ... 16 k + 15 between them: then the votes of all lanes
// on one of their values hold the bits of two words, every second one of each, where the words have them.
#pragma once

#include "device.h"
#include "feature_matching_loss_plan.h"
#include "map_list.cuh"
#include "vectors.cuh"

namespace fastgan {

// Values of a lane in a block of signs.
constexpr int kLaneValues = kSignBlock / 32;

// Where in its block the lane's vector number v begins, of those of T.
template <typename T>
__device__ __forceinline__ int lane_vector(int v) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return kVector<T> == 8 ? 8 * lane : 16 * (lane / 2) + 8 * v + 4 * (lane % 2);
}

// Of a block of elements with `inside` before the end of the map, the lane's.
template <typename T>
__device__ __forceinline__ void load_block(const void* map, int64_t at, int inside, bool wide,
                                           float (&values)[kLaneValues]) {
#pragma unroll
  for (int v = 0; v < kLaneValues / kVector<T>; ++v) {
    const int begin = lane_vector<T>(v);
    load_run<kVector<T>>(static_cast<const T*>(map) + at + begin, inside - begin, wide, values + v * kVector<T>);
  }
}

template <typename T>
__device__ __forceinline__ void store_block(void* map, int64_t at, int inside, bool wide,
                                            const float (&values)[kLaneValues]) {
#pragma unroll
  for (int v = 0; v < kLaneValues / kVector<T>; ++v) {
    const int begin = lane_vector<T>(v);
    store_run<kVector<T>>(static_cast<T*>(map) + at + begin, inside - begin, wide, values + v * kVector<T>);
  }
}

// Elements of the first map minus those of the second. Either may be null, but not both.
template <typename T>
__device__ __forceinline__ void load_block_difference(const void* first, const void* second, int64_t at, int inside,
                                                      bool wide, float (&values)[kLaneValues]) {
  float other[kLaneValues];
  if (first != nullptr) {
    load_block<T>(first, at, inside, wide, values);
  }
  if (second == nullptr) {
    return;
  }
  load_block<T>(second, at, inside, wide, other);
#pragma unroll
  for (int k = 0; k < kLaneValues; ++k) {
    values[k] = first != nullptr ? values[k] - other[k] : -other[k];
  }
}

// What a block of threads has of its map, and where the mask is: counted from there, a division of 64 bits is dear.
struct FeatureStretch : MapStretch {
  const float* mask;
  unsigned place;  // of the first element in its run
};

__device__ inline FeatureStretch feature_stretch(const FeatureBatch& batch) {
  FeatureStretch stretch{stretch_of_block(batch), nullptr, 0};
  const FeatureMap& map = batch.maps[stretch.number];
  if (map.mask != nullptr) {
    const int64_t runs = stretch.start / map.run;
    stretch.mask = map.mask + runs * map.step;
    stretch.place = static_cast<unsigned>(stretch.start - runs * map.run);
  }
  return stretch;
}

// The mask at the lane's elements of the block at i; 0 outside.
template <typename T>
__device__ __forceinline__ void load_mask(const FeatureStretch& stretch, const FeatureMap& map, int i, int inside,
                                          float (&values)[kLaneValues]) {
#pragma unroll
  for (int v = 0; v < kLaneValues / kVector<T>; ++v) {
    const int begin = lane_vector<T>(v);
    unsigned place = stretch.place + i + begin;
    const unsigned runs = place / map.run;
    place -= runs * map.run;
    unsigned pixel = place % map.period;
    const float* mask = stretch.mask + runs * map.step;
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      values[v * kVector<T> + k] = begin + k < inside ? __ldg(mask + pixel) : 0.0f;
      if (++pixel == map.period) {
        pixel = 0;
      }
      if (++place == map.run) {
        place = pixel = 0;
        mask += map.step;
      }
    }
  }
}

// Packs the signs of a warp's differences, 0 outside of the map, into the words of its block.
template <typename T>
__device__ __forceinline__ void store_signs(const float (&differences)[kLaneValues], unsigned* words) {
  // Word j has the values at bit p of the votes on value k, for j = 8 p + k, or 8 (k / 4) + 4 p + k % 4 of float32.
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int value = kVector<T> == 8 ? lane % 8 : lane / 8 * 4 + lane % 4;
  const int parity = kVector<T> == 8 ? lane / 8 : lane / 4 % 2;
  unsigned above = 0, below = 0;
#pragma unroll
  for (int k = 0; k < kLaneValues; ++k) {
    const unsigned not_below = __ballot_sync(0xffffffffu, !(differences[k] <= 0.0f));
    const unsigned not_above = __ballot_sync(0xffffffffu, !(differences[k] >= 0.0f));
    if (k == value) {
      above = not_below;
      below = not_above;
    }
  }
  if (lane < kSignWords) {
    words[lane] = (above >> parity & 0x55555555u) | (below >> parity & 0x55555555u) << 1;
  }
}

// The lane's signs of a block: -1, 0, 1 or NaN.
template <typename T>
__device__ __forceinline__ void load_signs(const unsigned* words, float (&signs)[kLaneValues]) {
  const int lane = static_cast<int>(threadIdx.x % 32), shift = 2 * (lane / 2);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int begin = kVector<T> == 8 ? 8 * (lane % 2) + 4 * h : 8 * h + 4 * (lane % 2);
    const uint4 four = __ldg(reinterpret_cast<const uint4*>(words + begin));
    const unsigned packed[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int code = static_cast<int>(packed[k] >> shift & 3);
      signs[4 * h + k] = code == 3 ? __int_as_float(0x7fc00000) : static_cast<float>((code & 1) - (code >> 1));
    }
  }
}

// rho' at the lane's elements: of l1 from the signs, which are a sixteenth of one float32 side.
template <typename T>
__device__ __forceinline__ void load_slopes(const FeatureMap& map, bool square, int64_t at, int inside,
                                            float (&slopes)[kLaneValues]) {
  if (!square) {
    load_signs<T>(map.signs + at / (kSignBlock / kSignWords), slopes);
    return;
  }
  load_block_difference<T>(map.fake, map.real, at, inside, map.wide, slopes);
#pragma unroll
  for (int k = 0; k < kLaneValues; ++k) {
    slopes[k] *= 2.0f;
  }
}

// values[k] *= the mask, where there is one.
template <typename T>
__device__ __forceinline__ void multiply_by_mask(const FeatureStretch& stretch, const FeatureMap& map, int i,
                                                 int inside, float (&values)[kLaneValues]) {
  if (stretch.mask == nullptr) {
    return;
  }
  float mask[kLaneValues];
  load_mask<T>(stretch, map, i, inside, mask);
#pragma unroll
  for (int k = 0; k < kLaneValues; ++k) {
    values[k] *= mask[k];
  }
}

// Stores gradients of the generated side, and their negatives as those of the real one.
template <typename T>
__device__ __forceinline__ void store_gradients(const FeatureMap& map, int64_t at, int inside,
                                                float (&gradients)[kLaneValues]) {
  if (map.fake_out != nullptr) {
    store_block<T>(map.fake_out, at, inside, map.wide, gradients);
  }
  if (map.real_out != nullptr) {
#pragma unroll
    for (int k = 0; k < kLaneValues; ++k) {
      gradients[k] = -gradients[k];
    }
    store_block<T>(map.real_out, at, inside, map.wide, gradients);
  }
}

// The first block of signs of this warp among those of its block of threads.
__device__ __forceinline__ int first_of_warp() { return static_cast<int>(threadIdx.x / 32) * kSignBlock; }

// The loss, the factor of each map, and its signs where they are kept.
template <typename T>
__global__ void __launch_bounds__(kMapThreads, 4) matching_kernel(const __grid_constant__ FeatureBatch batch) {
  const FeatureStretch stretch = feature_stretch(batch);
  const FeatureMap& map = batch.maps[stretch.number];
  float sums[2] = {0, 0};
  for (int i = first_of_warp(); i < stretch.length; i += kFeatureTile) {
    const int64_t at = stretch.start + i;
    const int inside = stretch.length - i;
    float distances[kLaneValues];
    load_block_difference<T>(map.fake, map.real, at, inside, map.wide, distances);
    if (map.signs != nullptr) {
      store_signs<T>(distances, map.signs + at / (kSignBlock / kSignWords));
    }
#pragma unroll
    for (int k = 0; k < kLaneValues; ++k) {
      distances[k] = batch.square ? distances[k] * distances[k] : fabsf(distances[k]);
    }
    if (stretch.mask != nullptr) {
      float mask[kLaneValues], mass = 0;
      load_mask<T>(stretch, map, i, inside, mask);
#pragma unroll
      for (int k = 0; k < kLaneValues; ++k) {
        distances[k] *= mask[k];
        mass += mask[k];
      }
      sums[1] += mass;
    }
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kLaneValues; ++k) {
      sum += distances[k];
    }
    sums[0] += sum;
  }

  double totals[2];
  if (!sum_map(batch.sums, map, stretch.number, sums, totals)) {
    return;
  }
  float factor = map.weight;
  if (map.mask != nullptr) {
    // A mask of zeros averages nothing.
    factor = totals[1] == 0 ? 0.0f : static_cast<float>(factor / totals[1]);
  }
  if (threadIdx.x == 0) {
    *map.factor = factor;
  }
  sum_contributions(batch.sums, stretch.number, batch.count, static_cast<float>(factor * totals[0]));
}

// +- grad_loss factor mask rho'.
template <typename T>
__global__ void __launch_bounds__(kMapThreads, 4) matching_bwd_kernel(const __grid_constant__ FeatureBatch batch) {
  const FeatureStretch stretch = feature_stretch(batch);
  const FeatureMap& map = batch.maps[stretch.number];
  const float factor = __ldg(map.factor) * __ldg(batch.grad_loss);
  for (int i = first_of_warp(); i < stretch.length; i += kFeatureTile) {
    const int64_t at = stretch.start + i;
    const int inside = stretch.length - i;
    float gradients[kLaneValues];
    load_slopes<T>(map, batch.square, at, inside, gradients);
    multiply_by_mask<T>(stretch, map, i, inside, gradients);
#pragma unroll
    for (int k = 0; k < kLaneValues; ++k) {
      gradients[k] *= factor;
    }
    store_gradients<T>(map, at, inside, gradients);
  }
}

// The gradient of that, v the cotangent of the gradients: for the maps v grad_loss factor mask rho'', for grad_loss the
// sum of v factor mask rho'.
template <typename T>
__global__ void __launch_bounds__(kMapThreads, 4) matching_bwd_bwd_kernel(const __grid_constant__ FeatureBatch batch) {
  const FeatureStretch stretch = feature_stretch(batch);
  const FeatureMap& map = batch.maps[stretch.number];
  const float factor = __ldg(map.factor);
  // rho'' is 2 for the square, and 0 almost everywhere for the modulus.
  const float curvature = batch.square ? 2.0f * __ldg(batch.grad_loss) : 0.0f;
  float sums[2] = {0, 0};
  for (int i = first_of_warp(); i < stretch.length; i += kFeatureTile) {
    const int64_t at = stretch.start + i;
    const int inside = stretch.length - i;
    float v[kLaneValues], slopes[kLaneValues];
    load_block_difference<T>(map.fake_in, map.real_in, at, inside, map.wide, v);
    multiply_by_mask<T>(stretch, map, i, inside, v);
    load_slopes<T>(map, batch.square, at, inside, slopes);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kLaneValues; ++k) {
      // The factor comes before the sum: of half maps v may be as large as a loss scale.
      v[k] *= factor;
      sum += v[k] * slopes[k];
      v[k] *= curvature;
    }
    sums[0] += sum;
    store_gradients<T>(map, at, inside, v);
  }

  double totals[2];
  if (sum_map(batch.sums, map, stretch.number, sums, totals)) {
    sum_contributions(batch.sums, stretch.number, batch.count, static_cast<float>(totals[0]));
  }
}

}  // namespace fastgan
