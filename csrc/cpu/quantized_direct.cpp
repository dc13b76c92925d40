// The image is rounded once, by all threads: to bytes with all channels of a pixel side by side, with the padding
// around, counted from the least value on, so that none has a sign. Then tasks of some lines of results and a slab of
// output channels add up their products, tap by tap, each chunk of weights in the first-level cache while the pixels
// pass by. That values are counted from the least one adds the same to every result of a channel, taken off at the end.

#include "quantized_direct.h"

#include <algorithm>
#include <array>
#include <memory>

#include "byte_product.h"
#include "conv_plan.h"
#include "kept_weights.h"
#include "large_buffer.h"
#include "simd.h"
#include "winograd_weights.h"

namespace fastgan {
namespace {

constexpr int64_t kWord = 4;           // bytes, of as many channels
constexpr int64_t kNearBytes = 32768;  // of weights that stay in the first-level cache
constexpr int64_t kBlockPixels = 192;  // results of a phase that a slab's weights are read for
constexpr int64_t kFloatBytes = sizeof(float);

// What a value is rounded to, counted from the least one.
FASTGAN_INLINE int32_t rounded(float value, const Quantization& q) { return static_cast<int32_t>(q(value) - q.low); }

using Bytes = register_t<uint8_t, 16>;

// Rows of 16 bytes become columns: four times, every other byte of two rows eight apart.
FASTGAN_INLINE void transpose(Bytes (&rows)[kGroup]) {
  FASTGAN_UNROLL
  for (int round = 0; round < 4; ++round) {
    Bytes next[kGroup];
    FASTGAN_UNROLL
    for (int i = 0; i < 8; ++i) {
      next[2 * i] =
          __builtin_shufflevector(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] =
          __builtin_shufflevector(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::copy_n(next, kGroup, rows);
  }
}

// Pixels of a line of some planes, up to kGroup of them, to bytes side by side; those of other channels are `zero`.
struct Line {
  const float* from;
  int64_t channel, pixel;  // between the planes, and the pixels of one
  int64_t channels, pixels;
  const float* scale;  // [kGroup]
  Quantization quantization;
  uint8_t zero;
  uint8_t* to;
  int64_t stride;
  int64_t ahead;  // from here to the line that is rounded next: more lines than a processor foresees by itself
};

FASTGAN_INLINE void round_block(const Line& l, int64_t first) {
  Bytes rows[kGroup];
  for (int64_t c = 0; c < kGroup; ++c) {
    if (c >= l.channels) {
      rows[c] = Bytes{} + l.zero;
      continue;
    }
    const float* const from = l.from + c * l.channel + first;
    __builtin_prefetch(from + l.ahead);
    int32_t whole[kGroup];
#pragma omp simd
    for (int64_t p = 0; p < kGroup; ++p) {
      whole[p] = rounded(l.scale[c] * from[p], l.quantization);
    }
    rows[c] = __builtin_convertvector((load<register_t<int32_t, 64>>(whole)), Bytes);
  }
  transpose(rows);
  for (int64_t p = 0; p < kGroup; ++p) store(rows[p], l.to + (first + p) * l.stride);
}

FASTGAN_MULTIVERSION void round_line(const Line& l) {
  if (l.pixel == 1 && l.pixels >= kGroup) {
    // The last block overlaps the one before.
    for (int64_t p = 0; p < l.pixels; p += kGroup) round_block(l, std::min(p, l.pixels - kGroup));
    return;
  }
  for (int64_t p = 0; p < l.pixels; ++p) {
    for (int64_t c = 0; c < kGroup; ++c) {
      const float value = c < l.channels ? l.scale[c] * l.from[c * l.channel + p * l.pixel] : 0.0f;
      l.to[p * l.stride + c] = static_cast<uint8_t>(rounded(value, l.quantization));
    }
  }
}

// to[c * to_stride + p] = from[p * stride + c] + shift[c] for kGroup channels c.
FASTGAN_MULTIVERSION void planes_of(const int32_t* from, int64_t stride, int64_t pixels, const int32_t* shift,
                                    float* to, int64_t to_stride) {
  using Quad = register_t<int32_t, 16>;
  using Floats = register_t<float, 16>;
  constexpr int64_t kQuad = 4;
  if (pixels < kQuad) {
    for (int64_t c = 0; c < kGroup; ++c) {
      for (int64_t p = 0; p < pixels; ++p) to[c * to_stride + p] = static_cast<float>(from[p * stride + c] + shift[c]);
    }
    return;
  }
  for (int64_t p = 0; p < pixels; p += kQuad) {
    const int64_t at = std::min(p, pixels - kQuad);  // the last step overlaps the one before
    for (int64_t channel = 0; channel < kGroup; channel += kQuad) {
      const int32_t* const corner = from + at * stride + channel;
      const Quad shifts = load<Quad>(shift + channel);
      const Quad a = load<Quad>(corner) + shifts, b = load<Quad>(corner + stride) + shifts,
                 c = load<Quad>(corner + 2 * stride) + shifts, d = load<Quad>(corner + 3 * stride) + shifts;
      FASTGAN_UNROLL
      for (int i = 0; i < kQuad; ++i) {
        store(__builtin_convertvector((Quad{a[i], b[i], c[i], d[i]}), Floats), to + (channel + i) * to_stride + at);
      }
    }
  }
}

class Call {
 public:
  Call(const ConvPlan& plan, const Tensor& weight, const ConvGeometry& g, const Quantization& quantization);

  void load(const ScaledImage& x);
  void multiply(const PlanarResult& result) const;

 private:
  // Weights that are in the first-level cache together: words of some taps.
  struct Chunk {
    std::vector<int32_t> taps;  // where their first word lies from a pixel on
    int64_t words;              // of each tap
    int64_t first;              // word of the phase
  };
  // Of a phase: only taps that meet some pixel of x.
  struct PhaseTaps {
    std::vector<int64_t> kernel;  // their places in a kernel
    std::vector<Chunk> chunks;
    int64_t first;  // word of the slab
  };
  // One thread's buffers.
  struct Buffers {
    std::vector<const uint8_t*> pixels;
    std::vector<int32_t> sums, shifts;   // [phase, pixel, slab]; [kGroup]
    std::vector<float> planes, results;  // [kGroup, phase, pixel]; rows of y
    PlaneWriter writer;
  };

  bool meets_pixel(const Tap& tap) const;
  PhaseTaps taps_of(const Phase& phase, int64_t first) const;
  LargeBuffer packed(const Tensor& weight, const ConvGeometry& g) const;
  const int8_t* weights() const { return reinterpret_cast<const int8_t*>(weights_->get()); }
  // Sums of the weights, [phase, slabs * slab], behind the weights.
  int64_t weight_bytes() const { return slabs_ * words_of_slab_ * slab_ * kWord; }
  const int32_t* weight_sums() const { return reinterpret_cast<const int32_t*>(weights() + weight_bytes()); }
  uint8_t* bytes() const { return reinterpret_cast<uint8_t*>(image_.get()); }

  void add_products(int64_t line, int64_t lines, int64_t slab, Buffers& b) const;
  void write(int64_t line, int64_t lines, int64_t channel, Buffers& b) const;
  void interleave(const float* from, int64_t lines, int64_t rows, float* to) const;

  const ConvPlan& plan_;
  const Quantization quantization_;
  const int64_t phases_, depth_, words_, slab_, slabs_;
  const int64_t stride_, rows_, columns_;  // of x; and the image's, with the padding around
  const int64_t lines_;                    // of results, per task
  int64_t words_of_slab_ = 0;
  std::vector<PhaseTaps> taps_;
  LargeBuffer image_;  // bytes [N, rows, columns, depth]
  std::shared_ptr<const LargeBuffer> weights_;
};

Call::Call(const ConvPlan& plan, const Tensor& weight, const ConvGeometry& g, const Quantization& quantization)
    : plan_(plan),
      quantization_(quantization),
      phases_(static_cast<int64_t>(plan.phases.size())),
      depth_(round_up(plan.c_in, kGroup)),
      words_(depth_ / kWord),
      slab_(slab_size(plan.c_out, Storage::kInt8)),
      slabs_(ceil_div(plan.c_out, slab_)),
      stride_(plan.input.stride),
      rows_(stride_ * (plan.base_h + plan.input.dy_span)),
      columns_(stride_ * (plan.base_w + plan.input.dx_span)),
      lines_([&] {
        const int64_t all = plan.n * plan.base_h, shares = ceil_div(torch::stable::get_num_threads(), slabs_);
        return std::clamp<int64_t>(kBlockPixels / plan.base_w, 1, ceil_div(all, shares));
      }()),
      image_(ceil_div(plan.n * rows_ * columns_ * depth_, kFloatBytes)) {
  std::vector<int64_t> key{-1, g.transposed, g.stride[0], weight.size(0), weight.size(1)};
  for (const Phase& phase : plan.phases) {
    taps_.push_back(taps_of(phase, words_of_slab_));
    words_of_slab_ += words_ * static_cast<int64_t>(taps_.back().kernel.size());
    key.push_back(-1);
    key.insert(key.end(), taps_.back().kernel.begin(), taps_.back().kernel.end());
  }
  weights_ =
      made_of(static_cast<const float*>(weight.data_ptr()), weight.numel(), key, [&] { return packed(weight, g); });
}

bool Call::meets_pixel(const Tap& tap) const {
  const auto meets = [&](int64_t results, int64_t shift, int64_t place, int64_t size) {
    const int64_t first = stride_ * shift + place, last = first + stride_ * (results - 1);
    return last >= 0 && first < size;
  };
  return plan_.input.reflect || (meets(plan_.base_h, tap.dy, tap.plane / stride_, plan_.input.h_in) &&
                                 meets(plan_.base_w, tap.dx, tap.plane % stride_, plan_.input.w_in));
}

Call::PhaseTaps Call::taps_of(const Phase& phase, int64_t first) const {
  PhaseTaps found{.kernel = {}, .chunks = {}, .first = first};
  const int64_t near = kNearBytes / (slab_ * kWord), together = std::max<int64_t>(1, near / words_);
  for (const Tap& tap : phase.taps) {
    if (!meets_pixel(tap)) continue;
    const int64_t row = stride_ * (tap.dy - plan_.input.dy_min) + tap.plane / stride_,
                  column = stride_ * (tap.dx - plan_.input.dx_min) + tap.plane % stride_;
    const int64_t at = (row * columns_ + column) * depth_, words = words_ * static_cast<int64_t>(found.kernel.size());
    for (int64_t word = 0; word < words_; word += near) {
      if (words_ > near || found.kernel.size() % together == 0) {
        found.chunks.push_back({.taps = {}, .words = std::min(near, words_ - word), .first = words + word});
      }
      found.chunks.back().taps.push_back(static_cast<int32_t>(at + kWord * word));
    }
    found.kernel.push_back(tap.weight);
  }
  return found;
}

LargeBuffer Call::packed(const Tensor& weight, const ConvGeometry& g) const {
  const auto* const from = static_cast<const int8_t*>(weight.data_ptr());
  const int64_t row = weight.stride(g.transposed ? 1 : 0), channel = weight.stride(g.transposed ? 0 : 1);
  LargeBuffer result(weight_bytes() / kFloatBytes + phases_ * slabs_ * slab_, true);
  auto* const to = reinterpret_cast<int8_t*>(result.get());
  auto* const sums = reinterpret_cast<int32_t*>(to + weight_bytes());
  torch::stable::parallel_for(0, slabs_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slab = begin; slab < end; ++slab) {
      int8_t* const of_slab = to + slab * words_of_slab_ * slab_ * kWord;
      std::fill_n(of_slab, words_of_slab_ * slab_ * kWord, int8_t{0});
      for (int64_t p = 0; p < phases_; ++p) {
        int32_t* const sum = sums + (p * slabs_ + slab) * slab_;
        std::fill_n(sum, slab_, 0);
        for (int64_t o = 0; o < std::min(slab_, plan_.c_out - slab * slab_); ++o) {
          for (int64_t c = 0; c < plan_.c_in; ++c) {
            const int8_t* const kernel = from + (slab * slab_ + o) * row + c * channel;
            int8_t* at = of_slab + ((taps_[p].first + c / kWord) * slab_ + o) * kWord + c % kWord;
            for (const int64_t tap : taps_[p].kernel) {
              *at = kernel[tap];
              sum[o] += kernel[tap];
              at += words_ * slab_ * kWord;
            }
          }
        }
      }
    }
  });
  return result;
}

void Call::load(const ScaledImage& x) {
  const Sampling& in = plan_.input;
  const int64_t top = stride_ * in.dy_min, left = stride_ * in.dx_min;
  const int64_t first = std::clamp<int64_t>(-left, 0, columns_), last = std::clamp(in.w_in - left, first, columns_);
  const auto zero = static_cast<uint8_t>(-quantization_.low);
  torch::stable::parallel_for(0, plan_.n * rows_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* const to = bytes() + row * columns_ * depth_;
      const int64_t sample = row / rows_, line = continued(row % rows_ + top, in.h_in, in.reflect);
      if (line < 0) {
        std::fill_n(to, columns_ * depth_, zero);
        continue;
      }
      for (int64_t channel = 0; channel < depth_; channel += kGroup) {
        std::array<float, kGroup> scale{};
        const int64_t channels = std::clamp<int64_t>(plan_.c_in - channel, 0, kGroup);
        for (int64_t c = 0; c < channels; ++c) scale[c] = x.scale.at(sample, channel + c);
        const auto round = [&](int64_t column, int64_t place, int64_t pixels) {
          round_line(
              {.from = x.data + sample * x.stride_n + channel * x.stride_c + line * x.stride_h + column * x.stride_w,
               .channel = x.stride_c,
               .pixel = x.stride_w,
               .channels = channels,
               .pixels = pixels,
               .scale = scale.data(),
               .quantization = quantization_,
               .zero = zero,
               .to = to + place * depth_ + channel,
               .stride = depth_,
               .ahead = x.stride_h});
        };
        const auto pad = [&](int64_t place) {
          const int64_t column = continued(place + left, in.w_in, in.reflect);
          if (column >= 0) return round(column, place, 1);
          std::fill_n(to + place * depth_ + channel, kGroup, zero);
        };
        for (int64_t place = 0; place < first; ++place) pad(place);
        round(first + left, first, last - first);
        for (int64_t place = last; place < columns_; ++place) pad(place);
      }
    }
  });
}

