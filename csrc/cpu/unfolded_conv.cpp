// The image is unfolded once, shared by all threads: a matrix whose row (channel, tap) holds what that tap reads for
// every pixel of a phase, all samples side by side. Then tasks of output channels walk over its depth in chunks: they
// pack the weights of a chunk panel by panel and run them over all pixels, while the chunk stays in the second-level
// cache. Tasks depend on the shapes alone, and so does the order of every sum.

#include "unfolded_conv.h"

#include <algorithm>

#include "conv_patch.h"
#include "large_buffer.h"
#include "product.h"

namespace fastgan {
namespace {

// Measured over the layers of the models: with more pixels torch packs the weights as well, and so it does for small
// transposed weights, which lie against the products' order.
constexpr int64_t kMostPixels = 128, kLeastTransposed = 4 << 20;
constexpr int64_t kTaskRows = 4 * kPanelRows;  // rows that share a chunk of the image
constexpr int64_t kPrefetch = 4;               // channels ahead: what memory takes to answer

// to[i] = from[table[i]].
FASTGAN_MULTIVERSION void look_up(const float* __restrict__ from, const int32_t* __restrict__ table,
                                  float* __restrict__ to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = from[table[i]];
}

// to[places[i]] = from[i].
FASTGAN_INLINE void scatter(const float* __restrict__ from, const int64_t* __restrict__ places, int64_t n,
                            float* __restrict__ to) {
  for (int64_t i = 0; i < n; ++i) to[places[i]] = from[i];
}

// Buffers and sizes of one call.
class Call {
 public:
  Call(const ConvPlan& plan, const Tensor& weight, bool transposed)
      : plan_(plan),
        weight_(weight.const_data_ptr<float>()),
        // Weights are [C_out, C_in, taps], transposed [C_in, C_out, taps].
        weight_row_(transposed ? plan.taps : plan.c_in * plan.taps),
        weight_channel_(transposed ? plan.c_out * plan.taps : plan.taps),
        lanes_(product_lanes()),
        base_(plan.base_h * plan.base_w),
        slab_(lanes_ * product_vectors()),
        columns_(round_up(plan.n * base_, slab_)),
        phases_(static_cast<int64_t>(plan.phases.size())) {
    int64_t most_taps = 1;
    for (const Phase& phase : plan.phases) {
      starts_.push_back(taps_ * plan.c_in);
      taps_ += static_cast<int64_t>(phase.taps.size());
      most_taps = std::max<int64_t>(most_taps, phase.taps.size());
    }
    channels_ = std::clamp<int64_t>(kPanelDepth / most_taps, 1, plan.c_in);
    unfolded_ = LargeBuffer(taps_ * plan.c_in * columns_);
    for (int64_t k = 0; k < kPanelDepth; ++k) depths_.push_back(static_cast<int32_t>(k * slab_));
    for (int64_t i = 0; i < slab_; i += lanes_) vectors_.push_back(static_cast<int32_t>(i));
  }

  void unfold(const ScaledImage& x);
  void multiply(const PlanarResult& result) const;

 private:
  // Columns [column, column + slab) of a phase: [C_in * taps, slab].
  float* slab(int64_t phase, int64_t column) const {
    const auto taps = static_cast<int64_t>(plan_.phases[phase].taps.size());
    return unfolded_.get() + (starts_[phase] * columns_ + plan_.c_in * taps * column);
  }
  std::vector<int32_t> pixel_table() const;
  void pack(int64_t row, int64_t rows, int64_t channel, int64_t channels, float* panels) const;
  void add_chunk(int64_t rows, int64_t channel, int64_t channels, const float* panels, float* sums) const;
  void write(int64_t channel, const float* sums, std::vector<float>& line, PlaneWriter& writer) const;

