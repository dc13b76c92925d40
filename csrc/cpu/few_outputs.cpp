// products[tap, o, column] = <weight[o, :, tap], x[:, row, column]>, and y[o, stride * row + shift(tap)] is their sum.
//
// Tasks are stretches of lines of y. A task walks over the lines of x that reach them: it lays a line out in slabs of
// the registers of one product, multiplies it with the weights of the taps that land inside the task, and adds the
// products to lines of y that are complete as soon as no later line of x reaches them. Every sum is over rows of x,
// then taps, then channels, whatever the tasks are.

#include "few_outputs.h"

#include <algorithm>
#include <utility>

#include "conv_plan.h"
#include "large_buffer.h"
#include "product.h"
#include "tasks.h"
#include "word_sums.h"

namespace fastgan {
namespace {

constexpr int64_t kMostOutputs = 8, kLeastInputs = 9;
constexpr int64_t kFewRows = 3;
constexpr int64_t kMostRows = 512;  // products of one line that stay in the second-level cache
// Of y, at least, and tasks of a thread, about: few lines are reached by lines that other tasks read too.
constexpr int64_t kTaskLines = 16, kTasks = 4;
constexpr int64_t kPanelSize = kPanelRows * kPanelStride;
constexpr int64_t kLine = 16;  // floats of a cache line
constexpr int64_t kAhead = 4;  // channels: what memory takes to answer; their pages are apart

// One axis: tap t lays position p of x over position stride * p + shift(t) of y. Mirrored padding is part of x.
struct Axis {
  int64_t mirrored, in, out, taps, stride, first, step;

  Axis(const Tensor& x, const Tensor& weight, const ConvGeometry& g, int axis)
      : mirrored(g.reflect ? g.padding[axis] : 0),
        in(x.size(2 + axis) + 2 * mirrored),
        out(result_size(x, weight, g, axis)),
        taps(weight.size(2 + axis)),
        stride(g.transposed ? g.stride[axis] : 1),
        first((g.transposed ? -g.padding[axis] : g.padding[axis]) - mirrored),
        step(g.transposed ? g.dilation[axis] : -g.dilation[axis]) {}

  int64_t shift(int64_t tap) const { return first + tap * step; }
  int64_t least() const { return std::min(shift(0), shift(taps - 1)); }
  int64_t most() const { return std::max(shift(0), shift(taps - 1)); }
};

// Registers of one product times lanes: rows of up to three take twice as many (product.cpp).
int64_t slab_size(int64_t rows) { return product_lanes() * product_vectors() * (rows > kFewRows ? 1 : 2); }

// Pixels of one line of one channel to slabs `to_step` apart, with 0 behind the last.
struct SlabLine {
  const float* from;
  int64_t pixel, pixels, slab, ahead;
  float scale, least;
  float* to;
  int64_t to_step;
};

FASTGAN_MULTIVERSION void fill_slabs(const SlabLine& l) {
  for (int64_t first = 0; first < l.pixels; first += l.slab) {
    const float* const from = l.from + first * l.pixel;
    float* const to = l.to + first / l.slab * l.to_step;
    const int64_t count = std::min(l.slab, l.pixels - first);
    const float scale = l.scale, least = l.least;
    if (l.pixel == 1) {
      for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + l.ahead + i);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) to[i] = at_least(scale * from[i], least);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = at_least(scale * from[i * l.pixel], least);
    }
    std::fill(to + count, to + l.slab, 0.0f);
  }
}

class Call {
 public:
  Call(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g)
      : image_(image),
        n_(x.size(0)),
        c_in_(x.size(1)),
        c_out_(weight.size(g.transposed ? 1 : 0)),
        y_(x, weight, g, 0),
        x_(x, weight, g, 1),
        of_tap_(c_out_ * x_.taps),
        rows_(y_.taps * of_tap_),
        slab_(slab_size(rows_)),
        slabs_(ceil_div(x_.in, slab_)),
        chunks_(ceil_div(c_in_, kPanelDepth)),
        slab_step_(c_in_ * slab_ + kLine),
        row_stride_(slabs_ * slab_ + kLine),
        before_(std::max<int64_t>(0, -floor_div(x_.least(), x_.stride))),
        width_(before_ + std::max(x_.in + floor_div(x_.most(), x_.stride), ceil_div(x_.out, x_.stride))),
        open_(y_.most() - y_.least() + 1),
        panels_(ceil_div(rows_, kPanelRows) * chunks_ * kPanelSize) {
    for (int64_t i = 0; i < slab_; i += product_lanes()) vectors_.push_back(static_cast<int32_t>(i));
    // Few weights are scaled sooner than many pixels.
    if (n_ == 1 && image_.least == kLeast) scale_ = std::exchange(image_.scale, {});
    pack(weight, g.transposed);
  }

