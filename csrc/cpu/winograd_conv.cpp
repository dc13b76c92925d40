// Every thread carries blocks of tiles through all three steps: the pixels of 16 channels at a time are gathered and
// transformed; for each product of the tiles there is one matrix product over channels, a group of output channels at a
// time; the sums are transformed back, laid out as lines of y and given their epilogue. A block is as large as the
// second-level cache, or where the weights are many, as large as it takes to read them seldom. Every sum has one order
// that depends on the shapes alone.

#include "winograd_conv.h"

#include <algorithm>
#include <array>

#include "algorithm.h"
#include "channel_patch.h"
#include "kept_weights.h"
#include "product.h"
#include "winograd.h"
#include "winograd_plan.h"

namespace fastgan {
namespace {

// Behind each product's matrix one cache line: powers of two apart, the matrices would share one set of a cache.
constexpr int64_t kLine = 16;
constexpr int64_t kPanelSize = kPanelRows * kPanelStride;
constexpr int64_t kMostMatrices = 36;  // of a phase, those of F(4 x 4, 3 x 3)

const WinogradKernels& kernels_of(const WinogradPlan& plan, const WinogradPlan::Form& form) {
  return winograd_kernels(plan.m, plan.r, form.single_y, form.single_x);
}

// Output channels side by side in the products.
int64_t slab_size() { return std::max(kGroup, product_lanes() * product_vectors()); }

// Weights of all products, transformed, in the order in which they are read: [slabs / together, matrix of a phase,
// chunk, together, depth of the chunk, slab].
class WinogradWeights {
 public:
  WinogradWeights(const ConvPlan& conv, const WinogradPlan& plan, int64_t together, const Tensor& weight,
                  const ConvGeometry& g, Storage storage)
      : conv_(conv),
        plan_(plan),
        storage_(storage),
        slab_(slab_size()),
        together_(together),
        size_(plan.depth * together * slab_ + kLine) {
    // The phases that there are, whose first taps decide where tiles start: a result of one line has one row of them.
    const std::vector<int64_t> key{plan.m,
                                   static_cast<int64_t>(storage),
                                   together,
                                   std::min(conv.out_stride, conv.h_out),
                                   std::min(conv.out_stride, conv.w_out),
                                   g.transposed,
                                   g.stride[0],
                                   g.padding[0],
                                   g.padding[1],
                                   weight.size(0),
                                   weight.size(1),
                                   weight.size(2),
                                   weight.stride(0)};
    data_ = made_of(weight.const_data_ptr<float>(), weight.numel(), key, [&] { return transformed(weight, g); });
  }

  Storage storage() const { return storage_; }

  // Of the chunk of `count` from `first` on, in the storage that they are in.
  const float* at(int64_t matrix, int64_t first, int64_t count, int64_t slab) const {
    return data_->get() + offset(matrix, first, count, slab);
  }
  const BFloat16* narrow_at(int64_t matrix, int64_t first, int64_t count, int64_t slab) const {
    return bf16_of(*data_) + offset(matrix, first, count, slab);
  }

 private:
  int64_t offset(int64_t matrix, int64_t first, int64_t count, int64_t slab) const {
    return (slab / together_ * plan_.weights + matrix) * size_ + first * together_ * slab_ +
           slab % together_ * count * slab_;
  }

  int64_t kernel_size() const { return (conv_.taps + 1) * kGroup; }
  LargeBuffer transformed(const Tensor& weight, const ConvGeometry& g) const;

  // Those of kGroup output channels from `place` on of a slab, and of input channels [first, first + count), from
  // their kernels [count, taps + 1, kGroup].
  void transform_group(const float* kernels, int64_t slab, int64_t place, int64_t first, int64_t count,
                       const LargeBuffer& to) const;
  // `matrices` of them for one input channel, [matrix, kGroup], to their place in each matrix.
  void narrow_group(const float* values, int64_t matrices, int64_t place, BFloat16* to) const;

