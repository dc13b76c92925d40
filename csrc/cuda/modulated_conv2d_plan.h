// How the pixels and channels of modulated_conv2d are divided among blocks: plain C++, the same for nvcc's launches and
// csrc/simt's.
//
// A block has a tile of pixels, kOutputs output channels, and a range of the input channels: all of them, unless there
// are too few tiles to fill the GPU. Then several blocks have one tile, and the last of them adds up their sums.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastgan {

// Input channels that are staged together: 64 bytes of a pixel, or of a tap of an output channel.
constexpr int kConvDepth = 32;
constexpr int kConvDepthBytes = 2 * kConvDepth;
constexpr int kConvTaps = 9;
// Taps of the weight in shared memory: one that is multiplied, the others on their way.
constexpr int kConvStages = 3;

// kSamples images of kHeight x kWidth pixels each, kOutputs channels, divided among kWarpRows x kWarpColumns warps.
//
// Pixels are numbered ((y * kSamples + sample) * kWidth + x), so that the 16 rows of an mma's fragment are whole rows
// of images. Their slots in shared memory, with the border that the taps reach, are numbered
// ((sample * (kHeight + 2) + y) * kPitch + x).
template <int kSamples_, int kHeight_, int kWidth_, int kOutputs_, int kWarpRows_, int kWarpColumns_>
struct ConvTile {
  static constexpr int kSamples = kSamples_, kHeight = kHeight_, kWidth = kWidth_, kOutputs = kOutputs_;
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kThreads = 32 * kWarpRows * kWarpColumns;
  static constexpr int kPixels = kSamples * kHeight * kWidth;
  static constexpr int kPitch = kWidth + 2;
  static constexpr int kSlotsOfSample = (kHeight + 2) * kPitch;
  static constexpr int kSlots = kSamples * kSlotsOfSample;
  // Fragments of a warp: of 16 pixels, and of 8 output channels.
  static constexpr int kRowFragments = kPixels / kWarpRows / 16;
  static constexpr int kColumnFragments = kOutputs / kWarpColumns / 8;
  // A fragment's 16 pixels are so many slots before the next one's.
  static constexpr int kSlotsOfFragment = 16 / (kWidth * kSamples) * kPitch;
  static constexpr int kPixelBytes = kSlots * kConvDepthBytes;
  static constexpr int kWeightBytes = kOutputs * kConvDepthBytes;
  // Floats from one pixel's sums to the next one's, where half of them is staged behind the products.
  static constexpr int kResultPitch = kOutputs + 8;
  static constexpr int kSharedBytes =
      std::max(2 * kPixelBytes + kConvStages * kWeightBytes, kPixels / 2 * kResultPitch * 4);
  // Blocks that a multiprocessor's registers hold if a thread has 128.
  static constexpr int kResidentBlocks = 512 / kThreads;

  static_assert(16 % (kWidth * kSamples) == 0 && kHeight * kWidth * kSamples % (16 * kWarpRows) == 0);
  static_assert(kColumnFragments % 2 == 0 && kOutputs % (8 * kWarpColumns) == 0);
  // ldmatrix reads eight rows at once: without conflicts where their slots are all different modulo 8 (see conv_chunk),
  // which eight pixels side by side are, and two samples' fours if their slots are an odd number of fours apart.
  static_assert(kWidth % 8 == 0 || (kWidth == 4 && kSamples % 2 == 0 && kSlotsOfSample % 8 == 4));
  static_assert(kSharedBytes + 64 <= 48 * 1024, "what every launch may have");
};

using WideConvTile = ConvTile<1, 8, 16, 128, 2, 4>;   // large images
using NarrowConvTile = ConvTile<1, 8, 16, 64, 2, 2>;  // large images of few channels
using SmallConvTile = ConvTile<1, 8, 8, 64, 2, 2>;    // small images
using JointConvTile = ConvTile<4, 4, 4, 64, 2, 2>;    // up to 4x4 pixels, several samples

enum class ConvTileKind : int { kWide, kNarrow, kSmall, kJoint };