  const ConvPlan& plan_;
  const float* const weight_;
  const int64_t weight_row_, weight_channel_, lanes_, base_, slab_, columns_, phases_;
  int64_t taps_ = 0;                       // of all phases
  int64_t channels_;                       // per chunk
  std::vector<int64_t> starts_;            // per phase its first row of the unfolded image
  LargeBuffer unfolded_;                   // per phase [columns / slab, C_in * taps, slab]
  std::vector<int32_t> depths_, vectors_;  // where rows and registers of a slab begin
};

// Per phase [columns / slab, taps, slab]: where the values of the unfolded image lie in one channel [N, H, W], behind
// which a 0 follows.
std::vector<int32_t> Call::pixel_table() const {
  const Sampling& in = plan_.input;
  std::vector<int32_t> table;
  table.reserve(taps_ * columns_);
  for (const Phase& phase : plan_.phases) {
    for (int64_t column = 0; column < columns_; column += slab_) {
      for (const Tap& tap : phase.taps) {
        for (int64_t i = column; i < column + slab_; ++i) {
          const int64_t sample = i / base_, base = i % base_;
          const int64_t y = (base / plan_.base_w + tap.dy) * in.stride + tap.plane / in.stride;
          const int64_t x = (base % plan_.base_w + tap.dx) * in.stride + tap.plane % in.stride;
          const bool inside = sample < plan_.n && y >= 0 && y < in.h_in && x >= 0 && x < in.w_in;
          const int64_t place = inside ? (sample * in.h_in + y) * in.w_in + x : plan_.n * in.h_in * in.w_in;
          table.push_back(static_cast<int32_t>(place));
        }
      }
    }
  }
  return table;
}

void Call::unfold(const ScaledImage& x) {
  const Sampling& in = plan_.input;
  const int64_t pixels = in.h_in * in.w_in;
  const auto table = pixel_table();
  const auto grain = kGrainElements / static_cast<int64_t>(table.size()) + 1;
  torch::stable::parallel_for(0, plan_.c_in, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> channel(plan_.n * pixels + 1, 0.0f);
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t sample = 0; sample < plan_.n; ++sample) {
        pack_lines({.from = x.data + sample * x.stride_n + c * x.stride_c,
                    .line = x.stride_h,
                    .pixel = x.stride_w,
                    .scale = x.scale.at(sample, c),
                    .lines = in.h_in,
                    .pixels = in.w_in,
                    .to = channel.data() + sample * pixels,
                    .to_line = in.w_in,
                    .least = x.least});
      }
      const int32_t* places = table.data();
      for (int64_t p = 0; p < phases_; ++p) {
        const auto taps = static_cast<int64_t>(plan_.phases[p].taps.size());
        for (int64_t column = 0; column < columns_; column += slab_, places += taps * slab_) {
          look_up(channel.data(), places, slab(p, column) + c * taps * slab_, taps * slab_);
        }
      }
    }
  });
}

void Call::multiply(const PlanarResult& result) const {
  torch::stable::parallel_for(0, ceil_div(plan_.c_out, kTaskRows), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> panels(phases_ * kTaskRows * kPanelStride), sums(kTaskRows * phases_ * columns_);
    std::vector<float> line(plan_.w_out);
    PlaneWriter writer(result);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kTaskRows, rows = std::min(kTaskRows, plan_.c_out - first);
      for (int64_t channel = 0; channel < plan_.c_in; channel += channels_) {
        const int64_t channels = std::min(channels_, plan_.c_in - channel);
        pack(first, rows, channel, channels, panels.data());
        add_chunk(rows, channel, channels, panels.data(), sums.data());
      }
      for (int64_t r = 0; r < rows; ++r) write(first + r, sums.data() + r * phases_ * columns_, line, writer);
    }
  });
}

// panels [phases, kTaskRows, kPanelStride]: the weights of some rows and channels, those of a row in the unfolded
// image's order.
void Call::pack(int64_t row, int64_t rows, int64_t channel, int64_t channels, float* panels) const {
  const float* const from = weight_ + row * weight_row_ + channel * weight_channel_;
  if (phases_ == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(from + r * weight_row_, channels * plan_.taps, panels + r * kPanelStride);
    }
    return;
  }
  // Channel by channel, since what lies side by side are the rows: each stretch of memory is read once. A tap of no
  // phase goes to the end of a panel's line, which nothing reads.
  std::vector<int64_t> step(plan_.taps, 0), at(plan_.taps, kPanelStride - 1);
  for (int64_t p = 0; p < phases_; ++p) {
    const std::vector<Tap>& taps = plan_.phases[p].taps;
    for (size_t t = 0; t < taps.size(); ++t) {
      step[taps[t].weight] = taps.size();
      at[taps[t].weight] = p * kTaskRows * kPanelStride + t;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    const float* const kernels = from + c * weight_channel_;
    // Every stretch begins on another page, where the hardware does not follow.
    const bool more = channel + c + kPrefetch < plan_.c_in;
    const float* const ahead = kernels + (more ? kPrefetch * weight_channel_ : 0);
    for (int64_t r = 0; r < rows; ++r) {
      __builtin_prefetch(ahead + r * weight_row_);
      scatter(kernels + r * weight_row_, at.data(), plan_.taps, panels + r * kPanelStride);
    }
    for (int64_t t = 0; t < plan_.taps; ++t) at[t] += step[t];
  }
}