  const ConvPlan& conv_;
  const WinogradPlan& plan_;
  const Storage storage_;
  const int64_t slab_, together_, size_;
  std::shared_ptr<const LargeBuffer> data_;
};

LargeBuffer WinogradWeights::transformed(const Tensor& weight, const ConvGeometry& g) const {
  const float* const values = weight.const_data_ptr<float>();
  const int64_t row = weight.stride(g.transposed ? 1 : 0), channel = weight.stride(g.transposed ? 0 : 1);
  const int64_t slabs = ceil_div(conv_.c_out, slab_), groups = slab_ / kGroup;
  const int64_t values_in_all = ceil_div(slabs, together_) * plan_.weights * size_;
  LargeBuffer result = storage_ == Storage::kFloat ? LargeBuffer(values_in_all, true) : bf16_buffer(values_in_all);
  constexpr int64_t kChannels = 16;
  const std::vector<float> ones(kGroup, 1.0f);
  torch::stable::parallel_for(0, slabs * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> kernels(kChannels * kernel_size());  // a tap of zeros behind each
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slab = task / groups, place = task % groups * kGroup, o = slab * slab_ + place;
      for (int64_t first = 0; first < plan_.part_depth; first += kChannels) {
        const int64_t count = std::min(kChannels, plan_.part_depth - first);
        for (int64_t i = 0; i < count; ++i) {
          gather_channels({.from = values + o * row + (first + i) * channel,
                           .channel = row,
                           .pixel = 1,
                           .channels = first + i < conv_.c_in ? std::clamp<int64_t>(conv_.c_out - o, 0, kGroup) : 0,
                           .pixels = conv_.taps,
                           .scale = ones.data(),
                           .to = kernels.data() + i * kernel_size()});
        }
        transform_group(kernels.data(), slab, place, first, count, result);
      }
    }
  });
  return result;
}

void WinogradWeights::transform_group(const float* kernels, int64_t slab, int64_t place, int64_t first, int64_t count,
                                      const LargeBuffer& to) const {
  const int64_t vectors = kGroup / product_lanes();
  std::array<float, kMostMatrices * kGroup> values;
  for (const auto& phase : plan_.phases) {
    const auto& form = plan_.forms[phase.form];
    const auto& transforms = kernels_of(plan_, form);
    for (size_t part = 0; part < plan_.parts.size(); ++part) {
      std::vector<int64_t> positions(phase.of_part[part]);
      for (int64_t& position : positions) position *= kGroup;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t k = static_cast<int64_t>(part) * plan_.part_depth + first + i,
                      chunk = k / kPanelDepth * kPanelDepth;
        const int64_t length = std::min(kPanelDepth, plan_.depth - chunk);
        const int64_t at = offset(phase.first_weight, chunk, length, slab) + (k - chunk) * slab_;
        if (storage_ == Storage::kFloat) {
          transforms.weight(kernels + i * kernel_size(), positions.data(), vectors, to.get() + at + place, size_);
        } else {
          transforms.weight(kernels + i * kernel_size(), positions.data(), vectors, values.data(), kGroup);
          narrow_group(values.data(), plan_.matrices_of(form), place, bf16_of(to) + at);
        }
      }
    }
  }
}

void WinogradWeights::narrow_group(const float* values, int64_t matrices, int64_t place, BFloat16* to) const {
  std::array<int64_t, kGroup> places;
  for (int64_t c = 0; c < kGroup; ++c) places[c] = paired(place + c, product_lanes());
  for (int64_t matrix = 0; matrix < matrices; ++matrix, values += kGroup, to += size_) {
    for (int64_t c = 0; c < kGroup; ++c) to[places[c]] = BFloat16(values[c]);
  }
}

// Sizes of one call.
struct Blocking {
  int64_t line_blocks, column_blocks;  // into which lines of tiles, and the tiles of a line, are divided
  int64_t lines, columns;              // of the largest block
  int64_t slabs;                       // of output channels whose sums are kept at a time
};

