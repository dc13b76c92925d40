// Three passes over blocks of tiles that fit the caches, each shared out among all threads: the tiles of every input
// channel are transformed, for each of the t^2 products there is one matrix product over channels, and the sums of
// every output channel are transformed back, interleaved into lines of y and given their epilogue. Every sum has one
// order that depends on the shapes alone.

#include "winograd_conv.h"

#include <algorithm>

#include "conv_patch.h"
#include "large_buffer.h"
#include "product.h"
#include "winograd.h"

namespace fastgan {
namespace {

// Transformed input and sums of one block: 12 MB, about what two threads can hope for of a shared third-level cache.
constexpr int64_t kBlockFloats = 3 << 20;

// Parts: what stands for channels of x in the products, several per channel. Part (plane, i, j) of a channel is the
// plane shifted by i and j runs of r taps.
struct Part {
  int64_t plane, dy, dx;
};

struct WinogradPlan {
  int64_t m, r, t;
  std::vector<Part> parts;
  // Per phase and part the kernel index of each of its r^2 taps, and how far the phase's first tile starts before 0.
  struct PhaseTaps {
    std::vector<std::vector<int64_t>> of_part;
    int64_t shift_y, shift_x;
  };
  std::vector<PhaseTaps> phases;
  int64_t tiles_h, tiles_w;
  Sampling input;
  std::vector<std::vector<Tap>> positions;  // per part the t^2 values of a tile, read at stride m * stride

  WinogradPlan(const ConvPlan& conv, int64_t tile);
};

// The taps of one phase that read one plane.
std::vector<Tap> taps_of(const Phase& phase, int64_t plane) {
  std::vector<Tap> found;
  std::ranges::copy_if(phase.taps, std::back_inserter(found), [=](const Tap& tap) { return tap.plane == plane; });
  return found;
}

int64_t taps_per_axis(const ConvPlan& conv) {
  const int64_t strides = conv.input.stride * conv.out_stride;
  for (int64_t taps = 2; taps <= 4; ++taps) {
    if (taps * taps * strides * strides == conv.taps) return taps;
  }
  return 0;
}

WinogradPlan::WinogradPlan(const ConvPlan& conv, int64_t tile)
    : m(tile), r(taps_per_axis(conv) == 3 ? 3 : 2), t(m + r - 1) {
  const int64_t runs = taps_per_axis(conv) / r, stride = conv.input.stride;
  // A plane's first shift (convolution), or the least one of the phases (transposed), is where its tiles start.
  for (int64_t plane = 0; plane < stride * stride; ++plane) {
    int64_t dy = INT64_MAX, dx = INT64_MAX;
    for (const Phase& phase : conv.phases) {
      for (const Tap& tap : taps_of(phase, plane)) {
        dy = std::min(dy, tap.dy);
        dx = std::min(dx, tap.dx);
      }
    }
    for (int64_t i = 0; i < runs; ++i) {
      for (int64_t j = 0; j < runs; ++j) parts.push_back({plane, dy + i * r, dx + j * r});
    }
  }
  int64_t extra_y = 0, extra_x = 0;
  for (const Phase& phase : conv.phases) {
    PhaseTaps found;
    const auto first = taps_of(phase, 0);
    found.shift_y = parts[0].dy - std::ranges::min(first, {}, &Tap::dy).dy;
    found.shift_x = parts[0].dx - std::ranges::min(first, {}, &Tap::dx).dx;
    extra_y = std::max(extra_y, -found.shift_y);
    extra_x = std::max(extra_x, -found.shift_x);
    for (const Part& part : parts) {
      auto& indices = found.of_part.emplace_back(r * r);
      for (const Tap& tap : taps_of(phase, part.plane)) {
        const int64_t i = tap.dy + found.shift_y - part.dy, j = tap.dx + found.shift_x - part.dx;
        if (i >= 0 && i < r && j >= 0 && j < r) indices[i * r + j] = tap.weight;
      }
    }
    phases.push_back(found);
  }
  tiles_h = ceil_div(conv.base_h + extra_y, m);
  tiles_w = ceil_div(conv.base_w + extra_x, m);
  input = conv.input;
  input.stride = stride * m;
  std::vector<Tap> all;
  for (const Part& part : parts) {
    auto& of_part = positions.emplace_back();
    for (int64_t i = 0; i < t; ++i) {
      for (int64_t j = 0; j < t; ++j) {
        const int64_t y = stride * (part.dy + i) + part.plane / stride,
                      x = stride * (part.dx + j) + part.plane % stride;
        const int64_t dy = floor_div(y, input.stride), dx = floor_div(x, input.stride);
        of_part.push_back({(y - dy * input.stride) * input.stride + x - dx * input.stride, dy, dx, 0});
      }
    }
    all.insert(all.end(), of_part.begin(), of_part.end());
  }
  input.bound(all);
}

// Buffers and sizes of one call.
class Call {
 public:
  Call(const ConvPlan& conv, int64_t m)
      : conv_(conv),
        plan_(conv, m),
        kernels_(winograd_kernels(m, plan_.r)),
        lanes_(product_lanes()),
        slab_(lanes_ * product_vectors()),
        depth_(conv.c_in * static_cast<int64_t>(plan_.parts.size())),
        chunks_(ceil_div(depth_, kPanelDepth)),
        panels_(ceil_div(conv.c_out, kPanelRows)),
        products_(plan_.t * plan_.t),
        phases_(static_cast<int64_t>(plan_.phases.size())) {
    const int64_t per_column = products_ * (depth_ + phases_ * conv.c_out);
    const int64_t all_lines = conv.n * plan_.tiles_h;
    lines_ = std::clamp<int64_t>(std::max(kBlockFloats / per_column, 8 * lanes_) / plan_.tiles_w, 1, all_lines);
    lines_ = ceil_div(all_lines, ceil_div(all_lines, lines_));
    columns_ = round_up(lines_ * plan_.tiles_w, slab_);
    weight_product_ = chunks_ * panels_ * kPanelSize + kLine;
    tile_product_ = depth_ * columns_ + kLine;
    sum_product_ = conv.c_out * columns_ + kLine;
    weights_ = LargeBuffer(phases_ * products_ * weight_product_);
    tiles_ = LargeBuffer(products_ * tile_product_);
    sums_ = LargeBuffer(phases_ * products_ * sum_product_);
  }

