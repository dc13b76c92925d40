// The launches of patch_loss: plain C++, the same for nvcc's and csrc/simt's.
#pragma once

#include <cstdint>
#include <vector>

#include "map_list.h"

namespace fastgan {

// The functions of a logit and a constant, its anchor:
//   bce     softplus(x) - anchor x     square  (x - anchor)^2
//   linear  anchor x                   hinge   max(0, 1 + anchor x)
enum class PatchForm { kBce, kSquare, kLinear, kHinge };

// A map of logits, or a pair of them whose logits are x - y. Addresses that a kernel does not use are null.
struct PatchMap : MapPart {
  const void *x, *y;
  const void *plus_in, *minus_in;  // cotangents of the gradients of x and y
  void *plus, *minus;              // gradients
  float* slopes;                   // f', unscaled; null where nobody wants them
  float *accuracy, *pair_accuracy;
  unsigned per_sample;  // elements
  float factor;         // map_scale / elements
  float anchor;
  bool fake;  // what is right lies at or below the cut
  bool wide;  // 16-byte accesses of the maps
};

// Kernel parameters have 4 KB.
constexpr int kPatchMaps = 37;
struct PatchBatch {
  PatchMap maps[kPatchMaps];
  int count, span;
  MapSums sums;
  const float* sample_weight;  // [N], or null
  const float* grad_loss;
  float cut;
  PatchForm form;
};
static_assert(sizeof(PatchBatch) <= 4096);

// A call as its caller has it: all maps are dense, and those of a pair in one memory order.
struct PatchCall {
  struct Logits {
    const void* data;
    int64_t count, samples;
  };
  std::vector<Logits> real, fake;
  std::vector<double> scale;
  float real_anchor, fake_anchor;
  bool paired, real_slopes, fake_slopes;
};

// Slopes of all maps that want any.
inline int64_t patch_slopes(const PatchCall& call) {
  int64_t total = 0;
  const auto add = [&](const std::vector<PatchCall::Logits>& side) {
    for (const PatchCall::Logits& map : side) {
      total += map.count;
    }
  };
  if (call.paired ? call.real_slopes || call.fake_slopes : call.real_slopes) {
    add(call.real);
  }
  if (!call.paired && call.fake_slopes) {
    add(call.fake);
  }
  return total;
}

// The maps of a call that count, or those alone that want slopes; the slopes lie behind each other.
inline std::vector<PatchMap> patch_maps(const PatchCall& call, float* slopes, bool wanting) {
  std::vector<PatchMap> maps;
  const auto add = [&](const std::vector<PatchCall::Logits>& side, bool fake, bool wants) {
    for (size_t i = 0; i < side.size() && (wants || !wanting); ++i) {
      const PatchCall::Logits& logits = side[i];
      PatchMap map{};
      map.count = logits.count;
      map.x = logits.data;
      map.y = call.paired ? call.fake[i].data : nullptr;
      map.slopes = wants ? slopes : nullptr;
      slopes += wants ? logits.count : 0;
      map.per_sample = static_cast<unsigned>(std::max<int64_t>(1, logits.count / std::max<int64_t>(1, logits.samples)));
      map.factor = static_cast<float>(call.scale[i] / static_cast<double>(std::max<int64_t>(1, logits.count)));
      map.anchor = fake ? call.fake_anchor : call.real_anchor;
      map.fake = fake;
      maps.push_back(map);
    }
  };
  add(call.real, false, call.paired ? call.real_slopes || call.fake_slopes : call.real_slopes);
  if (!call.paired) {
    add(call.fake, true, call.fake_slopes);
  }
  return maps;
}

// Gives the maps that want slopes the call's gradients, or the cotangents of these: first those of the real side.
template <typename Pointer>
void set_patch_sides(const PatchCall& call, const std::vector<Pointer>& sides, Pointer PatchMap::* plus,
                     Pointer PatchMap::* minus, std::vector<PatchMap>& maps) {
  for (size_t i = 0; i < maps.size(); ++i) {
    if (!call.paired || call.real_slopes) {
      maps[i].*plus = sides[i];
    }
    if (call.paired && call.fake_slopes) {
      maps[i].*minus = sides[(call.real_slopes ? maps.size() : 0) + i];
    }
  }
}

// Where the accuracies are written, [maps] of each side: those of a pair on both.
inline void set_patch_accuracies(const PatchCall& call, float* real, float* fake, std::vector<PatchMap>& maps) {
  for (size_t i = 0; i < maps.size(); ++i) {
    maps[i].accuracy = maps[i].fake ? fake + (i - call.real.size()) : real + i;
    maps[i].pair_accuracy = call.paired ? fake + i : nullptr;
  }
}

inline MapWorkspace divide_patch_maps(std::vector<PatchMap>& maps, int item_bytes) {
  for (PatchMap& map : maps) {
    map.wide = all_aligned(map.x, map.y, map.plus_in, map.minus_in, map.plus, map.minus);
  }
  return divide_maps<kPatchMaps>(maps, kMapThreads * 16 / item_bytes);
}

}  // namespace fastgan