  void run(const PlanarResult& result) const;

 private:
  // One thread's buffers.
  struct Buffers {
    LargeBuffer line;          // of x: [slabs, C_in, slab]
    LargeBuffer products;      // [rows, row_stride]
    std::vector<float> group;  // of a mirrored x: the line of a group's channels
    std::vector<float> sums;   // of the lines of y that are not complete: [open, C_out, stride, width]
    std::vector<float> result;
    std::vector<const float*> residues;
    PlaneWriter writer;
  };

  // Lines [begin, end) of y in one sample; `next` is the first that is not written yet.
  struct Task {
    int64_t sample, begin, end, next;
  };

  void pack(const Tensor& weight, bool transposed);
  void load(int64_t sample, int64_t row, Buffers& b) const;
  void load_groups(int64_t sample, int64_t row, Buffers& b) const;
  void load_mirrored(int64_t sample, int64_t row, Buffers& b) const;
  void multiply(int64_t first_row, int64_t rows, Buffers& b) const;
  void add(int64_t tap, int64_t line, Buffers& b) const;
  void write_until(int64_t line, Task& task, Buffers& b) const;
  void run_task(Task task, Buffers& b) const;

  int64_t line_sums() const { return c_out_ * x_.stride * width_; }
  // Of one output channel and one residue of the columns.
  float* sums(int64_t line, int64_t channel, int64_t residue, Buffers& b) const {
    return b.sums.data() + line % open_ * line_sums() + (channel * x_.stride + residue) * width_;
  }

  ScaledImage image_;
  Scales<float> scale_;  // of the weights
  const int64_t n_, c_in_, c_out_;
  const Axis y_, x_;
  const int64_t of_tap_, rows_;  // products of one row of taps, and of all
  const int64_t slab_, slabs_, chunks_;
  const int64_t slab_step_, row_stride_;  // not powers of two, whose multiples share one set of a cache
  const int64_t before_, width_;          // columns before the first of y, and of a line of sums
  const int64_t open_;                    // lines of y that one line of x reaches over
  LargeBuffer panels_;                    // [panel, chunk, kPanelRows, kPanelStride], rows in the order [kH, C_out, kW]
  std::vector<int32_t> vectors_;
};

void Call::pack(const Tensor& weight, bool transposed) {
  const float* const values = weight.const_data_ptr<float>();
  const int64_t output = weight.stride(transposed ? 1 : 0), input = weight.stride(transposed ? 0 : 1);
  for (int64_t r = 0; r < rows_; ++r) {
    const int64_t tap = r / of_tap_ * x_.taps + r % x_.taps;
    const float* const from = values + r / x_.taps % c_out_ * output + tap;
    float* const to = panels_.get() + r / kPanelRows * chunks_ * kPanelSize + r % kPanelRows * kPanelStride;
    for (int64_t c = 0; c < c_in_; ++c) {
      to[c / kPanelDepth * kPanelSize + c % kPanelDepth] = scale_.at(0, c) * from[c * input];
    }
  }
}

