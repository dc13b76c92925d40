// The image is laid out once, by all threads, with all channels of a pixel side by side and the padding around. Then
// tasks of some lines of results and a slab of output channels add up their products, tap by tap, each chunk of weights
// in the first-level cache while the pixels pass by. Taps that meet only padding are not read. Tasks depend on the
// shapes and the number of threads, the order of a sum on the shapes alone.
//
// Bytes of the image are counted from the least value on. That adds the same to every result of a channel, taken off at
// the end. Sums lie as the next such convolution reads its image, channels side by side: rounded, they are laid there.

#include "packed_direct.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "bf16.h"
#include "kept_weights.h"
#include "large_buffer.h"
#include "packed_layout.h"
#include "recorded_calls.h"
#include "tasks.h"
#include "winograd_weights.h"
#include "word_product.h"

namespace fastgan {
namespace {

constexpr int64_t kLineBytes = 64;  // of a cache line

template <typename Word>
class Call {
 public:
  using Value = typename WordForm<Word>::Value;

  // Of the image at `values`.
  Call(const PackedLayout<Word>& layout, const Value* values, const Tensor& weight, const ConvGeometry& g,
       Storage storage, const Quantization& quantization);

  void multiply(const PlanarResult& result) const;
  // To images of bytes, with the epilogue of `result`.
  void multiply(const PlanarResult& result, const std::vector<ByteImage>& images) const;

 private:
  using Source = typename WordForm<Word>::Source;
  using Chunk = typename PackedLayout<Word>::Chunk;
  static constexpr int64_t kPerWord = WordForm<Word>::kPerWord;
  static constexpr bool kBytes = std::is_same_v<Word, int32_t>;

  // One thread's buffers.
  struct Buffers {
    std::vector<const Word*> pixels;
    std::vector<Word> sums;              // [phase, pixel, slab]
    std::vector<int32_t> shifts;         // [kGroup]
    std::vector<float> planes, results;  // [kGroup, phase, pixel]; rows of y
    PlaneWriter writer;
  };

  LargeBuffer packed(const Tensor& weight, const ConvGeometry& g, bool lasting) const;
  void pack_slab(const Source* from, int64_t row, int64_t channel, int64_t slab, const LargeBuffer& to) const;
  int64_t weight_bytes() const { return slabs_ * layout_.words_of_slab * slab_ * layout_.word_bytes; }
  // Of bytes: sums of the weights, [phase, slabs * slab], behind the weights.
  int32_t* weight_sums(const LargeBuffer& packed) const {
    return reinterpret_cast<int32_t*>(reinterpret_cast<char*>(packed.get()) + weight_bytes());
  }

  // What sums of bytes, counted from the least on, are too small by; of kGroup or slab_ channels.
  void shifts_of(int64_t phase, int64_t channel, int64_t channels, int32_t* shifts) const;
  void add_products(int64_t line, int64_t lines, int64_t slab, std::vector<const Word*>& starts, Word* sums) const;
  void multiply_chunk(const Chunk& chunk, int64_t word, const Word* const* starts, int64_t pixels, Word* sums) const;
  void write(int64_t line, int64_t lines, int64_t channel, Buffers& b) const;
  void write_groups(int64_t line, int64_t lines, int64_t slab, const float* sums, const GroupWriter& groups) const;
  void join_phases(const float* from, int64_t rows, float* to) const;

  const PackedLayout<Word>& layout_;
  const ConvPlan& plan_;
  const Storage storage_;
  const Quantization quantization_;
  const int64_t phases_, slab_, slabs_, blocks_, lines_;
  const Value* const image_;
  const std::shared_ptr<const LargeBuffer> weights_;  // [slabs, words of all phases, slab]
};

template <typename Word>
Call<Word>::Call(const PackedLayout<Word>& layout, const Value* values, const Tensor& weight, const ConvGeometry& g,
                 Storage storage, const Quantization& quantization)
    : layout_(layout),
      plan_(layout.plan),
      storage_(storage),
      quantization_(quantization),
      phases_(static_cast<int64_t>(plan_.phases.size())),
      slab_(layout.slab),
      slabs_(layout.slabs),
      blocks_(layout.blocks),
      lines_(layout.lines),
      image_(values),
      weights_(made_of(static_cast<const float*>(weight.data_ptr()), weight.numel(), layout.key,
                       [&](bool lasting) { return packed(weight, g, lasting); })) {}

template <typename Word>
LargeBuffer Call<Word>::packed(const Tensor& weight, const ConvGeometry& g, bool lasting) const {
  const auto* const from = static_cast<const Source*>(weight.data_ptr());
  const int64_t row = weight.stride(g.transposed ? 1 : 0), channel = weight.stride(g.transposed ? 0 : 1);
  LargeBuffer result(weight_bytes() / sizeof(float) + (kBytes ? phases_ * slabs_ * slab_ : 0), lasting);
  torch::stable::parallel_for(0, slabs_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slab = begin; slab < end; ++slab) pack_slab(from, row, channel, slab, result);
  });
  return result;
}

