// How kernels over a list of maps divide them among blocks: plain C++, the same for nvcc's launches and csrc/simt's.
//
// All maps of a launch travel as its parameter. A block has consecutive elements of one map, in whole tiles but for the
// map's end; every map has at least one block, since an empty one has results too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastgan {

// What the structure of a map begins with.
struct MapPart {
  int64_t count;            // elements
  int first_block, blocks;  // of its launch
};

// Where the blocks of a launch leave what they have added up; map_list.cuh.
struct MapSums {
  float* partial;        // [blocks, 2]
  float* contributions;  // [maps]
  unsigned* counters;    // [1 + maps], zero before and after
  float* result;         // the sum of all contributions
  bool continues;        // it is added to what the launches before have left there
};

constexpr int kMapThreads = 256;
// A thread adds up no more than so many vectors one after the other: rounding grows with their number.
constexpr int kMapTiles = 64;
// Some eight blocks for each of 128 multiprocessors.
constexpr int64_t kMapBlocks = 1024;

// What a call needs beside its tensors, for all of its launches.
struct MapWorkspace {
  int64_t floats = 0;  // the partial sums, then the contributions
  int64_t counters = 0;
  int64_t partial = 0;  // floats before the contributions
  int span = 0;         // elements of a block
};

// Divides all maps among blocks, in launches of kMost maps, each of which counts its blocks from 0.
template <int kMost, typename Map>
MapWorkspace divide_maps(std::vector<Map>& maps, int tile) {
  int64_t elements = 0;
  for (const Map& map : maps) {
    elements += map.count;
  }
  const int64_t tiles = (elements + kMapBlocks * tile - 1) / (kMapBlocks * tile);
  MapWorkspace needed;
  needed.span = static_cast<int>(std::clamp<int64_t>(tiles, 1, kMapTiles)) * tile;
  int blocks = 0;
  for (size_t i = 0; i < maps.size(); ++i) {
    blocks = i % kMost == 0 ? 0 : blocks;
    maps[i].first_block = blocks;
    maps[i].blocks = static_cast<int>(std::max<int64_t>(1, (maps[i].count + needed.span - 1) / needed.span));
    blocks += maps[i].blocks;
    needed.partial += 2 * static_cast<int64_t>(maps[i].blocks);
  }
  needed.floats = needed.partial + static_cast<int64_t>(maps.size());
  needed.counters = 2 * static_cast<int64_t>(maps.size());
  return needed;
}

// Fills a launch's maps from `begin` on; returns its blocks.
template <int kMost, typename Map, typename Batch>
int batch_maps(const std::vector<Map>& maps, size_t begin, Batch& batch) {
  batch.count = static_cast<int>(std::min<size_t>(kMost, maps.size() - begin));
  std::copy_n(maps.begin() + static_cast<int64_t>(begin), batch.count, batch.maps);
  const Map& last = batch.maps[batch.count - 1];
  return last.first_block + last.blocks;
}

// To the next launch of a call, after one of so many blocks and maps.
inline void advance_sums(MapSums& sums, int blocks, int maps) {
  sums.partial += 2 * static_cast<int64_t>(blocks);
  sums.contributions += maps;
  sums.counters += 1 + maps;
  sums.continues = true;
}

// Whether loads of 16 bytes may begin at each of these addresses; one that is null is not used.
template <typename... Pointers>
bool all_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace fastgan