void Call::multiply(const PlanarResult& result) const {
  const int64_t all_lines = plan_.n * plan_.base_h, blocks = ceil_div(all_lines, lines_);
  torch::stable::parallel_for(0, slabs_ * blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t pixels = lines_ * plan_.base_w;
    Buffers b{.pixels = std::vector<const uint8_t*>(pixels),
              .sums = std::vector<int32_t>(phases_ * pixels * slab_),
              .shifts = std::vector<int32_t>(kGroup),
              .planes = std::vector<float>(kGroup * phases_ * pixels),
              .results = std::vector<float>(plan_.out_stride > 1 ? lines_ * plan_.out_stride * plan_.w_out : 0),
              .writer = PlaneWriter(result)};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slab = task / blocks, line = task % blocks * lines_, lines = std::min(lines_, all_lines - line);
      add_products(line, lines, slab, b);
      for (int64_t c = 0; c < slab_ && slab * slab_ + c < plan_.c_out; c += kGroup) {
        for (int64_t p = 0; p < phases_; ++p) {
          const int32_t* const sums = weight_sums() + (p * slabs_ + slab) * slab_ + c;
          for (int64_t i = 0; i < kGroup; ++i) b.shifts[i] = static_cast<int32_t>(quantization_.low) * sums[i];
          planes_of(b.sums.data() + p * pixels * slab_ + c, slab_, lines * plan_.base_w, b.shifts.data(),
                    b.planes.data() + p * pixels, phases_ * pixels);
        }
        write(line, lines, slab * slab_ + c, b);
      }
    }
  });
}