void Call::run(const PlanarResult& result) const {
  const int64_t tasks = kTasks * torch::stable::get_num_threads();
  const int64_t most_lines = std::max(kTaskLines, ceil_div(n_ * y_.out, tasks));
  const int64_t per_sample = ceil_div(y_.out, most_lines), lines = ceil_div(y_.out, per_sample);
  share_tasks(n_ * per_sample, [&](Tasks tasks) {
    Buffers b{.line = LargeBuffer(slabs_ * slab_step_),
              .products = LargeBuffer(rows_ * row_stride_),
              .group = std::vector<float>(x_.mirrored || y_.mirrored ? kGroup * x_.in : 0),
              .sums = std::vector<float>(open_ * line_sums()),
              .result = std::vector<float>(x_.out),
              .residues = std::vector<const float*>(x_.stride),
              .writer = PlaneWriter(result)};
    while (const auto task = tasks.next()) {
      const int64_t first = std::min(*task % per_sample * lines, y_.out);
      run_task({*task / per_sample, first, std::min(first + lines, y_.out), first}, b);
    }
  });
}

void Call::run_task(Task task, Buffers& b) const {
  const int64_t begin = std::max<int64_t>(0, -floor_div(y_.most() - task.begin, y_.stride));
  const int64_t end = std::min(y_.in, floor_div(task.end - 1 - y_.least(), y_.stride) + 1);
  for (int64_t row = begin; row < end; ++row) {
    write_until(row * y_.stride + y_.least(), task, b);
    int64_t first = y_.taps, last = -1;
    for (int64_t tap = 0; tap < y_.taps; ++tap) {
      const int64_t line = row * y_.stride + y_.shift(tap);
      if (line < task.begin || line >= task.end) continue;
      first = std::min(first, tap);
      last = tap;
    }
    if (last < 0) continue;
    load(task.sample, row, b);
    multiply(first * of_tap_, (last + 1) * of_tap_, b);
    for (int64_t tap = first; tap <= last; ++tap) add(tap, row * y_.stride + y_.shift(tap), b);
  }
  write_until(task.end, task, b);
}

void Call::load(int64_t sample, int64_t row, Buffers& b) const {
  const ScaledImage& x = image_;
  if (x_.mirrored || y_.mirrored) return load_mirrored(sample, row, b);
  if (x.grouped) return load_groups(sample, row, b);
  for (int64_t c = 0; c < c_in_; ++c) {
    fill_slabs({.from = x.data + sample * x.stride_n + c * x.stride_c + row * x.stride_h,
                .pixel = x.stride_w,
                .pixels = x_.in,
                .slab = slab_,
                .ahead = kAhead * x.stride_c,
                .scale = x.scale.at(sample, c),
                .least = x.least,
                .to = b.line.get() + c * slab_,
                .to_step = slab_step_});
  }
}

void Call::load_groups(int64_t sample, int64_t row, Buffers& b) const {
  const ScaledImage& x = image_;
  const bool done = !x.scale.data && x.least == kLeast;
  for (int64_t c = 0; c < c_in_; c += kGroup) {
    const float* const from = x.data + sample * x.stride_n + c * x.stride_c + row * x.stride_h;
    for (int64_t s = 0; s < slabs_; ++s) {
      const int64_t first = s * slab_, count = std::min(slab_, x_.in - first);
      float* const to = b.line.get() + s * slab_step_ + c * slab_;
      planes_of(Spreading<float>{.from = from + first * kGroup,
                                 .stride = kGroup,
                                 .pixels = count,
                                 .shift = nullptr,
                                 .to = to,
                                 .to_stride = slab_});
      for (int64_t i = 0; i < kGroup && !(done && count == slab_); ++i) {
        fill_slabs({.from = to + i * slab_,
                    .pixel = 1,
                    .pixels = count,
                    .slab = slab_,
                    .ahead = 0,
                    .scale = x.scale.at(sample, c + i),
                    .least = x.least,
                    .to = to + i * slab_,
                    .to_step = slab_step_});
      }
    }
  }
}

