// Every thread carries blocks of tiles through all three steps: the pixels of 16 channels at a time are gathered and
// transformed; for each product of the tiles there is one matrix product over channels, a group of output channels at a
// time; the sums are transformed back, laid out as lines of y and given their epilogue. A block is as large as the
// second-level cache, or where the weights are many, as large as it takes to read them seldom. Every sum has one order
// that depends on the shapes alone.

#include "winograd_conv.h"

#include <algorithm>

#include "algorithm.h"
#include "channel_patch.h"
#include "pair_product.h"
#include "product.h"
#include "recorded_calls.h"
#include "tasks.h"
#include "winograd.h"
#include "winograd_blocking.h"
#include "winograd_input.h"
#include "winograd_weights.h"

namespace fastgan {
namespace {

// What depends on sizes alone.
struct Plans {
  ConvPlan conv;
  WinogradPlan winograd;

  Plans(const ConvPlan& plan, const Tensor& weight, int64_t m)
      : conv(plan), winograd(conv, taps_per_axis(conv, weight.size(2)), m) {}
};

class Call {
 public:
  Call(const Plans& plans, const Tensor& weight, const ConvGeometry& g, Storage storage,
       const Quantization* quantization, GrowingTiles* growing = nullptr)
      : conv_(plans.conv),
        quantization_(quantization),
        growing_(growing),
        plan_(plans.winograd),
        transforming_(transforming_of(plan_, weight, storage, !growing)),
        phases_(static_cast<int64_t>(plan_.phases.size())),
        lanes_(product_lanes()),
        slab_(slab_size(conv_.c_out, storage)),
        joined_(joined_phases(conv_, plan_, slab_)),
        per_word_(channels_per_word(storage)),
        most_depth_(growing ? growing->most : plan_.depth / per_word_),
        blocking_(growing ? blocking_of_growing(conv_, taps_per_axis(conv_, weight.size(2)), plan_.m, slab_, *growing)
                          : blocking_of(conv_, plan_, transforming_, most_depth_, slab_)),
        input_(conv_, plan_, quantization, growing ? growing->channels : 0, per_word_, most_depth_, most_tiles()),
        weights_(conv_, plan_, transforming_, blocking_.slabs, weight, g, storage) {}

  void run(const ScaledImage& x, const PlanarResult& result) const;

 private:
  // One thread's buffers.
  struct Buffers {
    ChannelPatch patch;
    LargeBuffer own_tiles, own_weights, sums, lines;
    float* tiles;
    PlaneWriter writer;
    GroupWriter groups;  // of a grouped result
    std::vector<float> line;
    std::vector<const float*> columns;  // of the phases of a line
  };

  // One product of matrices, or of the phases that are joined: of which of a tile's values, with which
  // weights (those of the next phase lie `step` matrices further), into which sums; over words [first, first + count).
  struct Product {
    int64_t value, matrix, step, sums, first, count;
  };

  // What is read soon, and fetched meanwhile.
  struct Soon {
    const char* from;
    int64_t bytes;
  };

  // Of one product: tiles times `depth` words of some slabs' weights.
  struct Chunk {
    const float* tiles;
    int64_t depth;
    const char* weights;
    const std::vector<int32_t>& columns;
    int64_t vectors;
    float* sums;
    bool overwrite;
    Soon soon;
  };

  const WinogradKernels& kernels_of(const WinogradPlan::Form& form) const {
    return winograd_kernels(plan_.m, plan_.r, form.single_y, form.single_x);
  }
  const WholeKernels& whole_of(const WinogradPlan::Form& form) const {
    return whole_kernels(plan_.m, plan_.r, form.single_y, form.single_x);
  }

  void multiply(const TileBlock& block, int64_t first_slab, int64_t slabs, Buffers& b) const;
  void multiply_product(const TileBlock& block, int64_t first_slab, int64_t slabs, const Product& product,
                        Buffers& b) const;
  void multiply_chunk(const Chunk& chunk, int64_t tiles) const;
  void multiply_panel(const Chunk& chunk, int64_t tile, int64_t rows, const Ahead& ahead) const;
  void transform_output(const TileBlock& block, const float* sums, bool grouped, Buffers& b) const;
  void write_lines(const TileBlock& block, int64_t channel, Buffers& b) const;
  void write_groups(const TileBlock& block, int64_t channel, Buffers& b) const;

  bool by_threads() const { return transforming_ == Transforming::kByThreads; }
  int64_t most_tiles() const { return blocking_.lines * blocking_.columns; }
  // [product, tile, joined phases, slabs]
  int64_t sum_row() const { return joined_ * blocking_.slabs * slab_ + kCacheLine; }
  int64_t sum_product() const { return most_tiles() * sum_row() + kCacheLine; }
  // [phase, kGroup, line of tiles, m, columns of tiles, m]; a line's last tile is written as four columns. For a
  // grouped result the channels come last.
  int64_t line_row() const { return blocking_.columns * plan_.m + 4 - plan_.m; }
  int64_t line_channel() const { return blocking_.lines * plan_.m * line_row() + kCacheLine; }

