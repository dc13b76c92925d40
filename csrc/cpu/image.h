// Four-dimensional activations [N, C, H, W] in either dense layout, cut into blocks that fit the first-level cache.
#pragma once

#include <algorithm>

#include "common.h"
#include "empty.h"

namespace fastgan {

// Elements per block: 8 KiB of float, so that a block and what is combined with it stay in a 32 KiB L1 between passes.
constexpr int64_t kBlock = 2048;

// Channels side by side where registers hold channels: one cache line of floats, whole registers of every instruction
// set. An image in this layout, [N, C / kGroup, H, W, kGroup], is grouped: kernels hand it to each other.
constexpr int64_t kGroup = 16;

inline bool is_channels_last(const Tensor& t) {
  return t.dim() == 4 && !t.is_contiguous() && t.stride(1) == 1 && t.stride(3) == t.size(1) &&
         t.stride(2) == t.size(1) * t.size(3) && t.stride(0) == t.size(1) * t.size(2) * t.size(3);
}

inline bool is_dense(const Tensor& t) { return t.is_contiguous() || is_channels_last(t); }

// t itself if it is dense in the wanted layout, else a copy. Asking torch for what is there already costs as much as a
// small kernel.
inline Tensor in_layout(const Tensor& t, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  if (channels_last ? is_channels_last(t) : t.is_contiguous()) return t;
  return torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// An uninitialised tensor of t's sizes in the given dtype and layout.
inline Tensor empty_image(const Tensor& t, ScalarType dtype, bool channels_last) {
  return empty_dense(t.sizes(), dtype, channels_last);
}

// How a dense image is walked. NCHW: one block is part of one plane, so one scale serves it. NHWC (and NCHW with one
// pixel, the same memory): a block is whole pixels, so scales repeat along it with period C.
struct ImageBlocks {
  int64_t n, c, pixels;
  bool planar;
  int64_t per_sample;  // blocks per sample
  int64_t pixels_per_block;

  ImageBlocks(const Tensor& t, bool channels_last)
      : ImageBlocks(t.size(0), t.size(1), t.size(2) * t.size(3), !channels_last && t.size(2) * t.size(3) > 1) {}

  ImageBlocks(int64_t samples, int64_t channels, int64_t pixels_per_plane, bool is_planar)
      : n(samples), c(channels), pixels(pixels_per_plane), planar(is_planar) {
    pixels_per_block = planar ? std::min(pixels, kBlock) : std::max<int64_t>(1, kBlock / c);
    const int64_t per_plane = (pixels + pixels_per_block - 1) / pixels_per_block;
    per_sample = planar ? c * per_plane : per_plane;
  }

  int64_t count() const { return n * per_sample; }

  struct Block {
    int64_t sample, channel, pixel, pixels, offset, size;
  };

  Block at(int64_t index) const {
    Block b{};
    b.sample = index / per_sample;
    const int64_t rest = index % per_sample;
    const int64_t per_plane = planar ? per_sample / c : per_sample;
    b.channel = planar ? rest / per_plane : 0;
    b.pixel = (rest % per_plane) * pixels_per_block;
    b.pixels = std::min(pixels_per_block, pixels - b.pixel);
    b.offset = planar ? (b.sample * c + b.channel) * pixels + b.pixel : (b.sample * pixels + b.pixel) * c;
    b.size = planar ? b.pixels : b.pixels * c;
    return b;
  }

  // Blocks that one task should at least have.
  int64_t grain() const {
    const int64_t elements = planar ? pixels_per_block : pixels_per_block * c;
    return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements));
  }
};

// Factors per sample and channel, [N or 1, C or 1], contiguous in the compute type; absent means 1.
template <typename C>
struct Scales {
  const C* data = nullptr;
  int64_t stride_n = 0, stride_c = 0;

  Scales() = default;
  explicit Scales(const std::optional<Tensor>& t) {
    if (!t) return;
    data = t->const_data_ptr<C>();
    stride_n = t->size(0) > 1 ? t->size(1) : 0;
    stride_c = t->size(1) > 1 ? 1 : 0;
  }
  C at(int64_t n, int64_t c) const { return data ? data[n * stride_n + c * stride_c] : C(1); }
};

}  // namespace fastgan