// A block is as large as stays in the second-level cache, if that is enough tiles to read the weights for. Else it has
// so many that reading them costs little: fewer for weights that stay in the third-level cache. Where weights that do
// not meet few tiles, all are one block, whose weights the threads divide: each transforms the tiles for itself.
Blocking blocking_of(const ConvPlan& conv, const WinogradPlan& plan, int64_t depth, int64_t threads) {
  constexpr int64_t kTiles = 96 << 10;  // floats
  const int64_t near = kTiles / (plan.values * depth), tiles = near >= 24 ? near : plan.many_weights() ? 96 : 32;
  const int64_t all_lines = conv.n * plan.tiles_h, all_slabs = ceil_div(conv.c_out, slab_size());
  Blocking b{all_lines, 1, 1, plan.tiles_w, 4};
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

// The same for every number of results, so that tiles stay where they are.
Blocking blocking_of_growing(ConvPlan conv, int64_t per_axis, int64_t m, GrowingTiles& growing) {
  if (!growing.threads) growing.threads = torch::stable::get_num_threads();
  const int64_t slabs = ceil_div(conv.c_out, slab_size());
  conv.c_in = growing.most;
  conv.c_out = 1;
  Blocking b = blocking_of(conv, WinogradPlan(conv, per_axis, m), growing.most, growing.threads);
  b.slabs = std::min<int64_t>(4, slabs);
  return b;
}

class Call {
 public:
  Call(const ConvPlan& conv, int64_t m, const Tensor& weight, const ConvGeometry& g, Storage storage,
       GrowingTiles* growing = nullptr)
      : conv_(conv),
        growing_(growing),
        first_channel_(growing ? growing->channels : 0),
        plan_(conv, taps_per_axis(conv, weight.size(2)), m),
        phases_(static_cast<int64_t>(plan_.phases.size())),
        lanes_(product_lanes()),
        slab_(slab_size()),
        most_depth_(growing ? growing->most : plan_.depth),
        blocking_(growing ? blocking_of_growing(conv, taps_per_axis(conv, weight.size(2)), m, *growing)
                          : blocking_of(conv, plan_, plan_.depth, torch::stable::get_num_threads())),
        weights_(conv, plan_, blocking_.slabs, weight, g, storage) {}

  void run(const ScaledImage& x, const PlanarResult& result) const;

 private:
  // One thread's buffers.
  struct Buffers {
    ChannelPatch patch;
    LargeBuffer own_tiles, sums, lines;
    float* tiles;
    PlaneWriter writer;
    std::vector<float> line;
  };

  // Tiles of a block: lines of tiles, counted through all samples, and a stretch of each.
  struct Block {
    int64_t line, lines, column, columns;
    int64_t tiles() const { return lines * columns; }
  };

  // Calls f(sample, row of tiles, lines, line from the block's first) for the samples that a block's lines are of.
  template <typename F>
  void for_samples(const Block& block, F&& f) const {
    for (int64_t done = 0; done < block.lines;) {
      const int64_t row = (block.line + done) % plan_.tiles_h;
      const int64_t count = std::min(block.lines - done, plan_.tiles_h - row);
      f((block.line + done) / plan_.tiles_h, row, count, done);
      done += count;
    }
  }

  // One product of matrices: of which of a tile's values, with which weights, into which sums.
  struct Product {
    int64_t value, matrix, sums;
  };

  void transform_input(const ScaledImage& x, const Block& block, Buffers& b) const;
  void multiply(const Block& block, int64_t first_slab, int64_t slabs, Buffers& b) const;
  void multiply_product(const Block& block, int64_t first_slab, int64_t slabs, const Product& product,
                        Buffers& b) const;
  void transform_output(const Block& block, int64_t channel, const float* sums, Buffers& b) const;
  void write_lines(const Block& block, int64_t channel, Buffers& b) const;

  int64_t panels(int64_t tiles) const { return ceil_div(tiles, kPanelRows); }
  int64_t most_tiles() const { return blocking_.lines * blocking_.columns; }
  // [value, chunk, panel, kPanelRows, kPanelStride]
  int64_t tile_value() const { return ceil_div(most_depth_, kPanelDepth) * panels(most_tiles()) * kPanelSize + kLine; }
  // [product, tile, slabs]
  int64_t sum_row() const { return blocking_.slabs * slab_ + kLine; }
  int64_t sum_product() const { return most_tiles() * sum_row() + kLine; }
  // [phase, kGroup, line of tiles, m, columns of tiles, m]; a line's last tile is written as four columns.
  int64_t line_row() const { return blocking_.columns * plan_.m + 4 - plan_.m; }
  int64_t line_channel() const { return blocking_.lines * plan_.m * line_row() + kLine; }

  const ConvPlan& conv_;
  GrowingTiles* const growing_;
  const int64_t first_channel_;  // of x
  const WinogradPlan plan_;
  const int64_t phases_, lanes_, slab_, most_depth_;
  const Blocking blocking_;
  const WinogradWeights weights_;
};

void Call::run(const ScaledImage& x, const PlanarResult& result) const {
  count_winograd(plan_.m, plan_.r);
  const int64_t all_lines = conv_.n * plan_.tiles_h, slabs = ceil_div(conv_.c_out, slab_);
  const int64_t line_blocks = blocking_.line_blocks, column_blocks = blocking_.column_blocks;
  // Where there are fewer blocks than threads, several threads transform the same tiles, each for its own channels.
  const int64_t threads = torch::stable::get_num_threads(), blocks = line_blocks * column_blocks;
  const int64_t groups = ceil_div(slabs, blocking_.slabs);
  const int64_t shares = growing_ ? 1 : std::min(groups, ceil_div(threads, blocks));
  const int64_t block_values = plan_.values * tile_value();
  if (growing_ && !growing_->data.get()) growing_->data = LargeBuffer(blocks * block_values);
  torch::stable::parallel_for(0, blocks * shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t rows = plan_.stride * plan_.m * (std::min(blocking_.lines, plan_.tiles_h) - 1) + plan_.span.y;
    const int64_t columns = plan_.stride * plan_.m * (blocking_.columns - 1) + plan_.span.x;
    Buffers b{.patch = ChannelPatch(conv_.c_in - first_channel_, conv_.input.h_in, conv_.input.w_in, rows, columns),
              .own_tiles = LargeBuffer(growing_ ? 0 : block_values),
              .sums = LargeBuffer(plan_.products * sum_product()),
              .lines = LargeBuffer(phases_ * kGroup * line_channel()),
              .tiles = b.own_tiles.get(),
              .writer = PlaneWriter(result),
              .line = std::vector<float>(conv_.w_out)};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t share = task % shares, place = task / shares;
      const int64_t line = place / column_blocks, column = place % column_blocks;
      Block block{all_lines * line / line_blocks, 0, plan_.tiles_w * column / column_blocks, 0};
      block.lines = all_lines * (line + 1) / line_blocks - block.line;
      block.columns = plan_.tiles_w * (column + 1) / column_blocks - block.column;
      if (growing_) b.tiles = growing_->data.get() + place * block_values;
      transform_input(x, block, b);
      for (int64_t group = groups * share / shares; group < groups * (share + 1) / shares; ++group) {
        const int64_t slab = group * blocking_.slabs, count = std::min(blocking_.slabs, slabs - slab);
        multiply(block, slab, count, b);
        for (int64_t c = 0; c < count * slab_ && slab * slab_ + c < conv_.c_out; c += kGroup) {
          transform_output(block, slab * slab_ + c, b.sums.get() + c, b);
        }
      }
    }
  });
}