// sums [rows, phases, columns] (+)= the products of packed weights with their chunk of channels.
void Call::add_chunk(int64_t rows, int64_t channel, int64_t channels, const float* panels, float* sums) const {
  for (int64_t p = 0; p < phases_; ++p) {
    const auto taps = static_cast<int64_t>(plan_.phases[p].taps.size());
    // One slab stays in the first-level cache while the weights pass by.
    for (int64_t column = 0; column < columns_; column += slab_) {
      for (int64_t r = 0; r < rows; r += kPanelRows) {
        panel_products({.weights = panels + (p * kTaskRows + r) * kPanelStride,
                        .rows = std::min(kPanelRows, rows - r),
                        .offsets = depths_.data(),
                        .depth = channels * taps,
                        .image = slab(p, column) + channel * taps * slab_,
                        .columns = vectors_.data(),
                        .vectors = product_vectors(),
                        .sums = sums + (r * phases_ + p) * columns_ + column,
                        .sums_stride = phases_ * columns_,
                        .overwrite = channel == 0});
      }
    }
  }
}

// The results of one output channel from its sums [phases, columns].
void Call::write(int64_t channel, const float* sums, std::vector<float>& line, PlaneWriter& writer) const {
  for (int64_t sample = 0; sample < plan_.n; ++sample, sums += base_) {
    if (plan_.out_stride == 1) {
      writer.write(sample, channel, 0, base_, sums);
      continue;
    }
    const int64_t in_line = plan_.phases_in_line();
    std::vector<const float*> phases(in_line);
    for (int64_t row = 0; row < plan_.h_out; ++row) {
      const float* const first =
          sums + row % plan_.out_stride * in_line * columns_ + row / plan_.out_stride * plan_.base_w;
      for (int64_t p = 0; p < in_line; ++p) phases[p] = first + p * columns_;
      interleave(phases.data(), in_line, line.data(), plan_.w_out);
      writer.write(sample, channel, row * plan_.w_out, plan_.w_out, line.data());
    }
  }
}

}  // namespace

Refusal refused_by_unfolded_conv(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (const Refusal refusal = refuse_unless_float_nchw(x, weight, g)) return refusal;
  if (g.reflect) return {"it pads with zeros"};
  if (!weight.is_contiguous()) return {"it takes a contiguous weight"};
  if (g.transposed && (g.dilation[0] != 1 || g.dilation[1] != 1)) return {"transposed, it takes no dilation"};
  const int64_t taps = weight.size(2) * weight.size(3);
  if (taps > kPanelDepth) return {"it takes at most # taps, got #", kPanelDepth, taps};
  if (g.transposed && weight.numel() < kLeastTransposed) {
    return {"transposed, it takes weights of at least # values, got #", kLeastTransposed, weight.numel()};
  }
  const int64_t pixels =
      x.size(0) * (g.transposed ? x.size(2) * x.size(3) : result_size(x, weight, g, 0) * result_size(x, weight, g, 1));
  if (pixels > kMostPixels) return {"it takes at most # pixels, got #", kMostPixels, pixels};
  return {};
}

double unfolded_conv_ms(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  // Products of a millisecond, and what packing a weight costs of them, on Zen 3 with two threads: transposed weights
  // lie against the products' order.
  constexpr double kPerMs = 60e6, kPackCost = 12, kTransposedPackCost = 40;
  const ConvPlan plan(x, weight, g);
  const double pixels = static_cast<double>(plan.n) * plan.base_h * plan.base_w;
  return weight.numel() * (pixels + (g.transposed ? kTransposedPackCost : kPackCost)) / kPerMs;
}

void unfolded_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g,
                   const PlanarResult& result) {
  const ConvPlan plan(x, weight, g);
  Call call(plan, weight, g.transposed);
  call.unfold(image);
  call.multiply(result);
}

}  // namespace fastgan
