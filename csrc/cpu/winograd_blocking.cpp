#include "winograd_blocking.h"

#include <algorithm>

#include "product.h"

namespace fastgan {

WinogradBlocking blocking_of(const ConvPlan& conv, const WinogradPlan& plan, Transforming transforming, int64_t depth,
                             int64_t slab, int64_t threads) {
  constexpr int64_t kTiles = 96 << 10;  // floats
  const int64_t near = kTiles / (plan.values * depth), tiles = near >= 24 ? near : plan.many_weights() ? 96 : 32;
  const int64_t all_lines = conv.n * plan.tiles_h, all_slabs = ceil_div(conv.c_out, slab);
  WinogradBlocking b{all_lines, 1, 1, plan.tiles_w, transforming == Transforming::kByThreads ? 1 : 4};
  if (plan.divides_weights()) {
    b.line_blocks = 1;
  } else if (tiles < plan.tiles_w && plan.aligned) {
    b.column_blocks = ceil_div(plan.tiles_w, tiles);
  } else {
    const int64_t lines = std::max<int64_t>(tiles / plan.tiles_w, 1);
    b.line_blocks = std::min(all_lines, round_up(ceil_div(all_lines, lines), threads));
  }
  b.lines = ceil_div(all_lines, b.line_blocks);
  b.columns = ceil_div(plan.tiles_w, b.column_blocks);
  b.slabs = std::min(b.slabs, ceil_div(all_slabs, ceil_div(threads, b.line_blocks * b.column_blocks)));
  return b;
}

WinogradBlocking blocking_of_growing(ConvPlan conv, int64_t per_axis, int64_t m, int64_t slab, GrowingTiles& growing) {
  if (!growing.threads) growing.threads = torch::stable::get_num_threads();
  const int64_t slabs = ceil_div(conv.c_out, slab);
  conv.c_in = growing.most;
  conv.c_out = 1;
  WinogradBlocking b =
      blocking_of(conv, WinogradPlan(conv, per_axis, m), Transforming::kInCalls, growing.most, slab, growing.threads);
  b.slabs = std::min<int64_t>(4, slabs);
  return b;
}

int64_t joined_phases(const ConvPlan& conv, const WinogradPlan& plan, int64_t slab) {
  const auto phases = static_cast<int64_t>(plan.phases.size());
  if (plan.forms.size() > 1 || conv.c_out > slab) return 1;
  int64_t joined = std::min(phases, product_lanes() * product_vectors() / slab);
  while (joined > 1 && phases % joined) --joined;
  return std::max<int64_t>(joined, 1);
}

}  // namespace fastgan