  const ConvPlan& conv_;
  const Quantization* const quantization_;  // null: floats
  GrowingTiles* const growing_;
  const WinogradPlan& plan_;
  const Transforming transforming_;
  const int64_t phases_, lanes_, slab_, joined_, per_word_, most_depth_;
  const WinogradBlocking blocking_;
  const WinogradInput input_;
  const WinogradWeights weights_;
};

void Call::run(const ScaledImage& x, const PlanarResult& result) const {
  if (!quantization_) count_winograd(plan_.m, plan_.r);
  const int64_t all_lines = conv_.n * plan_.tiles_h, slabs = ceil_div(conv_.c_out, slab_);
  const int64_t line_blocks = blocking_.line_blocks, column_blocks = blocking_.column_blocks;
  // Where there are fewer blocks than threads, several threads transform the same tiles, each for some channels.
  const int64_t threads = torch::stable::get_num_threads(), blocks = line_blocks * column_blocks;
  const int64_t groups = ceil_div(slabs, blocking_.slabs);
  const int64_t shares = growing_ || blocks >= threads ? 1 : groups;
  if (growing_ && !growing_->data.get()) growing_->data = LargeBuffer(blocks * input_.size());
  share_tasks(blocks * shares, [&](Tasks tasks) {
    Buffers b{.patch = input_.patch(blocking_.lines, blocking_.columns),
              .own_tiles = LargeBuffer(growing_ ? 0 : input_.size()),
              .own_weights = weights_.own(),
              .sums = LargeBuffer(plan_.products / joined_ * sum_product()),
              .lines = LargeBuffer(phases_ * kGroup * line_channel()),
              .tiles = b.own_tiles.get(),
              .writer = PlaneWriter(result),
              .groups = GroupWriter(result),
              .line = std::vector<float>(conv_.w_out),
              .columns = std::vector<const float*>(phases_)};
    int64_t transformed = -1;
    while (const auto task = tasks.next()) {
      const int64_t share = *task % shares, place = *task / shares;
      const int64_t line = place / column_blocks, column = place % column_blocks;
      TileBlock block{all_lines * line / line_blocks, 0, plan_.tiles_w * column / column_blocks, 0};
      block.lines = all_lines * (line + 1) / line_blocks - block.line;
      block.columns = plan_.tiles_w * (column + 1) / column_blocks - block.column;
      if (growing_) b.tiles = growing_->data.get() + place * input_.size();
      if (place != transformed) input_.transform(x, block, b.patch, b.tiles);
      transformed = place;
      for (int64_t group = groups * share / shares; group < groups * (share + 1) / shares; ++group) {
        const int64_t slab = group * blocking_.slabs, count = std::min(blocking_.slabs, slabs - slab);
        multiply(block, slab, count, b);
        for (int64_t c = 0; c < count * slab_ && slab * slab_ + c < conv_.c_out; c += kGroup) {
          const int64_t channel = slab * slab_ + c;
          transform_output(block, b.sums.get() + c, result.grouped, b);
          result.grouped ? write_groups(block, channel, b) : write_lines(block, channel, b);
        }
      }
    }
  });
}

void Call::multiply(const TileBlock& block, int64_t first_slab, int64_t slabs, Buffers& b) const {
  for (int64_t first = 0; first < weights_.depth(); first += weights_.step()) {
    const int64_t count = std::min(weights_.step(), weights_.depth() - first);
    if (by_threads()) weights_.transform_own(first, count, first_slab, b.own_weights);
    for (int64_t p = 0; p < phases_; p += joined_) {
      const auto& phase = plan_.phases[p];
      const auto& form = plan_.forms[phase.form];
      for (int64_t product = 0; product < form.products; ++product) {
        multiply_product(block, first_slab, slabs,
                         {.value = form.first + product,
                          .matrix = phase.first_weight + plan_.weight_of(form, product),
                          .step = plan_.matrices_of(form),
                          .sums = phase.first_product / joined_ + product,
                          .first = first,
                          .count = count},
                         b);
      }
    }
  }
}

void Call::multiply_product(const TileBlock& block, int64_t first_slab, int64_t slabs, const Product& product,
                            Buffers& b) const {
  const int64_t tiles = block.tiles(), vectors = slab_ / lanes_, first = product.first, count = product.count;
  float* const sums = b.sums.get() + product.sums * sum_product();
  const float* const from = b.tiles + input_.offset(product.value, first, tiles);
  // So many slabs of weights, or so much of one, stay in the first-level cache while the tiles pass by: 32 KB.
  const int64_t near = joined_ * slab_ > 2 * kGroup ? kPanelDepth / 2 : kPanelDepth,
                together = std::max<int64_t>(1, near / count);
  // What a thread has transformed is near already: what comes soon are its next kernels, a share with every product.
  const int64_t share = ceil_div(count * weights_.kernel_bytes(), plan_.products);
  // Several phases, or several slabs.
  const int64_t step = joined_ > 1 ? product.step * weights_.matrix_size(count) : count * slab_;
  std::vector<int32_t> columns;
  for (int64_t v = 0; v < std::max(together, joined_) * vectors; ++v) {
    columns.push_back(static_cast<int32_t>(v / vectors * step + v % vectors * lanes_));
  }
  for (int64_t slab = 0; slab < slabs; slab += together) {
    const int64_t of_slabs = std::min(together, slabs - slab);
    const char* const weights = weights_.at(product.matrix, first, count, first_slab + slab, b.own_weights);
    for (int64_t k = 0; k < count; k += near) {
      const int64_t depth = std::min(near, count - k), bytes = of_slabs * slab_ * depth * weights_.word_bytes();
      const char* const at = weights + k * slab_ * weights_.word_bytes();
      Soon soon{at + bytes, bytes};
      if (by_threads()) {
        const float* const kernels = weights_.kernel_at(first_slab + slab, first + count);
        soon = {reinterpret_cast<const char*>(kernels) + product.sums * share, share};
      }
      multiply_chunk({.tiles = from + k,
                      .depth = depth,
                      .weights = at,
                      .columns = columns,
                      .vectors = joined_ * of_slabs * vectors,
                      .sums = sums + slab * slab_,
                      .overwrite = first + k == 0,
                      .soon = soon},
                     tiles);
    }
  }
}

// Meanwhile what comes soon is fetched, evenly by all whole panels.
void Call::multiply_chunk(const Chunk& chunk, int64_t tiles) const {
  const int64_t panels = std::max<int64_t>(tiles / kPanelRows, 1);
  const int64_t fetches = panels * ceil_div(chunk.vectors, product_vectors()) * ceil_div(chunk.depth, kFetchSteps);
  const char* soon = chunk.soon.from;
  for (int64_t tile = 0; tile < tiles; tile += kPanelRows, soon += chunk.soon.bytes / panels) {
    multiply_panel(chunk, tile, std::min(kPanelRows, tiles - tile),
                   {.panel = chunk.tiles + (tile + kPanelRows) * kPanelStride,
                    .weights = soon,
                    .lines = ceil_div(chunk.soon.bytes, fetches * kFetchBytes)});
  }
}

void Call::multiply_panel(const Chunk& chunk, int64_t tile, int64_t rows, const Ahead& ahead) const {
  const auto weights_as = [&]<typename T>(Storage storage) {
    return weights_.storage() == storage ? reinterpret_cast<const T*>(chunk.weights) : nullptr;
  };
  const float* const tiles = chunk.tiles + tile * kPanelStride;
  float* const sums = chunk.sums + tile * sum_row();
  if (quantization_) {
    pair_products({.values = reinterpret_cast<const int32_t*>(tiles),
                   .rows = rows,
                   .step = slab_,
                   .depth = chunk.depth,
                   .weights = weights_as.operator()<int16_t>(Storage::kInt16),
                   .narrow_weights = weights_as.operator()<int8_t>(Storage::kInt8),
                   .columns = chunk.columns.data(),
                   .vectors = chunk.vectors,
                   .sums = reinterpret_cast<int32_t*>(sums),
                   .sums_stride = sum_row(),
                   .overwrite = chunk.overwrite,
                   .ahead = ahead});
  } else {
    panel_products({.weights = tiles,
                    .rows = rows,
                    .offsets = nullptr,
                    .step = slab_,
                    .depth = chunk.depth,
                    .image = weights_as.operator()<float>(Storage::kFloat),
                    .narrow_image = weights_as.operator()<BFloat16>(Storage::kBfloat16),
                    .columns = chunk.columns.data(),
                    .vectors = chunk.vectors,
                    .sums = sums,
                    .sums_stride = sum_row(),
                    .overwrite = chunk.overwrite,
                    .ahead = ahead});
  }
}

void Call::transform_output(const TileBlock& block, const float* sums, bool grouped, Buffers& b) const {
  float* lines = b.lines.get();
  const int64_t pixel = grouped ? kGroup : 1, channel = grouped ? 1 : line_channel();
  const int64_t tile = sum_row(), value = sum_product(), row = pixel * line_row(), step = pixel * plan_.m;
  for (int64_t p = 0; p < phases_; ++p) {
    const auto& form = plan_.forms[plan_.phases[p].form];
    const int64_t product = plan_.phases[p - p % joined_].first_product / joined_;
    const float* from = sums + product * value + p % joined_ * slab_;
    const WinogradKernels* const floats = quantization_ ? nullptr : &kernels_of(form);
    const WholeKernels* const whole = quantization_ ? &whole_of(form) : nullptr;
    for (int64_t l = 0; l < block.lines; ++l) {
      float* to = lines + l * plan_.m * row;
      for (int64_t c = 0; c < block.columns; ++c, from += tile, to += step) {
        if (whole) {
          whole->output(reinterpret_cast<const int32_t*>(from), value, tile, to, channel, row);
        } else {
          floats->output(from, value, tile, to, channel, row);
        }
      }
    }
    lines += kGroup * line_channel();
  }
}

void Call::write_lines(const TileBlock& block, int64_t channel, Buffers& b) const {
  const int64_t stride = conv_.out_stride, m = plan_.m, phase_rows = std::min(stride, conv_.h_out);
  const int64_t in_row = phases_ / phase_rows;  // phases that share the lines of y
  const int64_t x = block.column * m * stride;
  const bool last = block.column + block.columns == plan_.tiles_w;
  const int64_t pixels = last ? conv_.w_out - x : block.columns * m * stride;
  for (int64_t o = 0; o < std::min(kGroup, conv_.c_out - channel); ++o) {
    block.for_samples(plan_.tiles_h, [&](int64_t sample, int64_t row, int64_t count, int64_t done) {
      if (stride == 1 && line_row() == conv_.w_out) {
        // Lines of y, all of them at once.
        const int64_t rows = std::min(count * m, conv_.h_out - row * m);
        b.writer.write(sample, channel + o, row * m * conv_.w_out, rows * conv_.w_out,
                       b.lines.get() + o * line_channel() + done * m * line_row());
        return;
      }
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
            for (int64_t p = 0; p < in_row; ++p, from += kGroup * line_channel()) {
              b.columns[p] = from - plan_.phases[phase + p].shift_x;
            }
            interleave(b.columns.data(), in_row, b.line.data(), pixels);
            b.writer.write(sample, channel + o, at, pixels, b.line.data());
          }
        }
      }
    });
  }
}

