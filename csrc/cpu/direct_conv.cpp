// Tasks are blocks of lines times blocks of output channels. One task adds up all products of its block in a scratch
// that stays in the second-level cache: for every block of input channels it loads their patch of x, and for every
// panel of kPanelRows output channels it packs their weights into the first-level cache and runs them over all pixels.
// Where all products of a result fit one panel, the scratch is a few pixels of one panel. Tasks depend on the shapes
// alone, and so does the order of every sum.

#include "direct_conv.h"

#include <algorithm>

#include "few_outputs.h"
#include "product.h"
#include "recorded_calls.h"
#include "tasks.h"

namespace fastgan {
namespace {

constexpr int64_t kColumns = 256;        // results of one channel per task
constexpr int64_t kStreamColumns = 512;  // the same where they need no scratch
constexpr int64_t kStretch = 64;         // of these, what is multiplied at a time
constexpr int64_t kScratch = 48 * 1024;  // results per task: 192 KB
constexpr int64_t kTasks = 16;           // enough to share out; more would load x more often than needed

// Where torch's convolution is far from its own best, measured over the layers of the models: images of few channels,
// which it pads to a register of them, and large results of transposed 3x3 convolutions of stride 2 (StyleGAN2's),
// which it first makes as one matrix that outgrows the caches.
constexpr int64_t kManyPixels = 8192;

// How the results of one call are cut into tasks, and how a task lays out its columns.
struct Tiling {
  int64_t lanes = product_lanes();
  bool streams;         // one pass adds up a result and neighbours stay neighbours: a few go to y at a time
  bool narrow;          // lines shorter than a register share it: their columns are gathered, not read in place
  int64_t width;        // columns per line
  int64_t lines;        // per task
  int64_t columns;      // per task, whole registers
  int64_t channels;     // C_in per pass
  int64_t rows;         // C_out per task
  int64_t line_blocks;  // in all; of one sample each, where not narrow
  int64_t row_blocks;
  int64_t scratch;  // sums of one task

  explicit Tiling(const ConvPlan& plan) {
    width = round_up(plan.base_w, lanes);
    narrow = 4 * width > 5 * plan.base_w;
    if (narrow) width = plan.base_w;
    const int64_t all_lines = narrow ? plan.n * plan.base_h : plan.base_h;
    int64_t most_taps = 1;
    for (const Phase& phase : plan.phases) most_taps = std::max<int64_t>(most_taps, phase.taps.size());
    channels = std::clamp<int64_t>(kPanelDepth / most_taps, 1, plan.c_in);
    streams = !narrow && plan.c_in <= kFewChannels && channels == plan.c_in && plan.out_stride == 1;
    lines = std::clamp<int64_t>((streams ? kStreamColumns : kColumns) / width, 1, all_lines);
    // Equal blocks: a short last one would cost as much as a whole one.
    lines = (all_lines + (all_lines + lines - 1) / lines - 1) / ((all_lines + lines - 1) / lines);
    columns = round_up(lines * width, lanes);
    line_blocks = (all_lines + lines - 1) / lines * (narrow ? 1 : plan.n);
    const int64_t per_row = columns * static_cast<int64_t>(plan.phases.size()),
                  all_rows = round_up(plan.c_out, kPanelRows);
    rows = streams ? all_rows : std::clamp(kScratch / per_row / kPanelRows * kPanelRows, kPanelRows, all_rows);
    while (rows > 8 * kPanelRows && line_blocks * ((plan.c_out + rows - 1) / rows) < kTasks) {
      rows = round_up(rows / 2, kPanelRows);
    }
    row_blocks = (plan.c_out + rows - 1) / rows;
    scratch = streams ? kPanelRows * kStretch : rows * per_row;
  }
};

// One thread's work on one task after the other.
class Worker {
 public:
  Worker(const ConvPlan& plan, const Tiling& tiling, const ScaledImage& x, const Tensor& weight, bool transposed)
      : plan_(plan),
        tiling_(tiling),
        x_(x),
        weight_(weight.const_data_ptr<float>()),
        weight_row_(weight.stride(transposed ? 1 : 0)),
        weight_channel_(weight.stride(transposed ? 0 : 1)),
        patch_(plan.input, tiling.channels, tiling.lines, tiling.width),
        panel_(kPanelRows * kPanelStride),
        sums_(tiling.scratch) {
    int64_t most_taps = 0;
    for (const Phase& phase : plan.phases) {
      offsets_.push_back(patch_.offsets(phase.taps, tiling.channels));
      most_taps = std::max<int64_t>(most_taps, phase.taps.size());
      auto& weights = weight_offsets_.emplace_back();
      for (int64_t c = 0; c < tiling.channels; ++c) {
        for (const Tap& tap : phase.taps) weights.push_back(static_cast<int32_t>(c * weight_channel_ + tap.weight));
      }
    }
    if (tiling.narrow) {
      gathered_.resize(tiling.columns * tiling.channels * most_taps);
      for (int64_t k = 0; k < tiling.channels * most_taps; ++k) gathered_offsets_.push_back(k * tiling.columns);
      for (int64_t i = 0; i < tiling.columns; i += tiling.lanes) columns_.push_back(i);
    } else {
      for (int64_t line = 0; line < tiling.lines; ++line) {
        for (int64_t i = 0; i < tiling.width; i += tiling.lanes) columns_.push_back(line * patch_.line_stride() + i);
      }
    }
  }

