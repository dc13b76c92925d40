// The sums of an m x m tile of g with the r x r shifts of x are a small correlation too, so Winograd's filtering has a
// form for them (winograd.h): tiles of both are transformed, multiplied value by value and added up, and only the total
// is transformed back. Value by value, over all tiles, that is a matrix product of channels of x and channels of g.
//
// A 3x3 kernel of stride 1 is F(2x2, 3x3). A 4x4 kernel is four of 2x2 taps, F(3x3, 2x2), its parts: of stride 2 each
// meets every other row and column of x, of stride 1 each meets x at a shift.
//
// Tiles are cut into chunks of whole lines of tiles. For every chunk all threads transform x and g, 16 channels side by
// side; then tasks, blocks of input channels times blocks of output channels, add the chunk's products to their sums,
// and with the last chunk write their part of the gradient. Chunks and tasks depend on the shapes alone, and every sum
// is over the tiles in order.

#include "winograd_weight_grad.h"

#include <algorithm>
#include <array>

#include "channel_patch.h"
#include "large_buffer.h"
#include "product.h"
#include "quads.h"
#include "winograd.h"

namespace fastgan {
namespace {

constexpr int64_t kSide = 4, kValues = kSide * kSide;  // of a tile of x, and of every tile transformed
constexpr int64_t kMostTaps = 16;
constexpr int64_t kDepth = 256;               // tiles of one product: of 16 channels, 16 KB of each value
constexpr int64_t kChunk = 4 << 20;           // floats of transformed tiles per chunk, in the third-level cache
constexpr int64_t kRows = 64, kColumns = 64;  // channels of x (times parts) and of g per task: 256 KB of sums
constexpr int64_t kPatch = 2048;              // pixels that are transformed in one go: of 16 channels, 128 KB
constexpr int64_t kLongestLine = 1024;        // a chunk holds at least a line of tiles
// Behind each value's matrix one cache line: powers of two apart, the values of a tile would share one set of a cache.
constexpr int64_t kLine = 16;

// How a kernel is made of parts of r x r taps.
struct Parts {
  int64_t m, r, per_axis;
  int64_t shift, step;  // of one part from the next and of one tap from the next, in pixels of x and taps of the kernel

  Parts(int64_t kernel, int64_t stride)
      : m(kernel == 3 ? 2 : 3),
        r(kSide + 1 - m),
        per_axis(kernel == 3 ? 1 : 2),
        shift(stride == 2 ? 1 : 2),
        step(stride) {}

  int64_t count() const { return per_axis * per_axis; }
};

// Where each tap of kGroup kernels in their order is found, a line of kGroup floats each, among [kernel, part, its
// taps].
std::vector<int32_t> places(const Parts& parts, int64_t kernel) {
  const int64_t taps = kernel * kernel, r = parts.r;
  std::vector<int32_t> found(kGroup * taps);
  for (int64_t i = 0; i < kGroup * taps; ++i) {
    const int64_t part = i % taps / (r * r), tap = i % taps % (r * r);
    const int64_t y = part / parts.per_axis * parts.shift + tap / r * parts.step;
    const int64_t x = part % parts.per_axis * parts.shift + tap % r * parts.step;
    found[i / taps * taps + y * kernel + x] = static_cast<int32_t>(i * kGroup);
  }
  return found;
}

// to[o * row_stride + k] = from[places[k] + o], o and k < kQuad.
void transpose_quad(const float* from, const int32_t* places, float* to, int64_t row_stride) {
  register_t<float, 16> rows[kQuad];
  for (int k = 0; k < kQuad; ++k) rows[k] = load<register_t<float, 16>>(from + places[k]);
  transpose_quads(rows);
  for (int o = 0; o < kQuad; ++o) store(rows[o], to + o * row_stride);
}

class WeightGrad {
 public:
  WeightGrad(const ConvPlan& plan, int64_t kernel, const ConvGeometry& g)
      : plan_(plan),
        top_(g.padding[0]),
        left_(g.padding[1]),
        parts_(kernel, g.stride[0]),
        tiles_h_(ceil_div(plan.h_out, parts_.m)),
        tiles_w_(ceil_div(plan.w_out, parts_.m)),
        all_lines_(plan.n * tiles_h_),
        slab_(std::max(kGroup, product_lanes() * product_vectors())),
        x_groups_(ceil_div(plan.c_in, kGroup)),
        g_groups_(ceil_div(plan.c_out, kGroup)),
        groups_per_block_(kRows / kGroup / parts_.count()),
        group_blocks_(ceil_div(x_groups_, groups_per_block_)),
        slabs_(ceil_div(plan.c_out, slab_)),
        slabs_per_block_(std::max<int64_t>(1, kColumns / slab_)),
        slab_blocks_(ceil_div(slabs_, slabs_per_block_)),
        chunks_(ceil_div(all_lines_, std::max<int64_t>(1, tiles_per_chunk() / tiles_w_))),
        most_tiles_(ceil_div(all_lines_, chunks_) * tiles_w_),
        x_tiles_(x_groups_ * parts_.count() * x_part()),
        g_tiles_(slabs_ * g_slab()),
        places_(places(parts_, kernel)),
        sums_(chunks_ > 1 ? group_blocks_ * slab_blocks_ * sums_size() : 0) {}