void Call::write_groups(const TileBlock& block, int64_t channel, Buffers& b) const {
  const int64_t stride = conv_.out_stride, m = plan_.m, x = block.column * m * stride;
  const bool last = block.column + block.columns == plan_.tiles_w;
  const int64_t pixels = last ? conv_.w_out - x : block.columns * m * stride;
  block.for_samples(plan_.tiles_h, [&](int64_t sample, int64_t row, int64_t count, int64_t done) {
    for (int64_t l = 0; l < count; ++l) {
      for (int64_t phase = 0; phase < phases_; ++phase) {
        const int64_t column = conv_.phases[phase].column;
        for (int64_t a = 0; a < m; ++a) {
          const int64_t base = (row + l) * m + plan_.phases[phase].shift_y + a;
          const int64_t y = base * stride + conv_.phases[phase].row;
          if (base < 0 || y >= conv_.h_out) continue;
          const float* const from = b.lines.get() + phase * kGroup * line_channel() +
                                    (((done + l) * m + a) * line_row() - plan_.phases[phase].shift_x) * kGroup;
          b.groups.write(sample, channel, y * conv_.w_out + x + column, stride, ceil_div(pixels - column, stride), from,
                         kGroup);
        }
      }
    }
  });
}

}  // namespace

void winograd_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g, int64_t m,
                   Storage storage, const PlanarResult& result) {
  const auto plans = planned<Plans>(x, weight, [&] { return Plans(ConvPlan(x, weight, g), weight, m); });
  Call(*plans, weight, g, storage, nullptr).run(image, result);
}

void quantized_winograd_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g,
                             int64_t m, const Quantization& quantization, const PlanarResult& result) {
  const auto plans = planned<Plans>(x, weight, [&] { return Plans(ConvPlan(x, weight, g), weight, m); });
  Call(*plans, weight, g, m == 1 ? Storage::kInt8 : Storage::kInt16, &quantization).run(image, result);
}

void growing_winograd_conv(const Tensor& x, const Tensor& weight, const ConvGeometry& g, int64_t m, GrowingTiles& tiles,
                           const PlanarResult& result) {
  ConvPlan conv(x, weight, g);
  conv.c_in = tiles.channels + x.size(1);
  Call(Plans(conv, weight, m), weight, g, Storage::kFloat, nullptr, &tiles).run(ScaledImage(x, std::nullopt), result);
  tiles.channels = conv.c_in;
}

}  // namespace fastgan
