// As much of CUDA's cooperative groups as a reduction needs: the block, tiles of up to a warp, cg::reduce.
#pragma once

#include <cstdint>

#include "block.h"
#include "types.h"
#include "warp.h"

namespace cooperative_groups {

class thread_block {
 public:
  unsigned thread_rank() const { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
  unsigned num_threads() const { return blockDim.x * blockDim.y * blockDim.z; }
  unsigned size() const { return num_threads(); }
  void sync(simt::Site site = simt::Site::here()) const { __syncthreads(site); }
};

inline thread_block this_thread_block() { return {}; }

template <unsigned kSize, typename = void>
class thread_block_tile {
  static_assert(kSize <= 32 && (kSize & (kSize - 1)) == 0, "a tile is a power of two of a warp's lanes");

 public:
  explicit thread_block_tile(unsigned rank_in_block) : rank_(rank_in_block) {}
  unsigned thread_rank() const { return rank_ % kSize; }
  unsigned meta_group_rank() const { return rank_ / kSize; }
  static constexpr unsigned num_threads() { return kSize; }
  static constexpr unsigned size() { return kSize; }
  void sync(simt::Site site = simt::Site::here()) const { __syncwarp(mask(), site); }
  template <typename T>
  T shfl(T value, int lane, simt::Site site = simt::Site::here()) const {
    return __shfl_sync(mask(), value, lane, kSize, site);
  }
  template <typename T>
  T shfl_down(T value, unsigned distance, simt::Site site = simt::Site::here()) const {
    return __shfl_down_sync(mask(), value, distance, kSize, site);
  }
  template <typename T>
  T shfl_xor(T value, int lanes, simt::Site site = simt::Site::here()) const {
    return __shfl_xor_sync(mask(), value, lanes, kSize, site);
  }
  unsigned ballot(int predicate, simt::Site site = simt::Site::here()) const {
    return __ballot_sync(mask(), predicate, site) >> shift() & (kSize == 32 ? 0xffffffffu : (1u << kSize % 32) - 1);
  }
  int any(int predicate, simt::Site site = simt::Site::here()) const { return __any_sync(mask(), predicate, site); }
  int all(int predicate, simt::Site site = simt::Site::here()) const { return __all_sync(mask(), predicate, site); }

 private:
  unsigned rank_;
  unsigned shift() const { return rank_ % 32 / kSize * kSize; }
  unsigned mask() const { return (kSize == 32 ? 0xffffffffu : (1u << kSize % 32) - 1) << shift(); }
};

template <unsigned kSize>
thread_block_tile<kSize> tiled_partition(const thread_block& block) {
  return thread_block_tile<kSize>(block.thread_rank());
}

template <typename T>
struct plus {
  T operator()(T a, T b) const { return a + b; }
};
template <typename T>
struct less {
  T operator()(T a, T b) const { return b < a ? b : a; }
};
template <typename T>
struct greater {
  T operator()(T a, T b) const { return a < b ? b : a; }
};

// In the order of a butterfly, so that all threads of the tile have the same bits.
template <unsigned kSize, typename T, typename F>
T reduce(const thread_block_tile<kSize>& tile, T value, F combine, simt::Site site = simt::Site::here()) {
  for (int lanes = kSize / 2; lanes > 0; lanes /= 2) {
    value = combine(value, tile.shfl_xor(value, lanes, site));
  }
  return value;
}

}  // namespace cooperative_groups