void Call::load_mirrored(int64_t sample, int64_t row, Buffers& b) const {
  const ScaledImage& x = image_;
  const int64_t border = x_.mirrored, width = x_.in - 2 * border;
  const int64_t line = continued(row - y_.mirrored, y_.in - 2 * y_.mirrored, true);
  for (int64_t c = 0; c < c_in_; c += kGroup) {
    const float* const from = x.data + sample * x.stride_n + c * x.stride_c + line * x.stride_h;
    float* const inside = b.group.data() + border;
    const int64_t channels = std::min(kGroup, c_in_ - c);
    if (x.grouped) {
      planes_of(Spreading<float>{
          .from = from, .stride = kGroup, .pixels = width, .shift = nullptr, .to = inside, .to_stride = x_.in});
    } else {
      for (int64_t i = 0; i < channels; ++i) std::copy_n(from + i * x.stride_c, width, inside + i * x_.in);
    }
    for (int64_t i = 0; i < channels; ++i) {
      float* const pixels = inside + i * x_.in;
      for (int64_t p = 1; p <= border; ++p) {
        pixels[-p] = pixels[p];
        pixels[width - 1 + p] = pixels[width - 1 - p];
      }
      fill_slabs({.from = pixels - border,
                  .pixel = 1,
                  .pixels = x_.in,
                  .slab = slab_,
                  .ahead = 0,
                  .scale = x.scale.at(sample, c + i),
                  .least = x.least,
                  .to = b.line.get() + (c + i) * slab_,
                  .to_step = slab_step_});
    }
  }
}

// Products [first, end), and up to a whole panel around them.
void Call::multiply(int64_t first, int64_t end, Buffers& b) const {
  for (int64_t s = 0; s < slabs_; ++s) {
    for (int64_t r = first / kPanelRows * kPanelRows; r < end; r += kPanelRows) {
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const int64_t channel = chunk * kPanelDepth;
        panel_products({.weights = panels_.get() + (r / kPanelRows * chunks_ + chunk) * kPanelSize,
                        .rows = std::min(kPanelRows, rows_ - r),
                        .offsets = nullptr,
                        .step = slab_,
                        .depth = std::min(kPanelDepth, c_in_ - channel),
                        .image = b.line.get() + s * slab_step_ + channel * slab_,
                        .columns = vectors_.data(),
                        .vectors = static_cast<int64_t>(vectors_.size()),
                        .sums = b.products.get() + r * row_stride_ + s * slab_,
                        .sums_stride = row_stride_,
                        .overwrite = chunk == 0});
      }
    }
  }
}

// The products of one row of taps to the line of y that they land on.
void Call::add(int64_t tap, int64_t line, Buffers& b) const {
  for (int64_t o = 0; o < c_out_; ++o) {
    for (int64_t j = 0; j < x_.taps; ++j) {
      const int64_t place = floor_div(x_.shift(j), x_.stride), residue = x_.shift(j) - place * x_.stride;
      axpy(1.0f, b.products.get() + (tap * of_tap_ + o * x_.taps + j) * row_stride_,
           sums(line, o, residue, b) + before_ + place, x_.in);
    }
  }
}

// Writes the task's lines before `line`: nothing more is added to them.
void Call::write_until(int64_t line, Task& task, Buffers& b) const {
  for (; task.next < std::min(line, task.end); ++task.next) {
    for (int64_t o = 0; o < c_out_; ++o) {
      const float* from = sums(task.next, o, 0, b) + before_;
      if (x_.stride > 1) {
        for (int64_t residue = 0; residue < x_.stride; ++residue) b.residues[residue] = from + residue * width_;
        interleave(b.residues.data(), x_.stride, b.result.data(), x_.out);
        from = b.result.data();
      }
      b.writer.write(task.sample, o, task.next * x_.out, x_.out, from);
    }
    std::fill_n(sums(task.next, 0, 0, b), line_sums(), 0.0f);
  }
}

}  // namespace

bool few_outputs_takes(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (!g.transposed && (g.stride[0] != 1 || g.stride[1] != 1)) return false;
  const int64_t c_out = weight.size(g.transposed ? 1 : 0), rows = weight.numel() / x.size(1);
  if (c_out > kMostOutputs || x.size(1) < kLeastInputs || rows > kMostRows) return false;
  // What is multiplied behind the end of a line costs little of so few products.
  const int64_t width = x.size(3) + (g.reflect ? 2 * g.padding[1] : 0),
                most = rows <= kFewRows ? 3 * width : 5 * width / 4;
  return round_up(width, slab_size(rows)) <= most;
}

void few_outputs_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g,
                      const PlanarResult& result) {
  Call(x, weight, image, g).run(result);
}

}  // namespace fastgan
