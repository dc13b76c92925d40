// Device code for kernels over a list of maps (map_list.h): which part of which map a block has, and how all blocks'
// sums become one number per map and one per launch.
#pragma once

#include "device.h"
#include "map_list.h"
#include "reduce.cuh"

namespace fastgan {

// What a block has: elements start ... start + length of map `number` of its launch.
struct MapStretch {
  int number, length;
  int64_t start;
};

template <typename Batch>
__device__ inline MapStretch stretch_of_block(const Batch& batch) {
  const int block = static_cast<int>(blockIdx.x);
  int number = 0;
  while (number + 1 < batch.count && block >= batch.maps[number + 1].first_block) {
    ++number;
  }
  const int64_t start = static_cast<int64_t>(block - batch.maps[number].first_block) * batch.span;
  const int64_t left = batch.maps[number].count - start;
  return {number, static_cast<int>(left < batch.span ? left : batch.span), start};
}

// Adds up two numbers of every thread of every block of a map. True in the map's last block, whose threads then have
// the two totals; the second one is exact where it counts.
__device__ inline bool sum_map(const MapSums& sums, const MapPart& part, int number, float (&values)[2],
                               double (&totals)[2]) {
  block_sums<kMapThreads>(values);
  if (threadIdx.x == 0) {
    reinterpret_cast<float2*>(sums.partial)[blockIdx.x] = make_float2(values[0], values[1]);
  }
  if (!arrive(sums.counters + 1 + number, part.blocks)) {
    return false;
  }
  totals[0] = totals[1] = 0;
  for (int block = threadIdx.x; block < part.blocks; block += kMapThreads) {
    const float2 pair = __ldcg(reinterpret_cast<const float2*>(sums.partial) + part.first_block + block);
    totals[0] += pair.x;
    totals[1] += pair.y;
  }
  block_sums<kMapThreads>(totals);
  return true;
}

// Leaves what a map's last block contributes; the last of all maps writes the launch's result.
__device__ inline void sum_contributions(const MapSums& sums, int number, int maps, float contribution) {
  if (threadIdx.x == 0) {
    sums.contributions[number] = contribution;
  }
  if (!arrive(sums.counters, maps)) {
    return;
  }
  const int i = static_cast<int>(threadIdx.x);
  const double total = block_sum<kMapThreads>(i < maps ? static_cast<double>(__ldcg(sums.contributions + i)) : 0.0);
  if (i == 0) {
    *sums.result = static_cast<float>(sums.continues ? *sums.result + total : total);
  }
}

}  // namespace fastgan