  void run(const ScaledImage& x, const ScaledImage& g, float* grad) const;

 private:
  // Lines of tiles of one sample, and the number of their first tile in the chunk.
  struct Segment {
    int64_t sample, row, lines, tile;
  };

  // A task: groups of channels of x and slabs of channels of g.
  struct Block {
    int64_t group, groups, slab, slabs;
  };

  std::vector<Segment> segments_of(int64_t chunk) const;
  void transform(const std::vector<Segment>& segments, const ScaledImage& x, const ScaledImage& g) const;
  void transform_x(const Segment& segment, int64_t group, const ScaledImage& x, ChannelPatch& patch) const;
  void transform_g(const Segment& segment, int64_t group, const ScaledImage& g, ChannelPatch& patch) const;
  void multiply(const Block& block, int64_t tiles, bool first_chunk, float* sums) const;
  void write(const Block& block, const float* sums, float* grad) const;
  void write_group(int64_t group, int64_t channel, const float* sums, float* grad) const;

  int64_t tiles_per_chunk() const {
    return std::max(kDepth, kChunk / (kValues * (x_groups_ * parts_.count() * kGroup + slabs_ * slab_)));
  }
  int64_t first_line(int64_t chunk) const { return all_lines_ * chunk / chunks_; }
  // Rows (or columns) of x for so many lines of tiles, and of lines for so many pixels in a patch.
  int64_t x_rows(int64_t lines) const {
    return (lines * parts_.m + parts_.r - 2) * parts_.step + 1 + (parts_.per_axis - 1) * parts_.shift;
  }
  int64_t lines_per_patch() const {
    const int64_t rows = kPatch / x_rows(tiles_w_), line = parts_.m * parts_.step;
    return std::clamp<int64_t>((rows - x_rows(1)) / line + 1, 1, tiles_h_);
  }

  // x: [group, part, value, tile, kGroup]; g: [slab, value, tile, slab].
  int64_t x_value() const { return most_tiles_ * kGroup + kLine; }
  int64_t x_part() const { return kValues * x_value(); }
  int64_t g_value() const { return most_tiles_ * slab_ + kLine; }
  int64_t g_slab() const { return kValues * g_value(); }
  // The sums of a task: [value, group, part, kGroup of x, columns of g].
  int64_t sums_columns() const { return slabs_per_block_ * slab_; }
  int64_t sums_group() const { return parts_.count() * kGroup * sums_columns(); }
  int64_t sums_value() const { return groups_per_block_ * sums_group() + kLine; }
  int64_t sums_size() const { return kValues * sums_value(); }

  const ConvPlan& plan_;
  const int64_t top_, left_;
  const Parts parts_;
  const int64_t tiles_h_, tiles_w_, all_lines_;
  const int64_t slab_, x_groups_, g_groups_, groups_per_block_, group_blocks_, slabs_, slabs_per_block_, slab_blocks_;
  const int64_t chunks_, most_tiles_;
  const LargeBuffer x_tiles_, g_tiles_;
  const std::vector<int32_t> places_;
  const LargeBuffer sums_;
};

void WeightGrad::run(const ScaledImage& x, const ScaledImage& g, float* grad) const {
  for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
    transform(segments_of(chunk), x, g);
    const int64_t tiles = (first_line(chunk + 1) - first_line(chunk)) * tiles_w_;
    torch::stable::parallel_for(0, group_blocks_ * slab_blocks_, 1, [&](int64_t begin, int64_t end) {
      const LargeBuffer own(chunks_ > 1 ? 0 : sums_size());
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / slab_blocks_ * groups_per_block_, slab = task % slab_blocks_ * slabs_per_block_;
        const Block block{group, std::min(groups_per_block_, x_groups_ - group), slab,
                          std::min(slabs_per_block_, slabs_ - slab)};
        float* const sums = chunks_ > 1 ? sums_.get() + task * sums_size() : own.get();
        multiply(block, tiles, chunk == 0, sums);
        if (chunk + 1 == chunks_) write(block, sums, grad);
      }
    });
  }
}

