// What follows a linear part, in one pass over its result: y = clamp(gain * act(scale * c + noise + shift)) +
// residual_gain * residual, block by block in the first-level cache.
#pragma once

#include <algorithm>
#include <vector>

#include "activation.h"
#include "convert.h"
#include "image.h"

namespace fastgan {

// One block of the epilogue: scale and shift are constants of the block (kPerElement false) or vectors along it.
template <typename C>
struct EpilogueBlock {
  const C* c;
  C* y;
  int64_t n;
  const C* scale;
  const C* shift;
  const C* noise;  // null for none
  C strength;      // of the noise
  Act act;
  C alpha, gain, clamp;
};

void epilogue_block(const EpilogueBlock<float>& b, bool per_element);
void epilogue_block(const EpilogueBlock<double>& b, bool per_element);

// The epilogue of n consecutive pixels of some planes of a float image.
struct EpilogueRows {
  const float* c;  // [rows, stride]
  int64_t stride, rows, n;
  float* y;
  int64_t plane;               // between the rows of y, and of residual
  const float *scale, *shift;  // [rows]
  const float* noise;          // [n]; null for none
  float strength;
  Act act;
  float alpha, gain, clamp;
  const float* residual;  // null for none
  float residual_gain;
};
void epilogue_rows(const EpilogueRows& r);

// The epilogue of a group's channels of n pixels.
struct EpilogueGroup {
  const float* c;  // [n, kGroup], `stride` apart
  int64_t stride, n;
  float* y;  // the same, with step - 1 other pixels between them, and so is noise
  int64_t step;
  int64_t ahead;               // from y to what is written soon
  const float *scale, *shift;  // [kGroup]
  const float* noise;          // null for none
  float strength;
  Act act;
  float alpha, gain, clamp;
  bool stream;  // whole cache lines, past the caches
};
void epilogue_group(const EpilogueGroup& g);

// y += a * x.
void axpy(float a, const float* x, float* y, int64_t n);
void axpy(double a, const double* x, double* y, int64_t n);

// Per-channel values laid along one block of an image: entry i is the value of element i's channel.
template <typename C>
struct ChannelRow {
  std::vector<C> values;
  int64_t sample = -1;

  // Fills the row with f(channel) for the longest block of a sample; a planar block needs its first entry only.
  template <typename F>
  void fill(const ImageBlocks& blocks, const ImageBlocks::Block& b, F&& f) {
    if (blocks.planar) {
      values.resize(1);
      values[0] = f(b.channel);
    } else if (sample != b.sample || static_cast<int64_t>(values.size()) < b.size) {
      values.resize(b.size);
      for (int64_t i = 0; i < blocks.c; ++i) values[i] = f(i);
      for (int64_t filled = blocks.c; filled < b.size; filled *= 2) {
        std::copy_n(values.begin(), std::min(filled, b.size - filled), values.begin() + filled);
      }
      sample = b.sample;
    }
  }
};

// The epilogue of one call; every tensor is contiguous but residual, which has the layout of the result.
struct EpilogueArgs {
  const std::optional<Tensor>&out_scale, &noise, &noise_strength, &bias, &residual;
  Act act;
  double alpha, gain, clamp, residual_gain;

  // The same with the residual in another layout.
  EpilogueArgs with_residual(const std::optional<Tensor>& dense) const {
    return {out_scale, noise, noise_strength, bias, dense, act, alpha, gain, clamp, residual_gain};
  }
};

// Applies an epilogue to one block of an image after another; every thread has its own.
template <typename T>
class BlockEpilogue {
 public:
  using C = accumulate_t<T>;

  BlockEpilogue(const ImageBlocks& image, const EpilogueArgs& args, const Tensor& result)
      : blocks(image),
        e(args),
        to(result.mutable_data_ptr<T>()),
        scales(e.out_scale),
        bias(e.bias ? e.bias->const_data_ptr<C>() : nullptr),
        noise(e.noise ? e.noise->const_data_ptr<C>() : nullptr),
        noise_stride(e.noise && e.noise->size(0) > 1 ? blocks.pixels : 0),
        strength(e.noise_strength ? *e.noise_strength->const_data_ptr<C>() : C(1)),
        residual(e.residual ? e.residual->const_data_ptr<T>() : nullptr) {
    const int64_t longest = std::max(kBlock, blocks.c);
    if (noise && !blocks.planar) noise_row.resize(longest);
    if (sizeof(T) == 2) out_buffer.resize(longest);
    if (residual && sizeof(T) == 2) residual_buffer.resize(longest);
  }

