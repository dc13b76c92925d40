// How the tiles and the output channels of a call of Winograd's filtering are divided.
#pragma once

#include "winograd_conv.h"
#include "winograd_weights.h"

namespace fastgan {

// Sizes of one call.
struct WinogradBlocking {
  int64_t line_blocks, column_blocks;  // into which lines of tiles, and the tiles of a line, are divided
  int64_t lines, columns;              // of the largest block
  int64_t slabs;                       // of output channels whose sums are kept at a time
};

// A block is as large as stays in the second-level cache, if that is enough tiles to read the weights for. Else it has
// so many that reading them costs little: fewer for weights that stay in the third-level cache. Where weights that do
// not meet few tiles, all are one block, whose weights the threads divide: each transforms the tiles for itself, and
// where it transforms its weights as well, takes one slab at a time.
WinogradBlocking blocking_of(const ConvPlan& conv, const WinogradPlan& plan, Transforming transforming, int64_t depth,
                             int64_t slab, int64_t threads = torch::stable::get_num_threads());

// The same for every number of results, so that tiles stay where they are.
WinogradBlocking blocking_of_growing(ConvPlan conv, int64_t per_axis, int64_t m, int64_t slab, GrowingTiles& growing);

// Phases whose products are computed as one: those of the same tiles, where the output channels of a single phase would
// leave registers of a product empty.
int64_t joined_phases(const ConvPlan& conv, const WinogradPlan& plan, int64_t slab);

}  // namespace fastgan