// Some input channels at a time, so that what is written for one output channel is still there for the next.
template <typename Word>
void Call<Word>::pack_slab(const Source* from, int64_t row, int64_t channel, int64_t slab,
                           const LargeBuffer& to) const {
  const int64_t first = slab * layout_.words_of_slab * slab_, rows = std::min(slab_, plan_.c_out - slab * slab_);
  const auto each_weight = [&](const auto& f) {
    for (int64_t p = 0; p < phases_; ++p) {
      for (int64_t block = 0; block < plan_.c_in; block += kGroup) {
        for (int64_t o = 0; o < rows; ++o) {
          for (int64_t c = block; c < std::min(block + kGroup, plan_.c_in); ++c) {
            const Source* const kernel = from + (slab * slab_ + o) * row + c * channel;
            const auto& taps = layout_.taps[p];
            int64_t word = first + (taps.first + c / kPerWord) * slab_;
            for (const int64_t tap : taps.kernel) {
              f(p, o, c, word, kernel[tap]);
              word += layout_.words * slab_;
            }
          }
        }
      }
    }
  };
  if constexpr (kBytes) {
    auto* const values = reinterpret_cast<int8_t*>(to.get());
    std::fill_n(values + first * kPerWord, layout_.words_of_slab * slab_ * kPerWord, int8_t{0});
    int32_t* const sums = weight_sums(to) + slab * slab_;
    for (int64_t p = 0; p < phases_; ++p) std::fill_n(sums + p * slabs_ * slab_, slab_, 0);
    each_weight([&](int64_t p, int64_t o, int64_t c, int64_t word, int8_t value) {
      values[(word + o) * kPerWord + c % kPerWord] = value;
      sums[p * slabs_ * slab_ + o] += value;
    });
  } else if (storage_ == Storage::kBfloat16) {
    BFloat16* const values = bf16_of(to);
    std::fill_n(values + first, layout_.words_of_slab * slab_, BFloat16(0.0f));
    each_weight([&](int64_t, int64_t o, int64_t, int64_t word, float value) {
      values[word + paired(o, product_lanes())] = BFloat16(value);
    });
  } else {
    std::fill_n(to.get() + first, layout_.words_of_slab * slab_, 0.0f);
    each_weight([&](int64_t, int64_t o, int64_t, int64_t word, float value) { to.get()[word + o] = value; });
  }
}

template <typename Word>
void Call<Word>::multiply(const PlanarResult& result) const {
  const int64_t all_lines = plan_.n * plan_.base_h;
  const GroupWriter groups(result);
  share_tasks(slabs_ * blocks_, [&](Tasks tasks) {
    const int64_t pixels = lines_ * plan_.base_w;
    Buffers b{.pixels = std::vector<const Word*>(pixels),
              .sums = std::vector<Word>(phases_ * pixels * slab_),
              .shifts = std::vector<int32_t>(kGroup),
              .planes = std::vector<float>(kGroup * phases_ * pixels),
              .results = std::vector<float>(plan_.out_stride > 1 ? lines_ * plan_.out_stride * plan_.w_out : 0),
              .writer = PlaneWriter(result)};
    while (const auto task = tasks.next()) {
      const int64_t slab = *task / blocks_, block = *task % blocks_;
      const int64_t line = all_lines * block / blocks_, lines = all_lines * (block + 1) / blocks_ - line;
      add_products(line, lines, slab, b.pixels, b.sums.data());
      if constexpr (!kBytes) {
        if (result.grouped) {
          write_groups(line, lines, slab, b.sums.data(), groups);
          continue;
        }
      }
      for (int64_t c = 0; c < slab_ && slab * slab_ + c < plan_.c_out; c += kGroup) {
        for (int64_t p = 0; p < phases_; ++p) {
          const Word* shifts = nullptr;
          if constexpr (kBytes) {
            shifts_of(p, slab * slab_ + c, kGroup, b.shifts.data());
            shifts = b.shifts.data();
          }
          planes_of(Spreading<Word>{.from = b.sums.data() + p * pixels * slab_ + c,
                                    .stride = slab_,
                                    .pixels = lines * plan_.base_w,
                                    .shift = shifts,
                                    .to = b.planes.data() + p * pixels,
                                    .to_stride = phases_ * pixels});
        }
        write(line, lines, slab * slab_ + c, b);
      }
    }
  });
}