void Call::transform_input(const ScaledImage& x, const Block& block, Buffers& b) const {
  const int64_t step = plan_.stride * plan_.m, value = tile_value(), row_stride = b.patch.row_stride();
  for (int64_t channel = first_channel_; channel < conv_.c_in; channel += kGroup) {
    const int64_t vectors = std::min(kGroup, plan_.part_depth - channel) / lanes_;
    for_samples(block, [&](int64_t sample, int64_t row, int64_t count, int64_t done) {
      b.patch.load(x, sample, channel - first_channel_, row * step + plan_.origin.y, (count - 1) * step + plan_.span.y,
                   block.column * step + plan_.origin.x, (block.columns - 1) * step + plan_.span.x);
      int64_t k = channel;
      for (const auto& part : plan_.parts) {
        for (const auto& form : plan_.forms) {
          const auto& kernels = kernels_of(plan_, form);
          const float* const corner = b.patch.data() + (part.y + form.y - plan_.origin.y) * row_stride +
                                      (part.x + form.x - plan_.origin.x) * kGroup;
          float* const to =
              b.tiles + form.first * value + k / kPanelDepth * panels(block.tiles()) * kPanelSize + k % kPanelDepth;
          for (int64_t l = 0; l < count; ++l) {
            for (int64_t c = 0; c < block.columns; ++c) {
              const int64_t tile = (done + l) * block.columns + c;
              kernels.input(corner + l * step * row_stride + c * step * kGroup, plan_.stride * row_stride,
                            plan_.stride * kGroup, vectors,
                            to + tile / kPanelRows * kPanelSize + tile % kPanelRows * kPanelStride, value);
            }
          }
        }
        k += plan_.part_depth;
      }
    });
  }
}

void Call::multiply(const Block& block, int64_t first_slab, int64_t slabs, Buffers& b) const {
  for (const auto& phase : plan_.phases) {
    const auto& form = plan_.forms[phase.form];
    for (int64_t product = 0; product < form.products; ++product) {
      multiply_product(block, first_slab, slabs,
                       {.value = form.first + product,
                        .matrix = phase.first_weight + plan_.weight_of(form, product),
                        .sums = phase.first_product + product},
                       b);
    }
  }
}