void Call::add_products(int64_t line, int64_t lines, int64_t slab, Buffers& b) const {
  const int64_t pixels = lines * plan_.base_w;
  for (int64_t i = 0; i < pixels; ++i) {
    const int64_t of = line + i / plan_.base_w, row = of / plan_.base_h * rows_ + stride_ * (of % plan_.base_h);
    b.pixels[i] = bytes() + (row * columns_ + stride_ * (i % plan_.base_w)) * depth_;
  }
  int32_t* sums = b.sums.data();
  for (const PhaseTaps& phase : taps_) {
    if (phase.chunks.empty()) std::fill_n(sums, pixels * slab_, 0);
    for (const Chunk& chunk : phase.chunks) {
      const int64_t word = slab * words_of_slab_ + phase.first + chunk.first;
      for (int64_t i = 0; i < pixels; i += kPanelRows) {
        byte_products({.pixels = b.pixels.data() + i,
                       .rows = std::min(kPanelRows, pixels - i),
                       .taps = chunk.taps.data(),
                       .tap_count = static_cast<int64_t>(chunk.taps.size()),
                       .words = chunk.words,
                       .weights = weights() + word * slab_ * kWord,
                       .vectors = slab_ / product_lanes(),
                       .sums = sums + i * slab_,
                       .sums_stride = slab_,
                       .overwrite = chunk.first == 0});
      }
    }
    sums += lines_ * plan_.base_w * slab_;
  }
}