template <typename Word>
void Call<Word>::shifts_of(int64_t phase, int64_t channel, int64_t channels, int32_t* shifts) const {
  const int32_t* const sums = weight_sums(*weights_) + phase * slabs_ * slab_ + channel;
  for (int64_t i = 0; i < channels; ++i) shifts[i] = static_cast<int32_t>(quantization_.low) * sums[i];
}

template <typename Word>
void Call<Word>::multiply(const PlanarResult& result, const std::vector<ByteImage>& images) const {
  const EpilogueArgs& e = result.args;
  const std::vector<float> no_bias(e.bias ? 0 : plan_.c_out);
  const float* const bias = e.bias ? e.bias->const_data_ptr<float>() : no_bias.data();
  const float* const scale = e.out_scale->const_data_ptr<float>();
  share_tasks(slabs_ * blocks_, [&](Tasks tasks) {
    const int64_t pixels = lines_ * plan_.base_w, stride = plan_.out_stride;
    std::vector<const Word*> starts(pixels);
    std::vector<int32_t> shifts(slab_);
    std::vector<ByteImage> rows = images;
    const LargeBuffer buffer(phases_ * pixels * slab_);
    auto* const sums = reinterpret_cast<Word*>(buffer.get());
    while (const auto task = tasks.next()) {
      const int64_t slab = *task / blocks_, block = *task % blocks_, channel = slab * slab_;
      const int64_t line = plan_.base_h * block / blocks_, lines = plan_.base_h * (block + 1) / blocks_ - line;
      add_products(line, lines, slab, starts, sums);
      for (int64_t p = 0; p < phases_; ++p) {
        const Phase& phase = plan_.phases[p];
        const int64_t channels = std::min(slab_, plan_.c_out - channel);
        shifts_of(p, channel, channels, shifts.data());
        for (int64_t l = 0; l < lines; ++l) {
          const int64_t y = stride * (line + l) + phase.row;
          if (y >= plan_.h_out) break;
          for (size_t i = 0; i < rows.size(); ++i) {
            rows[i].first = images[i].first + y * images[i].row + phase.column * images[i].pixel + channel;
            rows[i].pixel = stride * images[i].pixel;
          }
          round_row({.sums = reinterpret_cast<const int32_t*>(sums) + (p * pixels + l * plan_.base_w) * slab_,
                     .stride = slab_,
                     .pixels = ceil_div(plan_.w_out - phase.column, stride),
                     .channels = channels,
                     .shift = shifts.data(),
                     .scale = scale + channel,
                     .bias = bias + channel,
                     .act = e.act,
                     .alpha = static_cast<float>(e.alpha),
                     .gain = static_cast<float>(e.gain),
                     .clamp = static_cast<float>(e.clamp),
                     .images = rows.data(),
                     .image_count = static_cast<int64_t>(rows.size())});
        }
      }
    }
  });
}

template <typename Word>
void Call<Word>::add_products(int64_t line, int64_t lines, int64_t slab, std::vector<const Word*>& starts,
                              Word* sums) const {
  const int64_t pixels = lines * plan_.base_w;
  for (int64_t i = 0; i < pixels; ++i) {
    const Value* const start =
        layout_.image.line(image_, line + i / plan_.base_w) + i % plan_.base_w * layout_.image.step();
    starts[i] = reinterpret_cast<const Word*>(start);
  }
  for (const auto& phase : layout_.taps) {
    if (phase.chunks.empty()) std::fill_n(sums, pixels * slab_, Word{0});
    for (const Chunk& chunk : phase.chunks) {
      multiply_chunk(chunk, slab * layout_.words_of_slab + phase.first + chunk.first, starts.data(), pixels, sums);
    }
    sums += lines_ * plan_.base_w * slab_;
  }
}

