// The lines of g are packed once, as panels. Tasks are blocks of input channels: one task unfolds its channels of x,
// whole registers of columns for every pixel, and runs all panels over them into their place in the gradient. Every sum
// is over all pixels in order.

#include "unfolded_weight_grad.h"

#include <algorithm>

#include "product.h"

namespace fastgan {
namespace {

constexpr int64_t kColumns = 256;     // of x per task: with 256 pixels 256 KB, in the second-level cache
constexpr int64_t kChannelUnit = 16;  // channels whose taps, however many, fill whole registers
constexpr int64_t kPanel = kPanelRows * kPanelStride;
// Where torch's is slower, measured over layers of 16 to 1024 channels: with few rows unfolding is not repaid, and 1x1
// kernels have nothing to unfold.
constexpr int64_t kMostPixels = 256, kLeastRows = 64, kLeastTaps = 4, kLeastResults = 1 << 16;
static_assert(kMostPixels <= kPanelDepth);

// All of g as panels [C_out / kPanelRows, kPanelRows, kPanelStride] of pixels.
std::vector<float> pack(const ConvPlan& plan, const ScaledImage& g, int64_t panels) {
  std::vector<float> packed(panels * kPanel);
  torch::stable::parallel_for(0, plan.c_out, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t sample = 0; sample < plan.n; ++sample) {
        pack_lines({.from = g.data + sample * g.stride_n + row * g.stride_c,
                    .line = g.stride_h,
                    .pixel = g.stride_w,
                    .scale = g.scale.at(sample, row),
                    .lines = plan.h_out,
                    .pixels = plan.w_out,
                    .to = packed.data() + row * kPanelStride + sample * plan.h_out * plan.w_out,
                    .to_line = plan.w_out});
      }
    }
  });
  return packed;
}

}  // namespace

bool unfolded_weight_grad_takes(const ConvPlan& plan) {
  return plan.n * plan.h_out * plan.w_out <= kMostPixels && plan.c_in % kChannelUnit == 0 && plan.c_out >= kLeastRows &&
         plan.taps >= kLeastTaps && plan.c_out * plan.c_in * plan.taps >= kLeastResults;
}

void unfolded_weight_grad(const ConvPlan& plan, const ScaledImage& x, const ScaledImage& g, float* grad) {
  const int64_t panels = ceil_div(plan.c_out, kPanelRows), pixels = plan.n * plan.h_out * plan.w_out;
  const int64_t channels =
      std::min(plan.c_in, kChannelUnit * std::max<int64_t>(1, kColumns / kChannelUnit / plan.taps));
  const int64_t most_columns = channels * plan.taps, lanes = product_lanes(), row_stride = plan.c_in * plan.taps;
  const std::vector<float> packed = pack(plan, g, panels);
  const int64_t blocks = ceil_div(plan.c_in, channels);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Patch patch(plan.input, channels, plan.h_out, plan.w_out);
    const std::vector<int32_t> positions = patch.offsets(plan.phases[0].taps, channels);
    std::vector<float> unfolded(pixels * most_columns);
    std::vector<int32_t> starts;
    for (int64_t i = 0; i < most_columns; i += lanes) starts.push_back(static_cast<int32_t>(i));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t channel = block * channels, count = std::min(channels, plan.c_in - channel);
      const int64_t columns = count * plan.taps;
      float* to = unfolded.data();
      for (int64_t sample = 0; sample < plan.n; ++sample) {
        patch.load(x, sample, 0, plan.h_out, channel, count);
        for (int64_t line = 0; line < plan.h_out; ++line) {
          const float* const from = patch.data() + line * patch.line_stride();
          for (int64_t pixel = 0; pixel < plan.w_out; ++pixel, to += most_columns) {
            for (int64_t k = 0; k < columns; ++k) to[k] = from[positions[k] + pixel];
          }
        }
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t row = panel * kPanelRows;
        panel_products({.weights = packed.data() + panel * kPanel,
                        .rows = std::min(kPanelRows, plan.c_out - row),
                        .offsets = nullptr,
                        .step = most_columns,
                        .depth = pixels,
                        .image = unfolded.data(),
                        .columns = starts.data(),
                        .vectors = columns / lanes,
                        .sums = grad + row * row_stride + channel * plan.taps,
                        .sums_stride = row_stride,
                        .overwrite = true});
      }
    }
  });
}

}  // namespace fastgan
