#include "packed_layout.h"

#include <algorithm>

#include "bf16.h"
#include "product.h"
#include "winograd_weights.h"

namespace fastgan {
namespace {

constexpr int64_t kBlockPixels = 192;  // results of a phase that a slab's weights are read for

}  // namespace

template <typename Word>
PackedLayout<Word>::PackedLayout(const Tensor& x, const Tensor& weight, const ConvGeometry& g, Storage storage)
    : plan(x, weight, g),
      image(plan),
      word_bytes(storage == Storage::kBfloat16 ? sizeof(BFloat16) : sizeof(Word)),
      words(image.depth() / kPerWord),
      slab(slab_size(plan.c_out, storage)),
      slabs(ceil_div(plan.c_out, slab)),
      blocks([&] {
        const int64_t all = plan.n * plan.base_h, threads = torch::stable::get_num_threads();
        const int64_t least = ceil_div(all, std::max<int64_t>(kBlockPixels / plan.base_w, 1));
        // As many tasks for each thread.
        return std::min(all, slabs % threads ? round_up(least, threads) : least);
      }()),
      lines(ceil_div(plan.n * plan.base_h, blocks)),
      // Below 0: what Winograd's filtering makes of a weight has its tile there.
      key{-1, static_cast<int64_t>(storage), g.transposed, g.stride[0], weight.size(0), weight.size(1)} {
  for (const Phase& phase : plan.phases) {
    taps.push_back(taps_of(phase));
    words_of_slab += words * static_cast<int64_t>(taps.back().kernel.size());
    key.push_back(-1);
    key.insert(key.end(), taps.back().kernel.begin(), taps.back().kernel.end());
  }
}

template <typename Word>
bool PackedLayout<Word>::meets_pixel(const Tap& tap) const {
  const Sampling& in = plan.input;
  const auto meets = [&](int64_t results, int64_t shift, int64_t place, int64_t size) {
    const int64_t first = in.stride * shift + place, last = first + in.stride * (results - 1);
    return last >= 0 && first < size;
  };
  return in.reflect || (meets(plan.base_h, tap.dy, tap.plane / in.stride, in.h_in) &&
                        meets(plan.base_w, tap.dx, tap.plane % in.stride, in.w_in));
}

template <typename Word>
typename PackedLayout<Word>::PhaseTaps PackedLayout<Word>::taps_of(const Phase& phase) const {
  PhaseTaps found{.kernel = {}, .chunks = {}, .first = words_of_slab};
  // Of weights that stay in the first-level cache, which processors with wider registers have larger.
  const int64_t near_bytes = 2048 * product_lanes();
  const int64_t near = near_bytes / (slab * word_bytes), together = std::max<int64_t>(1, near / words);
  for (const Tap& tap : phase.taps) {
    if (!meets_pixel(tap)) continue;
    const int64_t at = image.offset(tap) / kPerWord, before = words * static_cast<int64_t>(found.kernel.size());
    for (int64_t k = 0; k < words; k += near) {
      if (words > near || found.kernel.size() % together == 0) {
        found.chunks.push_back({.taps = {}, .words = std::min(near, words - k), .first = before + k});
      }
      found.chunks.back().taps.push_back(static_cast<int32_t>(at + k));
    }
    found.kernel.push_back(tap.weight);
  }
  return found;
}

template struct PackedLayout<float>;
template struct PackedLayout<int32_t>;

}  // namespace fastgan