  // The same results to y at once, where the tiling streams.
  void stream(int64_t line, int64_t lines, int64_t row, int64_t rows, const PlaneWriter& writer) {
    const int64_t sample = line / plan_.base_h, base = line % plan_.base_h, lanes = tiling_.lanes;
    const int64_t depth = plan_.c_in * static_cast<int64_t>(plan_.phases[0].taps.size());
    // Lines without padding behind them are one line.
    const bool joined = tiling_.width == plan_.w_out;
    const int64_t stretches = joined ? 1 : lines, length = joined ? lines * plan_.w_out : plan_.w_out;
    patch_.load(x_, sample, base, lines, 0, plan_.c_in);
    for (int64_t r = 0; r < rows; r += kPanelRows) {
      const int64_t count = std::min(kPanelRows, rows - r);
      pack_panel(weight_ + (row + r) * weight_row_, weight_offsets_[0].data(), depth, weight_row_, count,
                 panel_.data());
      for (int64_t s = 0; s < stretches; ++s) {
        for (int64_t i = 0; i < length; i += kStretch) {
          const int64_t n = std::min(kStretch, length - i);
          panel_products({.weights = panel_.data(),
                          .rows = count,
                          .offsets = offsets_[0].data(),
                          .depth = depth,
                          .image = patch_.data(),
                          .columns = columns_.data() + (s * tiling_.width + i) / lanes,
                          .vectors = ceil_div(n, lanes),
                          .sums = sums_.data(),
                          .sums_stride = kStretch,
                          .overwrite = true});
          writer.write_rows(sample, row + r, count, (base + s) * plan_.w_out + i, n, sums_.data(), kStretch);
        }
      }
    }
  }

  // Lines [line, line + lines), rows [row, row + rows).
  void multiply(int64_t line, int64_t lines, int64_t row, int64_t rows) {
    for (int64_t channel = 0; channel < plan_.c_in; channel += tiling_.channels) {
      const int64_t channels = std::min(tiling_.channels, plan_.c_in - channel);
      if (!tiling_.narrow) {
        patch_.load(x_, line / plan_.base_h, line % plan_.base_h, lines, channel, channels);
      }
      for (size_t phase = 0; phase < plan_.phases.size(); ++phase) {
        if (tiling_.narrow) gather(plan_.phases[phase], offsets_[phase], line, lines, channel, channels);
        add_phase(phase, lines, row, rows, channel, channels);
      }
    }
  }

  const float* sums(size_t phase, int64_t row) const {
    return sums_.data() + (phase * tiling_.rows + row) * tiling_.columns;
  }

 private:
  void add_phase(size_t phase, int64_t lines, int64_t row, int64_t rows, int64_t channel, int64_t channels) {
    const int64_t depth = channels * static_cast<int64_t>(plan_.phases[phase].taps.size());
    const float* const weights = weight_ + row * weight_row_ + channel * weight_channel_;
    const int64_t columns = round_up(lines * tiling_.width, tiling_.lanes);
    for (int64_t r = 0; r < rows; r += kPanelRows) {
      const int64_t count = std::min(kPanelRows, rows - r);
      pack_panel(weights + r * weight_row_, weight_offsets_[phase].data(), depth, weight_row_, count, panel_.data());
      panel_products({.weights = panel_.data(),
                      .rows = count,
                      .offsets = tiling_.narrow ? gathered_offsets_.data() : offsets_[phase].data(),
                      .depth = depth,
                      .image = tiling_.narrow ? gathered_.data() : patch_.data(),
                      .columns = columns_.data(),
                      .vectors = columns / tiling_.lanes,
                      .sums = sums_.data() + (phase * tiling_.rows + r) * tiling_.columns,
                      .sums_stride = tiling_.columns,
                      .overwrite = channel == 0});
    }
  }

  // The rows of the im2col matrix, lines of several samples side by side.
  void gather(const Phase& phase, const std::vector<int32_t>& offsets, int64_t line, int64_t lines, int64_t channel,
              int64_t channels) {
    const int64_t depth = channels * static_cast<int64_t>(phase.taps.size());
    for (int64_t done = 0; done < lines;) {
      const int64_t row = (line + done) % plan_.base_h, count = std::min(lines - done, plan_.base_h - row);
      patch_.load(x_, (line + done) / plan_.base_h, row, count, channel, channels);
      for (int64_t k = 0; k < depth; ++k) {
        const float* from = patch_.data() + offsets[k];
        float* to = gathered_.data() + k * tiling_.columns + done * tiling_.width;
        for (int64_t l = 0; l < count; ++l, from += patch_.line_stride(), to += tiling_.width) {
          for (int64_t i = 0; i < tiling_.width; ++i) to[i] = from[i];
        }
      }
      done += count;
    }
  }