std::vector<WeightGrad::Segment> WeightGrad::segments_of(int64_t chunk) const {
  std::vector<Segment> segments;
  const int64_t most = lines_per_patch();
  for (int64_t line = first_line(chunk), tile = 0; line < first_line(chunk + 1);) {
    const int64_t row = line % tiles_h_;
    const int64_t lines = std::min({most, tiles_h_ - row, first_line(chunk + 1) - line});
    segments.push_back({line / tiles_h_, row, lines, tile});
    line += lines;
    tile += lines * tiles_w_;
  }
  return segments;
}

void WeightGrad::transform(const std::vector<Segment>& segments, const ScaledImage& x, const ScaledImage& g) const {
  const int64_t groups = x_groups_ + g_groups_, most = lines_per_patch();
  torch::stable::parallel_for(0, static_cast<int64_t>(segments.size()) * groups, 1, [&](int64_t begin, int64_t end) {
    ChannelPatch x_patch(plan_.c_in, plan_.input.h_in, plan_.input.w_in, x_rows(most), x_rows(tiles_w_));
    ChannelPatch g_patch(plan_.c_out, plan_.h_out, plan_.w_out, most * parts_.m, tiles_w_ * parts_.m);
    for (int64_t task = begin; task < end; ++task) {
      const Segment& segment = segments[task / groups];
      const int64_t group = task % groups;
      if (group < x_groups_) {
        transform_x(segment, group, x, x_patch);
      } else {
        transform_g(segment, group - x_groups_, g, g_patch);
      }
    }
  });
}

void WeightGrad::transform_x(const Segment& segment, int64_t group, const ScaledImage& x, ChannelPatch& patch) const {
  const auto& kernels = winograd_kernels(parts_.m, parts_.r, false, false);
  const int64_t tile_step = parts_.m * parts_.step, row = patch.row_stride();
  patch.load(x, segment.sample, group * kGroup, segment.row * tile_step - top_, x_rows(segment.lines), -left_,
             x_rows(tiles_w_));
  for (int64_t part = 0; part < parts_.count(); ++part) {
    const float* const corner =
        patch.data() + part / parts_.per_axis * parts_.shift * row + part % parts_.per_axis * parts_.shift * kGroup;
    float* to = x_tiles_.get() + (group * parts_.count() + part) * x_part() + segment.tile * kGroup;
    for (int64_t line = 0; line < segment.lines; ++line) {
      for (int64_t column = 0; column < tiles_w_; ++column, to += kGroup) {
        kernels.input(corner + line * tile_step * row + column * tile_step * kGroup, parts_.step * row,
                      parts_.step * kGroup, nullptr, kGroup / product_lanes(), to, x_value(), 0);
      }
    }
  }
}

void WeightGrad::transform_g(const Segment& segment, int64_t group, const ScaledImage& g, ChannelPatch& patch) const {
  const auto& kernels = winograd_grad_kernels(parts_.r);
  const int64_t channel = group * kGroup, row = patch.row_stride();
  patch.load(g, segment.sample, channel, segment.row * parts_.m, segment.lines * parts_.m, 0, tiles_w_ * parts_.m);
  float* to = g_tiles_.get() + channel / slab_ * g_slab() + segment.tile * slab_ + channel % slab_;
  for (int64_t line = 0; line < segment.lines; ++line) {
    for (int64_t column = 0; column < tiles_w_; ++column, to += slab_) {
      kernels.cotangent(patch.data() + line * parts_.m * row + column * parts_.m * kGroup, row, kGroup,
                        kGroup / product_lanes(), to, g_value());
    }
  }
}

