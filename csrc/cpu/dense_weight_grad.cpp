// The gradient's transpose [C_in * taps, C_out] is x, shifted by taps, times g with its channels innermost. A row of
// shifted x is a stretch of a patch, one value after the other, so it is read there; g is transposed once, into slabs
// of channels.
//
// Pixels are cut into chunks: some lines of one sample or, where maps are small, some samples. Tasks are blocks of
// input channels times blocks of slabs. For every chunk a task loads its patch of x, and for every slab, which stays in
// the first-level cache, it adds the products with all shifts of all channels. Tasks depend on the shapes alone, and
// every sum is over the pixels of a chunk in order, then over the chunks.

#include "dense_weight_grad.h"

#include <algorithm>

#include "large_buffer.h"
#include "product.h"

namespace fastgan {
namespace {

constexpr int64_t kPixels = 256;       // per chunk: a slab of 16 channels is 16 KB
constexpr int64_t kPatch = 32 * 1024;  // floats of x per chunk and task: 128 KB, in the second-level cache
constexpr int64_t kTasks = 16;         // enough to share out
constexpr int64_t kLeastSlabs = 4;     // per task, to repay its patches
// Where torch's is slower, measured over layers of 9 to 512 channels: 1x1 kernels have nothing to shift.
constexpr int64_t kLeastRows = 9, kLeastTaps = 4, kLeastResults = 1 << 9;

// How pixels are cut into chunks and the gradient into tasks.
struct Tiling {
  int64_t slab = product_lanes() * product_vectors();
  int64_t samples, lines;  // per chunk; one of them is all or one
  int64_t line_chunks, chunks, pixels;
  int64_t channels, channel_blocks;  // C_in
  int64_t slabs, slabs_per_block, slab_blocks;

  explicit Tiling(const ConvPlan& plan) {
    lines = std::clamp<int64_t>(kPixels / plan.w_out, 1, plan.h_out);
    line_chunks = ceil_div(plan.h_out, lines);
    lines = ceil_div(plan.h_out, line_chunks);
    samples = line_chunks > 1 ? 1 : std::clamp<int64_t>(kPixels / (plan.h_out * plan.w_out), 1, plan.n);
    chunks = line_chunks * ceil_div(plan.n, samples);
    pixels = samples * lines * plan.w_out;
    const int64_t per_channel = Patch(plan.input, 0, lines, plan.w_out).channel_stride() * samples;
    channels = std::clamp<int64_t>(std::min(kPatch / per_channel, ceil_div(plan.c_in, 4)), 1, plan.c_in);
    channel_blocks = ceil_div(plan.c_in, channels);
    slabs = ceil_div(plan.c_out, slab);
    slabs_per_block = std::max(std::min(slabs, kLeastSlabs), ceil_div(slabs, ceil_div(kTasks, channel_blocks)));
    slab_blocks = ceil_div(slabs, slabs_per_block);
  }
};

class WeightGrad {
 public:
  WeightGrad(const ConvPlan& plan, const ScaledImage& x, const ScaledImage& g)
      : plan_(plan), tiling_(plan), x_(x), slabs_(tiling_.chunks * tiling_.slabs * tiling_.pixels * tiling_.slab) {
    torch::stable::parallel_for(0, tiling_.chunks * tiling_.slabs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) transpose(g, i / tiling_.slabs, i % tiling_.slabs);
    });
  }