  // from: the block's values of the linear part.
  void operator()(const C* from, const ImageBlocks::Block& b) {
    scale.fill(blocks, b, [&](int64_t channel) { return scales.at(b.sample, channel); });
    shift.fill(blocks, b, [&](int64_t channel) { return bias ? bias[channel] : C(0); });
    C* const out = result_buffer(to + b.offset, out_buffer.data());
    EpilogueBlock<C> block{.c = from,
                           .y = out,
                           .n = b.size,
                           .scale = scale.values.data(),
                           .shift = shift.values.data(),
                           .noise = nullptr,
                           .strength = strength,
                           .act = e.act,
                           .alpha = C(e.alpha),
                           .gain = C(e.gain),
                           .clamp = C(e.clamp)};
    if (noise) add_noise(b, block);
    epilogue_block(block, !blocks.planar);
    if (residual)
      axpy(C(e.residual_gain), as_compute(residual + b.offset, b.size, residual_buffer.data()), out, b.size);
    flush(out, to + b.offset, b.size);
  }

 private:
  void add_noise(const ImageBlocks::Block& b, EpilogueBlock<C>& block) {
    const C* const values = noise + b.sample * noise_stride + b.pixel;
    if (blocks.planar) {
      block.noise = values;
      return;
    }
    for (int64_t p = 0; p < b.pixels; ++p) {
      for (int64_t channel = 0; channel < blocks.c; ++channel) {
        noise_row[p * blocks.c + channel] = shift.values[channel] + strength * values[p];
      }
    }
    block.shift = noise_row.data();
  }

  const ImageBlocks& blocks;
  const EpilogueArgs& e;
  T* const to;
  const Scales<C> scales;
  const C *const bias, *const noise;
  const int64_t noise_stride;
  const C strength;
  const T* const residual;
  std::vector<C> noise_row, out_buffer, residual_buffer;
  ChannelRow<C> scale, shift;
};

// An NCHW float result that products fill plane by plane, and where the linear part itself is kept (null: nowhere); or
// a grouped one, whose tensor tells only the sizes, without a residual.
struct PlanarResult {
  ImageBlocks blocks;
  const EpilogueArgs& args;
  const Tensor& y;
  float* saved;
  bool grouped;

  PlanarResult(const EpilogueArgs& epilogue, const Tensor& result, float* linear, bool is_grouped = false)
      : blocks(result, false), args(epilogue), y(result), saved(linear), grouped(is_grouped) {
    blocks.planar = true;  // with one pixel too
  }
};

inline const float* values_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// One thread's way of writing to it.
class PlaneWriter {
 public:
  static constexpr int64_t kMostRows = 8;

  explicit PlaneWriter(const PlanarResult& result)
      : result_(result), epilogue_(result.blocks, result.args, result.y), scales_(result.args.out_scale) {}

  // from: the linear part of n consecutive pixels of one plane, from `pixel` on. Callers go from one plane to the next:
  // there, memory is fetched meanwhile.
  void write(int64_t sample, int64_t channel, int64_t pixel, int64_t n, const float* from) {
    const int64_t plane = (sample * result_.blocks.c + channel) * result_.blocks.pixels;
    if (result_.saved) std::copy_n(from, n, result_.saved + plane + pixel);
    if (channel + 1 < result_.blocks.c) fetch_for_writing(y_ + plane + result_.blocks.pixels + pixel, n);
    for (int64_t done = 0; done < n; done += kBlock) {
      const int64_t count = std::min(kBlock, n - done), first = pixel + done;
      epilogue_(from + done, {sample, channel, first, count, plane + first, count});
    }
  }

  // The same of `rows` <= kMostRows planes, [rows, stride]. Of a few pixels, stores spread between the products that
  // make them, instead of waiting for memory all at once.
  void write_rows(int64_t sample, int64_t channel, int64_t rows, int64_t pixel, int64_t n, const float* from,
                  int64_t stride) const {
    const EpilogueArgs& e = result_.args;
    const int64_t plane = result_.blocks.pixels, first = (sample * result_.blocks.c + channel) * plane + pixel;
    float scale[kMostRows], shift[kMostRows];
    for (int64_t r = 0; r < rows; ++r) {
      scale[r] = scales_.at(sample, channel + r);
      shift[r] = bias_ ? bias_[channel + r] : 0.0f;
      if (result_.saved) std::copy_n(from + r * stride, n, result_.saved + first + r * plane);
    }
    epilogue_rows({.c = from,
                   .stride = stride,
                   .rows = rows,
                   .n = n,
                   .y = y_ + first,
                   .plane = plane,
                   .scale = scale,
                   .shift = shift,
                   .noise = noise_ ? noise_ + sample * noise_stride_ + pixel : nullptr,
                   .strength = strength_,
                   .act = e.act,
                   .alpha = static_cast<float>(e.alpha),
                   .gain = static_cast<float>(e.gain),
                   .clamp = static_cast<float>(e.clamp),
                   .residual = residual_ ? residual_ + first : nullptr,
                   .residual_gain = static_cast<float>(e.residual_gain)});
  }

