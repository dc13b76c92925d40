#include "winograd_weights.h"

#include <algorithm>
#include <array>
#include <functional>

#include "channel_patch.h"
#include "kept_weights.h"
#include "product.h"
#include "winograd.h"

namespace fastgan {
namespace {

constexpr int64_t kMostMatrices = 36;  // of a phase, those of F(4 x 4, 3 x 3)
constexpr int64_t kChannels = 16;      // input channels of a task
constexpr int64_t kOwnDepth = 64;      // of the chunks that threads transform

bool is_whole(Storage storage) { return channels_per_word(storage) == 2; }

// A contiguous weight of integers as floats, as long as it is transformed.
LargeBuffer as_floats(const Tensor& weight) {
  const auto* const from = static_cast<const int8_t*>(weight.data_ptr());
  LargeBuffer values(weight.numel());
  std::copy_n(from, weight.numel(), values.get());
  return values;
}

}  // namespace

int64_t slab_size(int64_t c_out, Storage storage) {
  const int64_t registers = ceil_div(c_out, product_lanes());
  const int64_t vectors = ceil_div(registers, ceil_div(registers, product_vectors()));
  // In bfloat16 two registers lie side by side.
  return round_up(vectors * product_lanes(), std::max(kGroup, storage == Storage::kBfloat16 ? 2 * product_lanes() : 0));
}

Transforming transforming_of(const WinogradPlan& plan, const Tensor& weight, Storage storage, bool threads_may) {
  constexpr int64_t kFew = 64 << 10;  // floats, which stay in the second-level cache
  constexpr int64_t kTiles = 128;     // that weights meet, for the time that it takes to transform them to be little
  if (storage != Storage::kFloat || plan.all_weights() <= kFew) return Transforming::kOnce;
  // A chunk of words is one of channels where x has a single part.
  if (plan.divides_weights() && threads_may && plan.parts.size() == 1) return Transforming::kByThreads;
  const bool again = plan.all_tiles() >= kTiles || !is_kept(weight.const_data_ptr<float>());
  return again ? Transforming::kInCalls : Transforming::kOnce;
}

WinogradWeights::WinogradWeights(const ConvPlan& conv, const WinogradPlan& plan, Transforming transforming,
                                 int64_t together, const Tensor& weight, const ConvGeometry& g, Storage storage)
    : conv_(conv),
      plan_(plan),
      storage_(storage),
      per_word_(channels_per_word(storage)),
      depth_(plan.depth / per_word_),
      step_(transforming == Transforming::kByThreads ? kOwnDepth : kPanelDepth),
      slab_(slab_size(conv.c_out, storage)),
      slabs_(ceil_div(conv.c_out, slab_)),
      together_(together) {
  const auto kept = [&](std::vector<int64_t> key, const std::function<LargeBuffer(bool)>& make) {
    for (int64_t i = 0; i < 4; ++i) key.push_back(weight.size(i));
    key.push_back(weight.stride(0));
    return made_of(static_cast<const float*>(weight.data_ptr()), weight.numel(), key, make);
  };
  if (transforming == Transforming::kOnce) {
    // The phases that there are, whose first taps decide where tiles start: a result of one line has one row of them.
    data_ = kept({plan.m, static_cast<int64_t>(storage), together, std::min(conv.out_stride, conv.h_out),
                  std::min(conv.out_stride, conv.w_out), g.transposed, g.stride[0], g.padding[0], g.padding[1]},
                 [&](bool lasting) {
                   const bool half = storage == Storage::kBfloat16 || storage == Storage::kInt8;
                   LargeBuffer to(half ? ceil_div(words(), 2) : words(), lasting);
                   kernels_ = std::make_shared<const LargeBuffer>(laid_out(weight, g, false));
                   transform(to);
                   return to;
                 });
    kernels_.reset();
    return;
  }
  // No tile is 0.
  kernels_ = kept({0, slab_, g.transposed}, [&](bool lasting) { return laid_out(weight, g, lasting); });
  if (transforming == Transforming::kByThreads) return;
  const auto buffer = std::make_shared<const CallBuffer>(words());
  transform(**buffer);
  data_ = {buffer, &**buffer};
}

LargeBuffer WinogradWeights::laid_out(const Tensor& weight, const ConvGeometry& g, bool lasting) const {
  const LargeBuffer widened = is_whole(storage_) ? as_floats(weight) : LargeBuffer();
  const float* const values = is_whole(storage_) ? widened.get() : weight.const_data_ptr<float>();
  const int64_t row = weight.stride(g.transposed ? 1 : 0), channel = weight.stride(g.transposed ? 0 : 1);
  LargeBuffer result(slabs_ * plan_.part_depth * kernel_size(), lasting);
  torch::stable::parallel_for(0, slabs_ * plan_.part_depth, kChannels, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      lay_out(values, row, channel, task / plan_.part_depth, task % plan_.part_depth,
              result.get() + task * kernel_size());
    }
  });
  return result;
}

