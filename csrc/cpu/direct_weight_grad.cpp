// Many channels go to winograd_weight_grad.h, dense_weight_grad.h or, with few pixels, unfolded_weight_grad.h; what
// follows is for images of few channels.
//
// Tasks are blocks of input channels times blocks of output channels times stretches of lines. One task goes through
// its lines block by block: it loads the patch of x, which stays in the first two cache levels with its sums, and adds
// the dot products of every shifted plane with every line of g. Where channels alone give few tasks the lines are split
// as well, and a second pass adds up the parts. Tasks depend on the shapes alone, and so does the order of every sum.

#include "direct_weight_grad.h"

#include <algorithm>

#include "algorithm.h"
#include "conv_patch.h"
#include "dense_weight_grad.h"
#include "product.h"
#include "unfolded_weight_grad.h"
#include "winograd_weight_grad.h"

namespace fastgan {
namespace {

constexpr int64_t kColumns = 64;  // taps times input channels per task
constexpr int64_t kRows = 32;     // output channels per task: with 64 columns, 64 KB of sums in registers of 8
constexpr int64_t kPixels = 512;  // per block of lines: four rows of g and the patch of three channels are 40 KB
constexpr int64_t kTasks = 16;    // enough to share out

// Where torch's is slower, measured over the layers of the models: it pads few channels to a register of them. Lines of
// about a register leave little to add up in one go, and a single product per pixel is not worth a patch.
constexpr int64_t kFewChannels = 8, kLeastWidth = 12, kLeastProducts = 3;

// How the sums of one call are cut into tasks.
struct Tiling {
  int64_t lanes = product_lanes();
  int64_t width;                                // pixels per line, whole registers
  int64_t lines, line_blocks;                   // per block of one sample; blocks of all samples
  int64_t channels, channel_blocks;             // C_in
  int64_t rows, row_blocks;                     // C_out
  int64_t parts, blocks_per_part;               // of the blocks of lines
  int64_t columns, results, blocks_per_sample;  // most columns per task; elements of the gradient

  explicit Tiling(const ConvPlan& plan) {
    width = round_up(plan.w_out, lanes);
    lines = std::clamp<int64_t>(kPixels / width, 1, plan.h_out);
    blocks_per_sample = ceil_div(plan.h_out, lines);
    lines = ceil_div(plan.h_out, blocks_per_sample);
    line_blocks = plan.n * blocks_per_sample;
    channels = std::clamp<int64_t>(kColumns / plan.taps, 1, plan.c_in);
    channel_blocks = ceil_div(plan.c_in, channels);
    rows = std::min(kRows, plan.c_out);
    row_blocks = ceil_div(plan.c_out, rows);
    blocks_per_part = ceil_div(line_blocks, std::min(line_blocks, ceil_div(kTasks, channel_blocks * row_blocks)));
    parts = ceil_div(line_blocks, blocks_per_part);
    columns = channels * plan.taps;
    results = plan.c_out * plan.c_in * plan.taps;
  }
};

// g [N, C, H, W] of any strides with its factors. Those that all samples share are left to the finished sums.
struct Cotangent {
  ScaledImage image;
  Scales<float> finish;
  bool in_place;  // else its lines are copied: they end inside a register, are not dense or have factors of their own

  Cotangent(const Tensor& g, const std::optional<Tensor>& scale, int64_t width)
      : image(g, scale && scale->size(0) > 1 ? scale : std::nullopt),
        finish(scale && scale->size(0) == 1 ? scale : std::nullopt),
        in_place(!image.scale.data && g.stride(3) == 1 && g.size(3) == width) {}
};

// One thread's work on one task after the other.
class Worker {
 public:
  Worker(const ConvPlan& plan, const Tiling& tiling, const ScaledImage& x, const Cotangent& g)
      : plan_(plan),
        tiling_(tiling),
        x_(x),
        g_(g),
        patch_(plan.input, tiling.channels, tiling.lines, tiling.width),
        offsets_(patch_.offsets(plan.phases[0].taps, tiling.channels)),
        rows_(g.in_place ? 0 : tiling.rows * tiling.lines * tiling.width),
        sums_(tiling.rows * tiling.columns * tiling.lanes) {}

  // The sums of channels [channel, + channels) and rows [row, + rows) over blocks [begin, end) of lines.
  void add_up(int64_t channel, int64_t channels, int64_t row, int64_t rows, int64_t begin, int64_t end) {
    std::fill_n(sums_.data(), rows * channels * plan_.taps * tiling_.lanes, 0.0f);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t sample = block / tiling_.blocks_per_sample;
      const int64_t line = block % tiling_.blocks_per_sample * tiling_.lines;
      const int64_t lines = std::min(tiling_.lines, plan_.h_out - line);
      patch_.load(x_, sample, line, lines, channel, channels);
      if (!g_.in_place) copy_rows(sample, line, lines, row, rows);
      dot_products({.rows = g_.in_place ? from(sample, line, row) : rows_.data(),
                    .row_count = rows,
                    .row_stride = g_.in_place ? g_.image.stride_c : tiling_.lines * tiling_.width,
                    .row_line = g_.in_place ? g_.image.stride_h : tiling_.width,
                    .image = patch_.data(),
                    .columns = offsets_.data(),
                    .column_count = channels * plan_.taps,
                    .image_line = patch_.line_stride(),
                    .lines = lines,
                    .vectors = tiling_.width / tiling_.lanes,
                    .sums = sums_.data()});
    }
  }