// Channels [channel, channel + kGroup) of y from their planes: all lines of a sample at once.
void Call::write(int64_t line, int64_t lines, int64_t channel, Buffers& b) const {
  const int64_t pixels = lines_ * plan_.base_w, stride = plan_.out_stride;
  for (int64_t o = 0; o < std::min(kGroup, plan_.c_out - channel); ++o) {
    const float* const planes = b.planes.data() + o * phases_ * pixels;
    for (int64_t done = 0; done < lines;) {
      const int64_t sample = (line + done) / plan_.base_h, base = (line + done) % plan_.base_h;
      const int64_t count = std::min(lines - done, plan_.base_h - base), first = base * stride;
      const int64_t rows = std::min(stride * (base + count), plan_.h_out) - first;
      const float* from = planes + done * plan_.base_w;
      if (stride > 1) {
        interleave(from, count, rows, b.results.data());
        from = b.results.data();
      }
      b.writer.write(sample, channel + o, first * plan_.w_out, rows * plan_.w_out, from);
      done += count;
    }
  }
}

// Rows of y from `lines` lines of each phase.
void Call::interleave(const float* from, int64_t lines, int64_t rows, float* to) const {
  for (const Phase& phase : plan_.phases) {
    for (int64_t l = 0; l < lines; ++l) {
      const int64_t row = l * plan_.out_stride + phase.row;
      if (row >= rows) continue;
      spread_row(from + l * plan_.base_w, plan_.out_stride, to + row * plan_.w_out + phase.column,
                 plan_.columns_of(phase));
    }
    from += lines_ * plan_.base_w;
  }
}

}  // namespace