  void transform_weights(const float* weight, bool transposed);

  void run(const ScaledImage& x, const PlanarResult& result) {
    const int64_t all_lines = conv_.n * plan_.tiles_h;
    for (int64_t line = 0; line < all_lines; line += lines_) {
      const int64_t lines = std::min(lines_, all_lines - line);
      transform_input(x, line, lines);
      multiply(ceil_div(lines * plan_.tiles_w, lanes_));
      transform_output(line, lines, result);
    }
  }

 private:
  static constexpr int64_t kPanelSize = kPanelRows * kPanelStride;
  // Behind each product's matrix one cache line: powers of two apart, the t^2 matrices would share one set of a cache.
  static constexpr int64_t kLine = 16;

  float* panel(int64_t phase, int64_t product, int64_t chunk, int64_t panel) const {
    return weights_.get() + (phase * products_ + product) * weight_product_ + (chunk * panels_ + panel) * kPanelSize;
  }

  // Calls f(sample, row of tiles, lines, line from the block's first) for the samples that lines [line, line + lines)
  // are of.
  template <typename F>
  void for_samples(int64_t line, int64_t lines, F&& f) const {
    for (int64_t done = 0; done < lines;) {
      const int64_t row = (line + done) % plan_.tiles_h, count = std::min(lines - done, plan_.tiles_h - row);
      f((line + done) / plan_.tiles_h, row, count, done);
      done += count;
    }
  }

  void transform_input(const ScaledImage& x, int64_t line, int64_t lines);
  void multiply(int64_t vectors);
  void transform_output(int64_t line, int64_t lines, const PlanarResult& result);
  void write_line(const float* tiles, int64_t phase, int64_t a, float* line) const;

  const ConvPlan& conv_;
  const WinogradPlan plan_;
  const WinogradKernels& kernels_;
  const int64_t lanes_, slab_, depth_, chunks_, panels_, products_, phases_;
  int64_t lines_, columns_, weight_product_, tile_product_, sum_product_;
  // [phase, product, chunk, panel, kPanelRows, kPanelStride]; [product, columns / slab, depth, slab], so that one tile
  // of products reads consecutive memory; [phase, product, C_out, columns].
  LargeBuffer weights_, tiles_, sums_;
};

void Call::transform_weights(const float* weight, bool transposed) {
  const int64_t row = transposed ? conv_.taps : conv_.c_in * conv_.taps;
  const int64_t channel = transposed ? conv_.c_out * conv_.taps : conv_.taps;
  const int64_t parts = static_cast<int64_t>(plan_.parts.size()), taps = plan_.r * plan_.r;
  torch::stable::parallel_for(0, panels_ * phases_, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> gathered(taps * kPanelStride);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task / phases_, phase = task % phases_;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const int64_t first = chunk * kPanelDepth, count = std::min(kPanelDepth, depth_ - first);
        for (int64_t o = p * kPanelRows; o < std::min((p + 1) * kPanelRows, conv_.c_out); ++o) {
          for (int64_t k = 0; k < count; ++k) {
            const float* const kernel = weight + o * row + (first + k) / parts * channel;
            const auto& indices = plan_.phases[phase].of_part[(first + k) % parts];
            for (int64_t i = 0; i < taps; ++i) gathered[i * kPanelStride + k] = kernel[indices[i]];
          }
          // The last register may reach into the panel's padding, which nothing reads.
          kernels_.weight(gathered.data(), kPanelStride, ceil_div(count, lanes_),
                          panel(phase, 0, chunk, p) + (o - p * kPanelRows) * kPanelStride, weight_product_);
        }
      }
    }
  });
}

