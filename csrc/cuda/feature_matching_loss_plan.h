// The launches of feature_matching_loss: plain C++, the same for nvcc's and csrc/simt's.
#pragma once

#include <cstdint>
#include <vector>

#include "map_list.h"

namespace fastgan {

// A pair of features. Addresses that a kernel does not use are null.
struct FeatureMap : MapPart {
  const void *fake, *real;
  const void *fake_in, *real_in;  // cotangents of the gradients
  void *fake_out, *real_out;      // gradients
  const float* mask;              // [N, 1, ...], contiguous
  unsigned* signs;                // of the differences, two bits each
  float* factor;                  // what the sum of distances is multiplied by
  // Element e has the mask's element (e / run) * step + (e % run) % period.
  int64_t step;
  unsigned run, period;
  float weight;  // map_weight, divided by the elements where there is no mask
  bool wide;     // 16-byte accesses of the maps
};

// Kernel parameters have 4 KB.
constexpr int kFeatureMaps = 36;
struct FeatureBatch {
  FeatureMap maps[kFeatureMaps];
  int count, span;
  MapSums sums;
  const float* grad_loss;
  bool square;  // l2; else l1
};
static_assert(sizeof(FeatureBatch) <= 4096);

// A warp has so many consecutive elements at a time, whose signs take so many words.
constexpr int kSignBlock = 256, kSignWords = 16;
constexpr int kFeatureTile = kMapThreads / 32 * kSignBlock;

// A call as its caller has it: both sides of a map are dense in one memory order.
struct FeatureCall {
  struct Pair {
    const void *fake, *real;
    const float* mask;  // null without
    int64_t count, samples, channels;
    bool channels_last;
  };
  std::vector<Pair> pairs;
  bool square, want_fake, want_real;
};

// Words of all maps' signs, which lie behind each other.
inline int64_t sign_words(int64_t count) { return (count + kSignBlock - 1) / kSignBlock * kSignWords; }
inline int64_t feature_signs(const FeatureCall& call) {
  int64_t words = 0;
  for (const FeatureCall::Pair& pair : call.pairs) {
    words += sign_words(pair.count);
  }
  return words;
}

// The maps of a call. weights: of forward, else null; signs: null where there are none; reads: whether the features
// themselves are read.
inline std::vector<FeatureMap> feature_maps(const FeatureCall& call, const double* weights, unsigned* signs,
                                            float* factors, bool reads) {
  std::vector<FeatureMap> maps;
  for (size_t i = 0; i < call.pairs.size(); ++i) {
    const FeatureCall::Pair& pair = call.pairs[i];
    FeatureMap map{};
    map.count = pair.count;
    map.fake = reads ? pair.fake : nullptr;
    map.real = reads ? pair.real : nullptr;
    map.mask = pair.mask;
    map.signs = signs;
    signs += signs != nullptr ? sign_words(pair.count) : 0;
    map.factor = factors + i;
    const int64_t sample = std::max<int64_t>(1, pair.count / std::max<int64_t>(1, pair.samples));
    const int64_t pixels = pair.channels_last ? 1 : std::max<int64_t>(1, sample / std::max<int64_t>(1, pair.channels));
    map.run = static_cast<unsigned>(pair.channels_last ? pair.channels : sample);
    map.step = pixels;
    map.period = static_cast<unsigned>(pixels);
    if (weights != nullptr) {
      const int64_t divisor = pair.mask != nullptr ? 1 : std::max<int64_t>(1, pair.count);
      map.weight = static_cast<float>(weights[i] / static_cast<double>(divisor));
    }
    maps.push_back(map);
  }
  return maps;
}

// Gives all maps the gradients of the wanted sides, or the cotangents of these: first those of the generated side.
template <typename Pointer>
void set_feature_sides(const FeatureCall& call, const std::vector<Pointer>& sides, Pointer FeatureMap::* fake,
                       Pointer FeatureMap::* real, std::vector<FeatureMap>& maps) {
  for (size_t i = 0; i < maps.size(); ++i) {
    if (call.want_fake) {
      maps[i].*fake = sides[i];
    }
    if (call.want_real) {
      maps[i].*real = sides[(call.want_fake ? maps.size() : 0) + i];
    }
  }
}

inline MapWorkspace divide_feature_maps(std::vector<FeatureMap>& maps) {
  for (FeatureMap& map : maps) {
    map.wide = all_aligned(map.fake, map.real, map.fake_in, map.real_in, map.fake_out, map.real_out);
  }
  return divide_maps<kFeatureMaps>(maps, kFeatureTile);
}

}  // namespace fastgan