void Call::multiply_product(const Block& block, int64_t first_slab, int64_t slabs, const Product& product,
                            Buffers& b) const {
  const int64_t tiles = block.tiles(), vectors = slab_ / lanes_;
  float* const sums = b.sums.get() + product.sums * sum_product();
  for (int64_t first = 0; first < plan_.depth; first += kPanelDepth) {
    const int64_t count = std::min(kPanelDepth, plan_.depth - first);
    const float* const from = b.tiles + product.value * tile_value() + first / kPanelDepth * panels(tiles) * kPanelSize;
    // So many slabs of weights stay in the first-level cache while the tiles pass by.
    const int64_t together = std::max<int64_t>(1, kPanelDepth / count);
    std::vector<int32_t> columns;
    for (int64_t v = 0; v < together * vectors; ++v) {
      columns.push_back(static_cast<int32_t>(v / vectors * count * slab_ + v % vectors * lanes_));
    }
    for (int64_t slab = 0; slab < slabs; slab += together) {
      const bool narrow = weights_.storage() == Storage::kBfloat16;
      const int64_t at = first_slab + slab;
      for (int64_t tile = 0; tile < tiles; tile += kPanelRows) {
        panel_products({.weights = from + tile * kPanelStride,
                        .rows = std::min(kPanelRows, tiles - tile),
                        .offsets = nullptr,
                        .step = slab_,
                        .depth = count,
                        .image = narrow ? nullptr : weights_.at(product.matrix, first, count, at),
                        .narrow_image = narrow ? weights_.narrow_at(product.matrix, first, count, at) : nullptr,
                        .columns = columns.data(),
                        .vectors = std::min(together, slabs - slab) * vectors,
                        .sums = sums + tile * sum_row() + slab * slab_,
                        .sums_stride = sum_row(),
                        .overwrite = first == 0,
                        .next = from + (tile + kPanelRows) * kPanelStride});
      }
    }
  }
}

void Call::transform_output(const Block& block, int64_t channel, const float* sums, Buffers& b) const {
  float* lines = b.lines.get();
  for (const auto& phase : plan_.phases) {
    const auto& kernels = kernels_of(plan_, plan_.forms[phase.form]);
    for (int64_t l = 0; l < block.lines; ++l) {
      for (int64_t c = 0; c < block.columns; ++c) {
        kernels.output(sums + phase.first_product * sum_product() + (l * block.columns + c) * sum_row(), sum_product(),
                       lines + l * plan_.m * line_row() + c * plan_.m, line_channel(), line_row());
      }
    }
    lines += kGroup * line_channel();
  }
  write_lines(block, channel, b);
}

void Call::write_lines(const Block& block, int64_t channel, Buffers& b) const {
  const int64_t stride = conv_.out_stride, m = plan_.m, phase_rows = std::min(stride, conv_.h_out);
  const int64_t in_row = phases_ / phase_rows;  // phases that share the lines of y
  const int64_t x = block.column * m * stride;
  const bool last = block.column + block.columns == plan_.tiles_w;
  const int64_t pixels = last ? conv_.w_out - x : block.columns * m * stride;
  for (int64_t o = 0; o < std::min(kGroup, conv_.c_out - channel); ++o) {
    for_samples(block, [&](int64_t sample, int64_t row, int64_t count, int64_t done) {
      for (int64_t l = 0; l < count; ++l) {
        for (int64_t phase = 0; phase < phases_; phase += in_row) {
          for (int64_t a = 0; a < m; ++a) {
            const int64_t base = (row + l) * m + plan_.phases[phase].shift_y + a;
            const int64_t line_of_y = base * stride + conv_.phases[phase].row;
            if (base < 0 || line_of_y >= conv_.h_out) continue;
            const float* from =
                b.lines.get() + (phase * kGroup + o) * line_channel() + ((done + l) * m + a) * line_row();
            const int64_t at = line_of_y * conv_.w_out + x;
            if (stride == 1) {
              b.writer.write(sample, channel + o, at, pixels, from);
              continue;
            }
            for (int64_t p = phase; p < phase + in_row; ++p, from += kGroup * line_channel()) {
              const int64_t skip = -plan_.phases[p].shift_x, first = conv_.phases[p].column;
              spread_row(from + skip, stride, b.line.data() + first, (pixels - first + stride - 1) / stride);
            }
            b.writer.write(sample, channel + o, at, pixels, b.line.data());
          }
        }
      }
    });
  }
}

}  // namespace

void winograd_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& in_scale, const ConvGeometry& g,
                   int64_t m, Storage storage, const PlanarResult& result) {
  const ConvPlan conv(x, weight, g);
  Call(conv, m, weight, g, storage).run(ScaledImage(x, in_scale), result);
}

void growing_winograd_conv(const Tensor& x, const Tensor& weight, const ConvGeometry& g, int64_t m, GrowingTiles& tiles,
                           const PlanarResult& result) {
  ConvPlan conv(x, weight, g);
  conv.c_in = tiles.channels + x.size(1);
  Call(conv, m, weight, g, Storage::kFloat, &tiles).run(ScaledImage(x, std::nullopt), result);
  tiles.channels = conv.c_in;
}

}  // namespace fastgan