Refusal refused_by_quantized_direct(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (g.dilation[0] != 1 || g.dilation[1] != 1)
    return {"it takes dilation = 1, got # and #", g.dilation[0], g.dilation[1]};
  const int64_t products = weight.size(g.transposed ? 0 : 1) * weight.size(2) * weight.size(3);
  const int64_t most = INT32_MAX / (int64_t{255} * 128);
  if (products > most) return {"its sums of # products might not fit 32 bits: it takes #", products, most};
  const int64_t bytes = round_up(x.size(1), kGroup) * x.size(2) * x.size(3);
  if (bytes > INT32_MAX / 8) return {"it takes images of at most # bytes, got #", INT32_MAX / 8, bytes};
  return {};
}

double quantized_direct_cost(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  // Of a product, of a value that is rounded, of a sum that is written, of a weight that is read: on an Ice Lake with
  // two threads, in units of what its float products cost there. Without VNNI, so much that Winograd's tiles win.
  const double product = has_byte_products() ? 0.2 : 4;
  constexpr double kValue = 30, kSum = 40, kWeight = 2;
  const ConvPlan plan(x, weight, g);
  const double results = static_cast<double>(plan.n) * plan.base_h * plan.base_w;
  return product * results * static_cast<double>(weight.numel()) + kValue * static_cast<double>(x.numel()) +
         kSum * static_cast<double>(plan.n) * plan.c_out * plan.h_out * plan.w_out +
         kWeight * static_cast<double>(weight.numel());
}

void quantized_direct_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& in_scale,
                           const ConvGeometry& g, const Quantization& quantization, const PlanarResult& result) {
  const ConvPlan plan(x, weight, g);
  Call call(plan, weight, g, quantization);
  call.load(ScaledImage(x, in_scale));
  call.multiply(result);
}

}  // namespace fastgan