 private:
  static void fetch_for_writing(const float* to, int64_t n) {
    constexpr int64_t kLine = 16;  // floats of a cache line
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(to + i, 1);
  }

  const PlanarResult& result_;
  BlockEpilogue<float> epilogue_;
  const Scales<float> scales_;
  float* const y_ = result_.y.mutable_data_ptr<float>();
  const float *const bias_ = values_of(result_.args.bias), *const noise_ = values_of(result_.args.noise),
                     *const residual_ = values_of(result_.args.residual);
  const int64_t noise_stride_ = noise_ && result_.args.noise->size(0) > 1 ? result_.blocks.pixels : 0;
  const float strength_ = result_.args.noise_strength ? *values_of(result_.args.noise_strength) : 1.0f;
};

// The same to a grouped one, by a thread of share_tasks.
class GroupWriter {
 public:
  explicit GroupWriter(const PlanarResult& result)
      : result_(result),
        scales_(result.args.out_scale),
        y_(result.y.mutable_data_ptr<float>()),
        bias_(values_of(result.args.bias)),
        noise_(values_of(result.args.noise)),
        noise_stride_(noise_ && result.args.noise->size(0) > 1 ? result.blocks.pixels : 0),
        strength_(result.args.noise_strength ? *values_of(result.args.noise_strength) : 1.0f),
        stream_(result.y.numel() >= kStreamed && reinterpret_cast<uintptr_t>(y_) % 64 == 0) {}

  // from: the linear part, [n, kGroup] with pixels `stride` apart, of every step-th pixel from `pixel` on. Callers go
  // from one group to the next: there, memory is fetched meanwhile.
  void write(int64_t sample, int64_t channel, int64_t pixel, int64_t step, int64_t n, const float* from,
             int64_t stride) const {
    const EpilogueArgs& e = result_.args;
    const int64_t channels = result_.blocks.c, plane = result_.blocks.pixels;
    float scale[kGroup], shift[kGroup];
    for (int64_t c = 0; c < kGroup; ++c) {
      scale[c] = scales_.at(sample, channel + c);
      shift[c] = bias_ ? bias_[channel + c] : 0.0f;
    }
    epilogue_group({.c = from,
                    .stride = stride,
                    .n = n,
                    .y = y_ + (sample * channels + channel) * plane + pixel * kGroup,
                    .step = step,
                    .ahead = channel + kGroup < channels ? kGroup * plane : 0,
                    .scale = scale,
                    .shift = shift,
                    .noise = noise_ ? noise_ + sample * noise_stride_ + pixel : nullptr,
                    .strength = strength_,
                    .act = e.act,
                    .alpha = static_cast<float>(e.alpha),
                    .gain = static_cast<float>(e.gain),
                    .clamp = static_cast<float>(e.clamp),
                    .stream = stream_});
  }

 private:
  // Floats of a result that the caches do not hold until it is read: two to three times the second level of two cores.
  static constexpr int64_t kStreamed = 2 << 20;

  const PlanarResult& result_;
  const Scales<float> scales_;
  float* const y_;
  const float *const bias_, *const noise_;
  const int64_t noise_stride_;
  const float strength_;
  const bool stream_;
};

// The epilogue of a whole image c, dense in y's layout.
template <typename T>
void run_epilogue(const Tensor& c, const Tensor& y, bool channels_last, const EpilogueArgs& e) {
  const ImageBlocks blocks(c, channels_last);
  const auto* const from = c.const_data_ptr<accumulate_t<T>>();
  torch::stable::parallel_for(0, blocks.count(), blocks.grain(), [&](int64_t begin, int64_t end) {
    BlockEpilogue<T> epilogue(blocks, e, y);
    for (int64_t i = begin; i < end; ++i) {
      const auto b = blocks.at(i);
      epilogue(from + b.offset, b);
    }
  });
}

}  // namespace fastgan