void Call::transform_input(const ScaledImage& x, int64_t line, int64_t lines) {
  const int64_t parts = static_cast<int64_t>(plan_.parts.size()), width = plan_.tiles_w;
  const int64_t vectors = ceil_div(width, lanes_), stride = columns_ + lanes_;
  torch::stable::parallel_for(0, conv_.c_in, 1, [&](int64_t begin, int64_t end) {
    Patch patch(plan_.input, 1, std::min(lines, plan_.tiles_h), vectors * lanes_);
    std::vector<std::vector<int32_t>> positions;
    for (const auto& of_part : plan_.positions) positions.push_back(patch.offsets(of_part, 1));
    // Lines of tiles end anywhere in a register: each line is written over what the last register of the one before it
    // had left.
    std::vector<float> rows(parts * products_ * stride);
    for (int64_t channel = begin; channel < end; ++channel) {
      for_samples(line, lines, [&](int64_t sample, int64_t row, int64_t count, int64_t done) {
        patch.load(x, sample, row, count, channel, 1);
        for (int64_t part = 0; part < parts; ++part) {
          for (int64_t l = 0; l < count; ++l) {
            kernels_.input(patch.data() + l * patch.line_stride(), positions[part].data(), vectors,
                           rows.data() + part * products_ * stride + (done + l) * width, stride);
          }
        }
      });
      for (int64_t part = 0; part < parts; ++part) {
        for (int64_t product = 0; product < products_; ++product) {
          const float* from = rows.data() + (part * products_ + product) * stride;
          float* to = tiles_.get() + product * tile_product_ + (channel * parts + part) * slab_;
          for (int64_t i = 0; i < columns_; i += slab_, to += slab_ * depth_) std::copy_n(from + i, slab_, to);
        }
      }
    }
  });
}

void Call::multiply(int64_t vectors) {
  std::vector<int32_t> offsets, starts;
  for (int64_t k = 0; k < kPanelDepth; ++k) offsets.push_back(static_cast<int32_t>(k * slab_));
  for (int64_t i = 0; i < vectors * lanes_; i += lanes_) {
    starts.push_back(static_cast<int32_t>(i / slab_ * slab_ * depth_ + i % slab_));
  }
  torch::stable::parallel_for(0, phases_ * products_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      // Phases share their tiles, which are then still near.
      const int64_t product = task / phases_, phase = task % phases_;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const int64_t first = chunk * kPanelDepth;
        // One slab of tiles stays in the first-level cache while the weights pass by.
        for (int64_t slab = 0; slab < vectors; slab += product_vectors()) {
          for (int64_t p = 0; p < panels_; ++p) {
            const int64_t row = p * kPanelRows;
            panel_products(
                {.weights = panel(phase, product, chunk, p),
                 .rows = std::min(kPanelRows, conv_.c_out - row),
                 .offsets = offsets.data(),
                 .depth = std::min(kPanelDepth, depth_ - first),
                 .image = tiles_.get() + product * tile_product_ + first * slab_,
                 .columns = starts.data() + slab,
                 .vectors = std::min(product_vectors(), vectors - slab),
                 .sums = sums_.get() + (phase * products_ + product) * sum_product_ + row * columns_ + slab * lanes_,
                 .sums_stride = columns_,
                 .overwrite = chunk == 0});
          }
        }
      }
    }
  });
}