  const ConvPlan& plan_;
  const Tiling& tiling_;
  const ScaledImage& x_;
  const float* const weight_;
  const int64_t weight_row_, weight_channel_;
  Patch patch_;
  std::vector<float> panel_, sums_, gathered_;
  std::vector<std::vector<int32_t>> offsets_, weight_offsets_;
  std::vector<int32_t> gathered_offsets_, columns_;
};

// Hands the sums of one channel of one task on, in stretches of consecutive pixels of y.
template <typename F>
void for_stretches(const ConvPlan& plan, const Tiling& tiling, const Worker& worker, int64_t line, int64_t lines,
                   int64_t row, std::vector<float>& buffer, F&& f) {
  const int64_t width = tiling.width;
  for (int64_t done = 0; done < lines;) {
    const int64_t sample = (line + done) / plan.base_h, base = (line + done) % plan.base_h;
    const int64_t count = std::min(lines - done, plan.base_h - base);
    if (plan.out_stride == 1) {
      const float* const sums = worker.sums(0, row) + done * width;
      if (width == plan.w_out) {
        f(sample, base * width, count * width, sums);
      } else {
        for (int64_t l = 0; l < count; ++l) f(sample, (base + l) * plan.w_out, plan.w_out, sums + l * width);
      }
    } else {
      const int64_t in_line = plan.phases_in_line(), last = std::min(plan.out_stride * (base + count), plan.h_out);
      std::vector<const float*> phases(in_line);
      for (int64_t y = plan.out_stride * base; y < last; ++y) {
        for (int64_t p = 0; p < in_line; ++p) {
          phases[p] = worker.sums(y % plan.out_stride * in_line + p, row) + (done + y / plan.out_stride - base) * width;
        }
        interleave(phases.data(), in_line, buffer.data(), plan.w_out);
        f(sample, y * plan.w_out, plan.w_out, buffer.data());
      }
    }
    done += count;
  }
}

}  // namespace

Refusal refused_by_direct_conv(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (const Refusal refusal = refuse_unless_float_nchw(x, weight, g)) return refusal;
  if (!has_dense_kernels(weight)) return {"it takes a weight of dense kernels"};
  if (g.transposed && (g.dilation[0] != 1 || g.dilation[1] != 1)) return {"transposed, it takes no dilation"};
  const ConvPlan plan(x, weight, g);
  if (plan.taps > kPanelDepth) return {"it takes at most # taps, got #", kPanelDepth, plan.taps};
  const int64_t few = std::min(plan.c_in, plan.c_out), pixels = plan.n * plan.base_h * plan.base_w;
  if (few <= kFewChannels) return {};
  if (plan.taps != 9 || plan.out_stride != 2) {
    return {"it takes at most # channels on one side (or a transposed 3x3 of stride 2), got #", kFewChannels, few};
  }
  if (pixels < kManyPixels) return {"it takes this form from # pixels a phase on, got #", kManyPixels, pixels};
  return {};
}

void direct_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g,
                 const PlanarResult& result) {
  if (few_outputs_takes(x, weight, g)) return few_outputs_conv(x, weight, image, g, result);
  struct Plans {
    ConvPlan conv;
    Tiling tiling;
  };
  const auto plans = planned<Plans>(x, weight, [&] {
    const ConvPlan conv(x, weight, g);
    return Plans{conv, Tiling(conv)};
  });
  const ConvPlan& plan = plans->conv;
  const Tiling& tiling = plans->tiling;
  const int64_t lines_of_all = plan.n * plan.base_h;
  const int64_t blocks_per_sample = tiling.narrow ? tiling.line_blocks : tiling.line_blocks / plan.n;
  share_tasks(tiling.line_blocks * tiling.row_blocks, [&](Tasks tasks) {
    Worker worker(plan, tiling, image, weight, g.transposed);
    std::vector<float> buffer(plan.w_out);
    PlaneWriter writer(result);
    while (const auto task = tasks.next()) {
      const int64_t block = *task / tiling.row_blocks, row = *task % tiling.row_blocks * tiling.rows;
      const int64_t sample = tiling.narrow ? 0 : block / blocks_per_sample;
      const int64_t first = block % blocks_per_sample * tiling.lines, line = sample * plan.base_h + first;
      const int64_t last = tiling.narrow ? lines_of_all : plan.base_h;
      const int64_t lines = std::min(tiling.lines, last - first), rows = std::min(tiling.rows, plan.c_out - row);
      if (tiling.streams) {
        worker.stream(line, lines, row, rows, writer);
        continue;
      }
      worker.multiply(line, lines, row, rows);
      for (int64_t r = 0; r < rows; ++r) {
        for_stretches(plan, tiling, worker, line, lines, r, buffer,
                      [&](int64_t n, int64_t pixel, int64_t count, const float* sums) {
                        writer.write(n, row + r, pixel, count, sums);
                      });
      }
    }
  });
}

}  // namespace fastgan