void WeightGrad::multiply(const Block& block, int64_t tiles, bool first_chunk, float* sums) const {
  const int64_t depths = ceil_div(tiles, kDepth), lanes = product_lanes(), units = block.groups * parts_.count();
  for (int64_t i = 0; i < kValues * depths; ++i) {
    const int64_t value = i / depths, first = tiles * (i % depths) / depths, end = tiles * (i % depths + 1) / depths;
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t rows = std::min(kGroup, plan_.c_in - (block.group + unit / parts_.count()) * kGroup);
      const float* const from = x_tiles_.get() + (block.group * parts_.count() + unit) * x_part() + value * x_value();
      float* const to = sums + value * sums_value() + unit * kGroup * sums_columns();
      for (int64_t s = 0; s < block.slabs; ++s) {
        const float* const columns = g_tiles_.get() + (block.slab + s) * g_slab() + value * g_value();
        const int64_t channels = std::min(slab_, plan_.c_out - (block.slab + s) * slab_);
        for (int64_t r = 0; r < rows; r += kPanelRows) {
          outer_products({.rows = from + first * kGroup + r,
                          .row_step = kGroup,
                          .row_count = std::min(kPanelRows, rows - r),
                          .columns = columns + first * slab_,
                          .column_step = slab_,
                          .vectors = round_up(channels, kGroup) / lanes,
                          .depth = end - first,
                          .sums = to + r * sums_columns() + s * slab_,
                          .sums_stride = sums_columns(),
                          .overwrite = first_chunk && first == 0});
        }
      }
    }
  }
}

void WeightGrad::write(const Block& block, const float* sums, float* grad) const {
  const int64_t first = block.slab * slab_, end = std::min(first + block.slabs * slab_, plan_.c_out);
  for (int64_t channel = first; channel < end; channel += kGroup) {
    for (int64_t i = 0; i < block.groups; ++i) {
      write_group(block.group + i, channel, sums + i * sums_group() + channel - first, grad);
    }
  }
}

// The gradient of a group of x and of kGroup channels of g from `channel` on, whose sums begin at `sums`.
void WeightGrad::write_group(int64_t group, int64_t channel, const float* sums, float* grad) const {
  const auto& kernels = winograd_grad_kernels(parts_.r);
  const int64_t rows = std::min(kGroup, plan_.c_in - group * kGroup), taps = plan_.taps, value = sums_value();
  std::array<float, kGroup * kMostTaps * kGroup> found;  // [channel of x, part, its taps, channel of g]
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t part = 0; part < parts_.count(); ++part) {
      kernels.taps(sums + (part * kGroup + i) * sums_columns(), kSide * value, value, kGroup / product_lanes(),
                   found.data() + (i * taps + part * parts_.r * parts_.r) * kGroup, kGroup);
    }
  }
  const int64_t channels = std::min(kGroup, plan_.c_out - channel), row_stride = plan_.c_in * taps;
  for (int64_t first = 0; first < channels; first += kQuad) {
    float* const to = grad + (channel + first) * row_stride + group * kGroup * taps;
    if (first + kQuad <= channels && rows * taps % kQuad == 0) {
      for (int64_t k = 0; k < rows * taps; k += kQuad) {
        transpose_quad(found.data() + first, places_.data() + k, to + k, row_stride);
      }
    } else {
      for (int64_t o = 0; o < std::min(kQuad, channels - first); ++o) {
        for (int64_t k = 0; k < rows * taps; ++k) to[o * row_stride + k] = found[places_[k] + first + o];
      }
    }
  }
}

}  // namespace

bool winograd_weight_grad_takes(const ConvPlan& plan, const std::vector<int64_t>& weight_size, const ConvGeometry& g) {
  const int64_t kernel = weight_size[2], stride = g.stride[0];
  if (kernel != weight_size[3] || g.dilation[0] != 1 || g.dilation[1] != 1 || plan.w_out > kLongestLine) return false;
  if (!(kernel == 3 && stride == 1) && !(kernel == 4 && stride <= 2)) return false;
  const Parts parts(kernel, stride);
  const int64_t tiles = plan.n * ceil_div(plan.h_out, parts.m) * ceil_div(plan.w_out, parts.m);
  const int64_t pairs = plan.c_in * plan.c_out, values = kValues * parts.count();
  // In products; a value costs as much to transform as so many of them. Measured over layers of 32 to 1024 channels.
  const int64_t transform = kernel == 3 ? 56 : 32;
  constexpr int64_t kWrite = 20;
  const int64_t direct = plan.n * plan.h_out * plan.w_out * plan.taps * pairs;
  const int64_t transforms = transform * tiles * kValues * (parts.count() * plan.c_in + plan.c_out);
  const int64_t filtered = tiles * values * pairs + transforms + kWrite * values * pairs;
  return plan.c_in >= kGroup && plan.c_out >= kGroup && filtered * 10 < direct * 9;
}

void winograd_weight_grad(const ConvPlan& plan, int64_t kernel, const ConvGeometry& g, const ScaledImage& x,
                          const ScaledImage& cotangent, float* grad) {
  WeightGrad(plan, kernel, g).run(x, cotangent, grad);
}

}  // namespace fastgan