// Adds the products of a chunk, whose weights lie from `word` on. Meanwhile the next chunk is fetched from memory, by
// the first panels of pixels, as evenly as they can.
template <typename Word>
void Call<Word>::multiply_chunk(const Chunk& chunk, int64_t word, const Word* const* starts, int64_t pixels,
                                Word* sums) const {
  const int64_t steps = static_cast<int64_t>(chunk.taps.size()) * chunk.words, step_bytes = slab_ * layout_.word_bytes;
  const auto* const weights = reinterpret_cast<const char*>(weights_->get()) + word * step_bytes;
  const bool last = word + 2 * steps > slabs_ * layout_.words_of_slab, narrow = storage_ == Storage::kBfloat16;
  const int64_t lines = last ? 0 : ceil_div(step_bytes, kLineBytes), panels = ceil_div(pixels, kPanelRows);
  const int64_t of_step = panels >= lines ? 1 : 2 * panels >= lines ? 2 : 4;
  int64_t fetched = 0;
  for (int64_t i = 0; i < pixels; i += kPanelRows, fetched += of_step) {
    word_products(WordProducts<Word>{.pixels = starts + i,
                                     .rows = std::min(kPanelRows, pixels - i),
                                     .taps = chunk.taps.data(),
                                     .tap_count = static_cast<int64_t>(chunk.taps.size()),
                                     .words = chunk.words,
                                     .weights = narrow ? nullptr : reinterpret_cast<const Word*>(weights),
                                     .narrow_weights = narrow ? reinterpret_cast<const BFloat16*>(weights) : nullptr,
                                     .vectors = slab_ / product_lanes(),
                                     .sums = sums + i * slab_,
                                     .sums_stride = slab_,
                                     .overwrite = chunk.first == 0,
                                     .next = weights + steps * (step_bytes + fetched * kLineBytes),
                                     .next_lines = fetched < lines ? of_step : 0});
  }
}

// A slab's channels of a grouped y: sums lie as it does.
template <typename Word>
void Call<Word>::write_groups(int64_t line, int64_t lines, int64_t slab, const float* sums,
                              const GroupWriter& groups) const {
  const int64_t pixels = lines_ * plan_.base_w, stride = plan_.out_stride, channel = slab * slab_;
  for (int64_t c = 0; c < std::min(slab_, plan_.c_out - channel); c += kGroup) {
    for (int64_t l = 0; l < lines; ++l) {
      const int64_t sample = (line + l) / plan_.base_h, base = (line + l) % plan_.base_h;
      for (int64_t p = 0; p < phases_; ++p) {
        const Phase& phase = plan_.phases[p];
        const int64_t y = stride * base + phase.row;
        if (y >= plan_.h_out) continue;
        groups.write(sample, channel + c, y * plan_.w_out + phase.column, stride,
                     ceil_div(plan_.w_out - phase.column, stride), sums + (p * pixels + l * plan_.base_w) * slab_ + c,
                     slab_);
      }
    }
  }
}

// Channels [channel, channel + kGroup) of y from their planes: all lines of a sample at once.
template <typename Word>
void Call<Word>::write(int64_t line, int64_t lines, int64_t channel, Buffers& b) const {
  const int64_t pixels = lines_ * plan_.base_w, stride = plan_.out_stride;
  for (int64_t o = 0; o < std::min(kGroup, plan_.c_out - channel); ++o) {
    const float* const planes = b.planes.data() + o * phases_ * pixels;
    for (int64_t done = 0; done < lines;) {
      const int64_t sample = (line + done) / plan_.base_h, base = (line + done) % plan_.base_h;
      const int64_t count = std::min(lines - done, plan_.base_h - base), first = base * stride;
      const int64_t rows = std::min(stride * (base + count), plan_.h_out) - first;
      const float* from = planes + done * plan_.base_w;
      if (stride > 1) {
        join_phases(from, rows, b.results.data());
        from = b.results.data();
      }
      b.writer.write(sample, channel + o, first * plan_.w_out, rows * plan_.w_out, from);
      done += count;
    }
  }
}

// Rows of y from the lines of all phases.
template <typename Word>
void Call<Word>::join_phases(const float* from, int64_t rows, float* to) const {
  const int64_t in_line = plan_.phases_in_line(), phase = lines_ * plan_.base_w;
  std::vector<const float*> phases(in_line);
  for (int64_t row = 0; row < rows; ++row) {
    const float* const first = from + row % plan_.out_stride * in_line * phase + row / plan_.out_stride * plan_.base_w;
    for (int64_t p = 0; p < in_line; ++p) phases[p] = first + p * phase;
    interleave(phases.data(), in_line, to + row * plan_.w_out, plan_.w_out);
  }
}

template <typename Word>
std::shared_ptr<const PackedLayout<Word>> layout_of(const Tensor& x, const Tensor& weight, const ConvGeometry& g,
                                                    Storage storage) {
  return planned<PackedLayout<Word>>(x, weight, [&] { return PackedLayout<Word>(x, weight, g, storage); });
}

// The image as it is multiplied, of `layout.size()` values.
template <typename T>
LargeBuffer loaded(const WordImage<T>& layout, const ScaledImage& x, const Quantization& quantization) {
  LargeBuffer values(ceil_div(layout.size() * static_cast<int64_t>(sizeof(T)), sizeof(float)));
  layout.load(x, quantization, reinterpret_cast<T*>(values.get()));
  return values;
}

