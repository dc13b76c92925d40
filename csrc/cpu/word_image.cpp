#include "word_image.h"

#include <algorithm>
#include <array>
#include <type_traits>

#include "simd.h"
#include "tasks.h"

namespace fastgan {
namespace {

// ---- to bytes

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

FASTGAN_INLINE void round_block(const ChannelLine& l, const Quantization& q, int64_t first, uint8_t* to) {
  const auto zero = static_cast<uint8_t>(-q.low);
  Bytes rows[kGroup];
  for (int64_t c = 0; c < kGroup; ++c) {
    if (c >= l.channels) {
      rows[c] = Bytes{} + zero;
      continue;
    }
    const float* const from = l.from + c * l.channel + first;
    __builtin_prefetch(from + l.ahead);
    int32_t whole[kGroup];
#pragma omp simd
    for (int64_t p = 0; p < kGroup; ++p) {
      whole[p] = rounded(l.scale[c] * from[p], q);
    }
    rows[c] = __builtin_convertvector((load<register_t<int32_t, 64>>(whole)), Bytes);
  }
  transpose(rows);
  for (int64_t p = 0; p < kGroup; ++p) store(rows[p], to + (first + p) * l.to_pixel);
}

// gather_channels, to bytes and not to l.to; those of other channels are 0's.
FASTGAN_MULTIVERSION void round_channels(const ChannelLine& l, const Quantization& q, uint8_t* to) {
  if (l.pixel == 1 && l.pixels >= kGroup) {
    // The last block overlaps the one before.
    for (int64_t p = 0; p < l.pixels; p += kGroup) round_block(l, q, std::min(p, l.pixels - kGroup), to);
    return;
  }
  for (int64_t p = 0; p < l.pixels; ++p) {
    for (int64_t c = 0; c < kGroup; ++c) {
      const float value = c < l.channels ? l.scale[c] * l.from[c * l.channel + p * l.pixel] : 0.0f;
      to[p * l.to_pixel + c] = static_cast<uint8_t>(rounded(value, q));
    }
  }
}

}  // namespace

template <typename T>
WordImage<T>::WordImage(const ConvPlan& plan)
    : in_(plan.input),
      n_(plan.n),
      c_in_(plan.c_in),
      base_h_(plan.base_h),
      depth_(round_up(plan.c_in, kGroup)),
      rows_(in_.stride * (plan.base_h + in_.dy_span)),
      columns_(in_.stride * (plan.base_w + in_.dx_span)) {}

template <typename T>
void WordImage<T>::load(const ScaledImage& x, const Quantization& quantization, T* values) const {
  const int64_t rows = n_ * rows_, rows_of_task = kGrainElements / (columns_ * depth_) + 1;
  share_tasks(ceil_div(rows, rows_of_task), [&](Tasks tasks) {
    while (const auto task = tasks.next()) {
      const int64_t first = *task * rows_of_task;
      for (int64_t row = first; row < std::min(first + rows_of_task, rows); ++row) {
        load_row(x, quantization, row, values + row * columns_ * depth_);
      }
    }
  });
}

template <typename T>
void WordImage<T>::pad(const Quantization& quantization, T* values) const {
  const T zero = static_cast<T>(-quantization.low);
  const int64_t line = columns_ * depth_, before = left() * depth_, behind = (left() + in_.w_in) * depth_;
  for (int64_t row = 0; row < rows_; ++row) {
    T* const to = values + row * line;
    if (row < top() || row >= top() + in_.h_in) {
      std::fill_n(to, line, zero);
    } else {
      std::fill_n(to, before, zero);
      std::fill(to + behind, to + line, zero);
    }
  }
}

template <typename T>
void WordImage<T>::load_row(const ScaledImage& x, const Quantization& quantization, int64_t row, T* to) const {
  constexpr bool kBytes = std::is_same_v<T, uint8_t>;
  const T zero = kBytes ? static_cast<T>(-quantization.low) : T{};
  const int64_t left = in_.stride * in_.dx_min, first = std::clamp<int64_t>(-left, 0, columns_),
                last = std::clamp(in_.w_in - left, first, columns_);
  const int64_t sample = row / rows_, line = continued(row % rows_ + in_.stride * in_.dy_min, in_.h_in, in_.reflect);
  if (line < 0) {
    std::fill_n(to, columns_ * depth_, zero);
    return;
  }
  for (int64_t channel = 0; channel < depth_; channel += kGroup) {
    std::array<float, kGroup> scale{};
    const int64_t channels = std::clamp<int64_t>(c_in_ - channel, 0, kGroup);
    for (int64_t c = 0; c < channels; ++c) scale[c] = x.scale.at(sample, channel + c);
    const float* const from = x.data + sample * x.stride_n + channel * x.stride_c + line * x.stride_h;
    const auto gather = [&](int64_t column, int64_t place, int64_t pixels) {
      ChannelLine of_pixels{.from = from + column * x.stride_w,
                            .channel = x.in_group,
                            .pixel = x.stride_w,
                            .channels = channels,
                            .pixels = pixels,
                            .scale = scale.data(),
                            .to = nullptr,
                            .to_pixel = depth_,
                            .ahead = x.stride_h,
                            .least = x.least};
      T* const at = to + place * depth_ + channel;
      if constexpr (kBytes) {
        round_channels(of_pixels, quantization, at);
      } else {
        of_pixels.to = at;
        gather_channels(of_pixels);
      }
    };
    const auto pad = [&](int64_t place) {
      const int64_t column = continued(place + left, in_.w_in, in_.reflect);
      if (column >= 0) return gather(column, place, 1);
      std::fill_n(to + place * depth_ + channel, kGroup, zero);
    };
    for (int64_t place = 0; place < first; ++place) pad(place);
    gather(first + left, first, last - first);
    for (int64_t place = last; place < columns_; ++place) pad(place);
  }
}

template class WordImage<float>;
template class WordImage<uint8_t>;

}  // namespace fastgan