// Calls f with a value of the tile's type.
template <typename F>
auto with_conv_tile(ConvTileKind kind, F f) {
  switch (kind) {
    case ConvTileKind::kWide:
      return f(WideConvTile{});
    case ConvTileKind::kNarrow:
      return f(NarrowConvTile{});
    case ConvTileKind::kSmall:
      return f(SmallConvTile{});
    default:
      return f(JointConvTile{});
  }
}

// The kernel's parameter: addresses, distances in elements, sizes. T is __half or __nv_bfloat16.
struct ModulatedConv {
  const void *x, *weight;  // their channels are side by side
  int64_t x_n, x_h, x_w;
  int64_t weight_o, weight_h, weight_w;
  const float *in_scale, *out_scale;  // or nullptr
  int64_t in_scale_n, in_scale_c, out_scale_n, out_scale_c;
  const float *noise, *strength, *bias;  // [N or 1, H, W], [], [C_out]; or nullptr
  int64_t noise_n;
  void* y;         // [N, H, W, C_out]
  float* product;  // likewise: before out_scale; or nullptr
  int samples, c_in, c_out, height, width;
  bool relu;
  float slope, gain, clamp;  // of what is below zero; infinity for no clamp

  int tiles_n, tiles_y, tiles_x, tiles_o, splits;
  int depth_of_split;  // stages of kConvDepth channels
  float* partial;      // [tiles, splits, sums of a block], if splits > 1
  unsigned* counters;  // [tiles], zero before, if splits > 1
};

inline int64_t conv_tiles(const ModulatedConv& conv) {
  return int64_t{conv.tiles_n} * conv.tiles_y * conv.tiles_x * conv.tiles_o;
}

inline int conv_ceil_div(int a, int b) { return (a + b - 1) / b; }

// Fills in the tiles of a kind.
inline void divide_conv(ModulatedConv& conv, ConvTileKind kind) {
  with_conv_tile(kind, [&](auto tile) {
    using Tile = decltype(tile);
    conv.tiles_n = conv_ceil_div(conv.samples, Tile::kSamples);
    conv.tiles_y = conv_ceil_div(conv.height, Tile::kHeight);
    conv.tiles_x = conv_ceil_div(conv.width, Tile::kWidth);
    conv.tiles_o = conv_ceil_div(conv.c_out, Tile::kOutputs);
  });
}

// Chooses the tile and the split for a GPU of so many multiprocessors, and fills them in.
inline ConvTileKind plan_conv(ModulatedConv& conv, int multiprocessors) {
  ConvTileKind kind = conv.c_out <= NarrowConvTile::kOutputs ? ConvTileKind::kNarrow : ConvTileKind::kWide;
  if (conv.height <= 4 && conv.width <= 4 && conv.samples > 1) {
    kind = ConvTileKind::kJoint;
  } else {
    divide_conv(conv, kind);
    if (conv.width <= 8 || conv_tiles(conv) < multiprocessors) {
      kind = ConvTileKind::kSmall;
    }
  }
  divide_conv(conv, kind);
  const int depth = conv_ceil_div(conv.c_in, kConvDepth);
  // As many blocks as the multiprocessors hold at once, but at least two stages of channels for each: fewer are not
  // worth their sum.
  const int resident = with_conv_tile(kind, [](auto tile) { return decltype(tile)::kResidentBlocks; });
  const int64_t wanted = int64_t{resident} * multiprocessors / conv_tiles(conv);
  conv.splits = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max(1, depth / 2)));
  conv.depth_of_split = conv_ceil_div(depth, conv.splits);
  // No split without channels.
  conv.splits = conv_ceil_div(depth, conv.depth_of_split);
  return kind;
}

// Floats of ModulatedConv::partial.
inline int64_t conv_partial_size(const ModulatedConv& conv, ConvTileKind kind) {
  const auto sums = [](auto tile) { return int64_t{decltype(tile)::kPixels} * decltype(tile)::kOutputs; };
  return conv.splits == 1 ? 0 : conv_tiles(conv) * conv.splits * with_conv_tile(kind, sums);
}

}  // namespace fastgan