void Call::transform_output(int64_t line, int64_t lines, const PlanarResult& result) {
  const int64_t stride = conv_.out_stride, size = plan_.m * plan_.m * columns_;
  torch::stable::parallel_for(0, conv_.c_out, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tiles(phases_ * size), buffer(conv_.w_out);
    PlaneWriter writer(result);
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t phase = 0; phase < phases_; ++phase) {
        kernels_.output(sums_.get() + phase * products_ * sum_product_ + o * columns_, sum_product_,
                        ceil_div(lines * plan_.tiles_w, lanes_), tiles.data() + phase * size, columns_);
      }
      for_samples(line, lines, [&](int64_t sample, int64_t row, int64_t count, int64_t done) {
        for (int64_t l = 0; l < count; ++l) {
          for (int64_t phase = 0; phase < phases_; phase += phases_ / std::min(stride, conv_.h_out)) {
            for (int64_t a = 0; a < plan_.m; ++a) {
              const int64_t base = (row + l) * plan_.m + plan_.phases[phase].shift_y + a;
              const int64_t line_of_y = base * stride + conv_.phases[phase].row;
              if (base < 0 || line_of_y >= conv_.h_out) continue;
              write_line(tiles.data() + (done + l) * plan_.tiles_w, phase, a, buffer.data());
              writer.write(sample, o, line_of_y * conv_.w_out, conv_.w_out, buffer.data());
            }
          }
        }
      });
    }
  });
}

// One line of y: row a of the tiles of the phases from `phase` on that share its row.
void Call::write_line(const float* tiles, int64_t phase, int64_t a, float* line) const {
  const int64_t row = conv_.phases[phase].row, step = conv_.out_stride * plan_.m;
  for (; phase < phases_ && conv_.phases[phase].row == row; ++phase) {
    const float* const results = tiles + (phase * plan_.m + a) * plan_.m * columns_;
    for (int64_t b = 0; b < plan_.m; ++b) {
      const int64_t column = plan_.phases[phase].shift_x + b;
      const int64_t skip = column < 0 ? 1 : 0;
      const int64_t x = (column + skip * plan_.m) * conv_.out_stride + conv_.phases[phase].column;
      if (x < conv_.w_out) {
        spread_row(results + b * columns_ + skip, step, line + x, (conv_.w_out - x + step - 1) / step);
      }
    }
  }
}

// ---- which tile

// Costs in multiply-adds of a matrix product, fitted to the layers of the models on Zen 3 with two threads: a float
// that a transform writes costs as much as this many.
constexpr double kWeightCost = 32, kTileCost = 75, kSumCost = 65;
// What it is compared with: the products of direct convolution, by torch's own kernels, which do a fifth more per
// second.
constexpr double kDirectCost = 0.85;
// Below so many the transforms' plans alone, made for each call, would cost what could be saved.
constexpr double kLeastCost = 4e6;

double direct_cost(const ConvPlan& conv) {
  return kDirectCost * conv.n * conv.base_h * conv.base_w * conv.c_in * conv.c_out * conv.taps;
}

double winograd_cost(const ConvPlan& conv, const WinogradPlan& plan) {
  const double tiles = static_cast<double>(conv.n) * plan.tiles_h * plan.tiles_w, products = plan.t * plan.t;
  const double depth = static_cast<double>(conv.c_in) * plan.parts.size();
  const double rows = static_cast<double>(conv.c_out) * plan.phases.size();
  return products * (rows * depth * (tiles + kWeightCost) + tiles * (depth * kTileCost + rows * kSumCost));
}

}  // namespace

int64_t winograd_tile(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (x.scalar_type() != ScalarType::Float || !weight.is_contiguous()) return 0;
  if (suggests_channels_last(x) || suggests_channels_last(weight)) return 0;
  if (!is_plain_convolution(x, weight, std::nullopt, g)) return 0;
  if (g.stride[0] != g.stride[1] || g.dilation[0] != 1 || g.dilation[1] != 1) return 0;
  if (weight.size(2) != weight.size(3)) return 0;
  const ConvPlan conv(x, weight, g);
  const int64_t per_axis = taps_per_axis(conv);
  if (!per_axis) return 0;
  int64_t best = 0;
  double least = direct_cost(conv);
  if (least < kLeastCost) return 0;
  for (const int64_t m : per_axis == 3 ? std::vector<int64_t>{2, 4} : std::vector<int64_t>{2, 3, 4}) {
    const double cost = winograd_cost(conv, WinogradPlan(conv, m));
    if (cost < least) {
      least = cost;
      best = m;
    }
  }
  return best;
}

void winograd_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& in_scale, const ConvGeometry& g,
                   int64_t m, const PlanarResult& result) {
  const ConvPlan conv(x, weight, g);
  Call call(conv, m);
  call.transform_weights(weight.const_data_ptr<float>(), g.transposed);
  call.run(ScaledImage(x, in_scale), result);
}

}  // namespace fastgan
