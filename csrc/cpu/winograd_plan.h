// Which tiles of an image Winograd's filtering transforms for a convolution, and which taps of the kernel.
#pragma once

#include <vector>

#include "conv_plan.h"

namespace fastgan {

// Floats of a cache line. One lies behind each product's matrices: powers of two apart, they would share one set of
// a cache.
constexpr int64_t kCacheLine = 16;

struct WinogradPlan {
  // What stands for a channel of x in the products: every stride-th pixel of it, from (y, x) on.
  struct Part {
    int64_t y, x;
  };
  // How a kernel's taps lie. Along an axis with a single one, m products serve a tile's m results, not t, and have the
  // weight in common.
  struct Form {
    bool single_y, single_x;
    int64_t y, x;      // rows and columns from the part's first to the tile's
    int64_t products;  // of a tile
    int64_t first;     // transformed values of a tile in the forms before
  };
  struct PhaseTaps {
    std::vector<std::vector<int64_t>> of_part;  // indices of the kernel's taps, the number of taps for one it has not
    int64_t shift_y, shift_x;                   // how far the first tile starts before 0, not positive
    size_t form;
    int64_t first_product, first_weight;  // products, and matrices of weights, of the phases before
  };

  int64_t m, r, t;  // F(m x m, r x r), t = m + r - 1
  int64_t stride;   // between the pixels of a part
  std::vector<Part> parts;
  std::vector<Form> forms;
  std::vector<PhaseTaps> phases;
  int64_t values, products;  // of a tile: transformed values in all forms, products of all phases
  int64_t weights;           // matrices of weights of all phases
  int64_t tiles_h, tiles_w;
  bool aligned;  // all phases' first tiles start at column 0
  Part origin;   // the first row and the first column of any part
  Part span;     // rows and columns from there on that the parts of one tile reach over

  // With tiles of `tile` x `tile` results; per_axis is taps_per_axis of the convolution, not 0.
  WinogradPlan(const ConvPlan& conv, int64_t per_axis, int64_t tile);

  int64_t part_depth, depth;  // of the products: channels of one part, and of all

  int64_t all_tiles() const { return all_tiles_; }
  int64_t all_weights() const { return weights * depth * c_out_; }
  // Whether the weights are more than stay in the third-level cache beside the tiles.
  bool many_weights() const;
  // Whether many of them meet so few tiles that all tiles are one block, whose weights the threads divide.
  bool divides_weights() const { return many_weights() && all_tiles_ <= 64; }

  // Matrices of weights of a phase whose taps lie like this.
  int64_t matrices_of(const Form& form) const { return (form.single_y ? 1 : t) * (form.single_x ? 1 : t); }

  // The matrix, of its phase, that a product's weights are.
  int64_t weight_of(const Form& form, int64_t product) const {
    const int64_t columns = form.single_x ? m : t, i = product / columns, j = product % columns;
    return (form.single_y ? 0 : i * (form.single_x ? 1 : t)) + (form.single_x ? 0 : j);
  }

 private:
  std::vector<Tap> starts_of(const ConvPlan& conv, int64_t per_axis) const;
  PhaseTaps taps_of_phase(const ConvPlan& conv, const Phase& phase, int64_t per_axis, const std::vector<Tap>& starts);
  size_t add_form(Form form);

  int64_t all_tiles_, c_out_;
};

// The most taps of a plane and phase, each way: 2, 3 or 4, else 0.
int64_t taps_per_axis(const ConvPlan& conv, int64_t kernel);

}  // namespace fastgan