  void run(float* grad) const {
    const int64_t tasks = tiling_.channel_blocks * tiling_.slab_blocks, row_stride = plan_.c_in * plan_.taps;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      Patch patch(plan_.input, tiling_.samples * tiling_.channels, tiling_.lines, plan_.w_out);
      const std::vector<int32_t> starts = patch.offsets(plan_.phases[0].taps, tiling_.channels);
      std::vector<float> sums(tiling_.slabs_per_block * tiling_.channels * plan_.taps * tiling_.slab);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t channel = task / tiling_.slab_blocks * tiling_.channels;
        const int64_t slab = task % tiling_.slab_blocks * tiling_.slabs_per_block;
        const int64_t channels = std::min(tiling_.channels, plan_.c_in - channel);
        const int64_t slabs = std::min(tiling_.slabs_per_block, tiling_.slabs - slab);
        for (int64_t chunk = 0; chunk < tiling_.chunks; ++chunk) {
          add_chunk(chunk, channel, channels, slab, slabs, patch, starts.data(), sums.data());
        }
        write(channels * plan_.taps, slab, slabs, sums.data(), grad + channel * plan_.taps, row_stride);
      }
    });
  }

 private:
  struct Chunk {
    int64_t sample, samples, line, lines;
  };
  Chunk at(int64_t chunk) const {
    const int64_t sample = chunk / tiling_.line_chunks * tiling_.samples;
    const int64_t line = chunk % tiling_.line_chunks * tiling_.lines;
    return {sample, std::min(tiling_.samples, plan_.n - sample), line, std::min(tiling_.lines, plan_.h_out - line)};
  }

  // [chunks, slabs, pixels, slab]; behind the last channel zeros.
  float* slab_of(int64_t chunk, int64_t slab) const {
    return slabs_.get() + (chunk * tiling_.slabs + slab) * tiling_.pixels * tiling_.slab;
  }

  void transpose(const ScaledImage& g, int64_t chunk, int64_t slab) const {
    const Chunk c = at(chunk);
    const int64_t first = slab * tiling_.slab, count = std::min(tiling_.slab, plan_.c_out - first);
    float* to = slab_of(chunk, slab);
    if (count < tiling_.slab) std::fill_n(to, tiling_.pixels * tiling_.slab, 0.0f);
    for (int64_t sample = c.sample; sample < c.sample + c.samples; ++sample) {
      for (int64_t line = c.line; line < c.line + c.lines; ++line, to += plan_.w_out * tiling_.slab) {
        const float* const from = g.data + sample * g.stride_n + first * g.stride_c + line * g.stride_h;
        for (int64_t k = 0; k < count; ++k) {
          const float scale = g.scale.at(sample, first + k);
          for (int64_t i = 0; i < plan_.w_out; ++i) {
            to[i * tiling_.slab + k] = scale * from[k * g.stride_c + i * g.stride_w];
          }
        }
      }
    }
  }

  void add_chunk(int64_t chunk, int64_t channel, int64_t channels, int64_t slab, int64_t slabs, Patch& patch,
                 const int32_t* starts, float* sums) const {
    const Chunk c = at(chunk);
    for (int64_t sample = 0; sample < c.samples; ++sample) {
      patch.load(x_, c.sample + sample, c.line, c.lines, channel, channels, sample * tiling_.channels);
    }
    const int64_t rows = channels * plan_.taps;
    for (int64_t s = 0; s < slabs; ++s) {
      for (int64_t row = 0; row < rows; row += kPanelRows) {
        shifted_products({.image = patch.data(),
                          .starts = starts + row,
                          .rows = std::min(kPanelRows, rows - row),
                          .samples = c.samples,
                          .sample_stride = tiling_.channels * patch.channel_stride(),
                          .lines = c.lines,
                          .line_stride = patch.line_stride(),
                          .pixels = plan_.w_out,
                          .slab = slab_of(chunk, slab + s),
                          .sums = sums + (s * rows + row) * tiling_.slab,
                          .overwrite = chunk == 0});
      }
    }
  }

  // sums [slabs, rows, slab] to grad[o, row].
  void write(int64_t rows, int64_t slab, int64_t slabs, const float* sums, float* grad, int64_t row_stride) const {
    // As many rows at a time as stay in the first-level cache until each of their channels has been written.
    constexpr int64_t kRows = 64;
    for (int64_t s = 0; s < slabs; ++s) {
      const int64_t first = (slab + s) * tiling_.slab, count = std::min(tiling_.slab, plan_.c_out - first);
      for (int64_t done = 0; done < rows; done += kRows) {
        const float* const from = sums + (s * rows + done) * tiling_.slab;
        for (int64_t k = 0; k < count; ++k) {
          float* const to = grad + (first + k) * row_stride + done;
          for (int64_t row = 0; row < std::min(kRows, rows - done); ++row) to[row] = from[row * tiling_.slab + k];
        }
      }
    }
  }

  const ConvPlan& plan_;
  const Tiling tiling_;
  const ScaledImage& x_;
  const LargeBuffer slabs_;
};

}  // namespace

bool dense_weight_grad_takes(const ConvPlan& plan) {
  return plan.w_out <= kPixels && plan.c_out >= kLeastRows && plan.taps >= kLeastTaps &&
         plan.c_out * plan.c_in * plan.taps >= kLeastResults;
}

void dense_weight_grad(const ConvPlan& plan, const ScaledImage& x, const ScaledImage& g, float* grad) {
  WeightGrad(plan, x, g).run(grad);
}

}  // namespace fastgan