// Nanoseconds, fitted to the layers of the models on an Ice Lake with two threads: of a product; what more it takes of
// each pixel that is loaded for one register, and of each tap that is turned to; of a weight that comes from memory, a
// value of the image, a result, a call.
struct Costs {
  double product, pixel, tap, weight, value, result, call;
};

double ms_of(const Costs& costs, const Tensor& x, const Tensor& weight, const ConvGeometry& g, Storage storage) {
  const ConvPlan plan(x, weight, g);
  const auto vectors = static_cast<double>(slab_size(plan.c_out, storage) / product_lanes());
  const double product = (costs.product + costs.pixel / vectors) * (1 + costs.tap / static_cast<double>(plan.c_in));
  const double pixels = static_cast<double>(plan.n) * plan.base_h * plan.base_w;
  const double results = static_cast<double>(plan.n) * plan.c_out * plan.h_out * plan.w_out;
  return 1e-6 * ((product * pixels + costs.weight) * static_cast<double>(weight.numel()) +
                 costs.value * static_cast<double>(x.numel()) + costs.result * results + costs.call);
}

// Offsets within an image are 32 bits wide; the padding is not counted.
Refusal refuse_large(const Tensor& x, int64_t value_bytes) {
  const int64_t bytes = round_up(x.size(1), kGroup) * x.size(2) * x.size(3) * value_bytes;
  if (bytes > INT32_MAX / 8) return {"it takes images of at most # bytes, got #", INT32_MAX / 8, bytes};
  return {};
}

}  // namespace

Refusal refused_by_packed_direct(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (const Refusal refusal = refuse_unless_float_nchw(x, weight, g)) return refusal;
  if (!has_dense_kernels(weight)) return {"it takes a weight of dense kernels"};
  if (g.transposed && (g.dilation[0] != 1 || g.dilation[1] != 1)) return {"transposed, it takes no dilation"};
  return refuse_large(x, sizeof(float));
}

Refusal refused_by_quantized_direct(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (g.dilation[0] != 1 || g.dilation[1] != 1)
    return {"it takes dilation = 1, got # and #", g.dilation[0], g.dilation[1]};
  const int64_t products = weight.size(g.transposed ? 0 : 1) * weight.size(2) * weight.size(3);
  const int64_t most = INT32_MAX / (int64_t{255} * 128);
  if (products > most) return {"its sums of # products might not fit 32 bits: it takes #", products, most};
  return refuse_large(x, 1);
}

double packed_direct_ms(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  return ms_of(
      {.product = 0.0075, .pixel = 0.0145, .tap = 12, .weight = 0.12, .value = 0.25, .result = 0.5, .call = 25e3}, x,
      weight, g, Storage::kFloat);
}

double quantized_direct_ms(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  Costs costs{
      .product = 0.0017, .pixel = 0.0045, .tap = 4, .weight = 0.045, .value = 0.35, .result = 0.6, .call = 15e3};
  if (!has_byte_products()) {
    constexpr double kWithoutVnni = 5;
    costs.product *= kWithoutVnni;
    costs.pixel *= kWithoutVnni;
  }
  return ms_of(costs, x, weight, g, Storage::kInt8);
}

void packed_direct_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, const ConvGeometry& g,
                        Storage storage, const PlanarResult& result) {
  const auto layout = layout_of<float>(x, weight, g, storage);
  const LargeBuffer values = loaded(layout->image, image, {});
  Call<float>(*layout, values.get(), weight, g, storage, {}).multiply(result);
}

ByteLayout byte_layout(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  const WordImage<uint8_t> image(ConvPlan(x, weight, g));
  return {image.rows(), image.columns(), image.depth(), image.top(), image.left()};
}

void quantized_direct_conv(const Tensor& x, const Tensor& weight, const ScaledImage& image, uint8_t* bytes,
                           const ConvGeometry& g, const Quantization& quantization, const PlanarResult& result,
                           const std::vector<ByteImage>& results) {
  const auto layout = layout_of<int32_t>(x, weight, g, Storage::kInt8);
  LargeBuffer own;
  if (bytes) {
    layout->image.pad(quantization, bytes);
  } else {
    own = loaded(layout->image, image, quantization);
    bytes = reinterpret_cast<uint8_t*>(own.get());
  }
  const Call<int32_t> call(*layout, bytes, weight, g, Storage::kInt8, quantization);
  if (results.empty()) return call.multiply(result);
  call.multiply(result, results);
}

}  // namespace fastgan