  // Lanes added up: to[r, c] for the `columns` columns of row r, rows `stride` apart.
  void finish(int64_t rows, int64_t columns, float* to, int64_t stride) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const float* const lanes = sums_.data() + (r * columns + c) * tiling_.lanes;
        float total = 0;
        for (int64_t lane = 0; lane < tiling_.lanes; ++lane) total += lanes[lane];
        to[r * stride + c] = total;
      }
    }
  }

 private:
  const float* from(int64_t sample, int64_t line, int64_t row) const {
    return g_.image.data + sample * g_.image.stride_n + row * g_.image.stride_c + line * g_.image.stride_h;
  }

  // Lines of g, behind which rows_ holds zeros from the start.
  void copy_rows(int64_t sample, int64_t line, int64_t lines, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      pack_lines({.from = from(sample, line, row + r),
                  .line = g_.image.stride_h,
                  .pixel = g_.image.stride_w,
                  .scale = g_.image.scale.at(sample, row + r),
                  .lines = lines,
                  .pixels = plan_.w_out,
                  .to = rows_.data() + r * tiling_.lines * tiling_.width,
                  .to_line = tiling_.width});
    }
  }

  const ConvPlan& plan_;
  const Tiling& tiling_;
  const ScaledImage& x_;
  const Cotangent& g_;
  Patch patch_;
  const std::vector<int32_t> offsets_;
  std::vector<float> rows_, sums_;
};

// Whether the channels and lines are such that dot products of planes win.
bool takes_channels(const ConvPlan& plan) {
  const int64_t few = std::min(plan.c_in, plan.c_out);
  return few <= kFewChannels && few * plan.taps >= kLeastProducts && plan.w_out >= kLeastWidth;
}

// Whether these are the arguments of a plain convolution's backward in float32 and NCHW.
bool takes(const Tensor& x, const Tensor& g, const Tensor& weight, const ConvGeometry& geometry) {
  if (x.scalar_type() != ScalarType::Float || g.scalar_type() != ScalarType::Float) return false;
  if (!is_plain_convolution(x, weight, std::nullopt, geometry)) return false;
  if (geometry.stride[0] != geometry.stride[1] || suggests_channels_last(x)) return false;
  const std::vector<int64_t> expected{x.size(0), weight.size(0), result_size(x, weight, geometry, 0),
                                      result_size(x, weight, geometry, 1)};
  if (g.dim() != 4 || suggests_channels_last(g)) return false;
  for (int dim = 0; dim < 4; ++dim) {
    if (g.size(dim) != expected[dim]) return false;
  }
  return true;
}

}  // namespace

std::optional<Tensor> direct_weight_grad(const Tensor& x, const Tensor& g, const std::optional<Tensor>& in_scale,
                                         const std::optional<Tensor>& g_scale, const std::vector<int64_t>& weight_size,
                                         const ConvGeometry& geometry) {
  const Tensor grad = empty_dense({weight_size.data(), weight_size.size()}, ScalarType::Float, false);
  if (!takes(x, g, grad, geometry)) return std::nullopt;
  const ConvPlan plan(x, grad, geometry);
  const ScaledImage image(x, in_scale);
  if (!takes_channels(plan)) {
    const ScaledImage cotangent(g, g_scale);
    if (winograd_weight_grad_takes(plan, weight_size, geometry)) {
      count_call(Algorithm::kWinogradWeightGrad);
      winograd_weight_grad(plan, weight_size[2], geometry, image, cotangent, grad.mutable_data_ptr<float>());
    } else if (unfolded_weight_grad_takes(plan)) {
      count_call(Algorithm::kUnfoldedWeightGrad);
      unfolded_weight_grad(plan, image, cotangent, grad.mutable_data_ptr<float>());
    } else if (dense_weight_grad_takes(plan)) {
      count_call(Algorithm::kDenseWeightGrad);
      dense_weight_grad(plan, image, cotangent, grad.mutable_data_ptr<float>());
    } else {
      return std::nullopt;
    }
    return grad;
  }
  count_call(Algorithm::kDirectWeightGrad);
  const Tiling tiling(plan);
  const Cotangent cotangent(g, g_scale, tiling.width);
  std::vector<float> parts(tiling.parts * tiling.results);
  const int64_t per_part = tiling.channel_blocks * tiling.row_blocks, row_stride = plan.c_in * plan.taps;
  torch::stable::parallel_for(0, tiling.parts * per_part, 1, [&](int64_t begin, int64_t end) {
    Worker worker(plan, tiling, image, cotangent);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / per_part, block = task % per_part;
      const int64_t channel = block / tiling.row_blocks * tiling.channels,
                    row = block % tiling.row_blocks * tiling.rows;
      const int64_t channels = std::min(tiling.channels, plan.c_in - channel);
      const int64_t rows = std::min(tiling.rows, plan.c_out - row), first = part * tiling.blocks_per_part;
      worker.add_up(channel, channels, row, rows, first, std::min(first + tiling.blocks_per_part, tiling.line_blocks));
      worker.finish(rows, channels * plan.taps,
                    parts.data() + part * tiling.results + row * row_stride + channel * plan.taps, row_stride);
    }
  });
  float* const to = grad.mutable_data_ptr<float>();
  for (int64_t row = 0; row < plan.c_out; ++row) {
    const float scale = cotangent.finish.at(0, row);
    for (int64_t i = row * row_stride; i < (row + 1) * row_stride; ++i) {
      float total = parts[i];
      for (int64_t part = 1; part < tiling.parts; ++part) total += parts[part * tiling.results + i];
      to[i] = scale * total;
    }
  }
  return grad;
}

}  // namespace fastgan