void WinogradWeights::lay_out(const float* weight, int64_t row, int64_t channel, int64_t slab, int64_t input,
                              float* to) const {
  static const std::vector<float> ones(kGroup, 1.0f);
  for (int64_t place = 0; place < slab_; place += kGroup) {
    const int64_t output = slab * slab_ + place;
    gather_channels({.from = weight + output * row + input * channel,
                     .channel = row,
                     .pixel = 1,
                     .channels = input < conv_.c_in ? std::clamp<int64_t>(conv_.c_out - output, 0, kGroup) : 0,
                     .pixels = conv_.taps,
                     .scale = ones.data(),
                     .to = to + place,
                     .to_pixel = slab_});
  }
  std::fill_n(to + conv_.taps * slab_, slab_, 0.0f);
}

void WinogradWeights::transform(const LargeBuffer& to) const {
  const int64_t steps = ceil_div(plan_.part_depth, kChannels);
  torch::stable::parallel_for(0, slabs_ * steps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % steps * kChannels, count = std::min(kChannels, plan_.part_depth - first);
      for (size_t part = 0; part < plan_.parts.size(); ++part) transform_part(part, task / steps, first, count, to, 0);
    }
  });
}

void WinogradWeights::transform_own(int64_t first, int64_t count, int64_t slab, const LargeBuffer& own) const {
  transform_part(0, slab, first, count, own, chunk(first, slab));
}

void WinogradWeights::transform_part(size_t part, int64_t slab, int64_t first, int64_t count, const LargeBuffer& to,
                                     int64_t origin) const {
  for (const auto& phase : plan_.phases) {
    std::vector<int64_t> positions(phase.of_part[part]);
    for (int64_t& position : positions) position *= slab_;
    for (int64_t channel = first; channel < first + count; ++channel) {
      const int64_t k = static_cast<int64_t>(part) * plan_.part_depth + channel, word = k / per_word_;
      const int64_t begin = word / step_ * step_, length = std::min(step_, depth_ - begin);
      const int64_t size = matrix_size(length), row = slab % together_ * length + word - begin;
      transform_channel(plan_.forms[phase.form], kernel_at(slab, channel), positions.data(),
                        {.size = size,
                         .word = chunk(begin, slab) - origin + phase.first_weight * size + row * slab_,
                         .half = k % per_word_},
                        to);
    }
  }
}

void WinogradWeights::transform_channel(const WinogradPlan::Form& form, const float* kernel, const int64_t* positions,
                                        const Row& row, const LargeBuffer& to) const {
  const auto transform = is_whole(storage_) ? whole_kernels(plan_.m, plan_.r, form.single_y, form.single_x).weight
                                            : winograd_kernels(plan_.m, plan_.r, form.single_y, form.single_x).weight;
  if (storage_ == Storage::kFloat) {
    transform(kernel, positions, slab_ / product_lanes(), to.get() + row.word, row.size);
    return;
  }
  const int64_t matrices = plan_.matrices_of(form);
  std::array<float, kMostMatrices * kGroup> values;
  for (int64_t place = 0; place < slab_; place += kGroup) {
    transform(kernel + place, positions, kGroup / product_lanes(), values.data(), kGroup);
    const int64_t half = 2 * (row.word + place) + row.half;
    switch (storage_) {
      case Storage::kBfloat16:
        store_bf16(values.data(), matrices, place, bf16_of(to) + row.word, row.size);
        break;
      case Storage::kInt16:
        store_whole(values.data(), matrices, reinterpret_cast<int16_t*>(to.get()) + half, row.size);
        break;
      default:
        store_whole(values.data(), matrices, reinterpret_cast<int8_t*>(to.get()) + half, row.size);
    }
  }
}

void WinogradWeights::store_bf16(const float* values, int64_t matrices, int64_t place, BFloat16* to,
                                 int64_t size) const {
  std::array<int64_t, kGroup> places;
  for (int64_t c = 0; c < kGroup; ++c) places[c] = paired(place + c, product_lanes());
  for (int64_t matrix = 0; matrix < matrices; ++matrix, values += kGroup, to += size) {
    for (int64_t c = 0; c < kGroup; ++c) to[places[c]] = BFloat16(values[c]);
  }
}

template <typename T>
void WinogradWeights::store_whole(const float* values, int64_t matrices, T* to, int64_t size) const {
  const auto factor = static_cast<float>(whole_factors(plan_.m, plan_.r).weight_factor);
  for (int64_t matrix = 0; matrix < matrices; ++matrix, values += kGroup, to += 2 * size) {
    for (int64_t c = 0; c < kGroup; ++c) to[2 * c] = static_cast<T>(factor * values[c]);
  }
}

}  // namespace fastgan
