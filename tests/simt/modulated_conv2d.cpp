// csrc/cuda/modulated_conv2d.cuh for test_simt_modulated_conv2d.py: what the op's launcher does with torch's tensors,
// with NumPy's arrays.

#include "cuda/modulated_conv2d.cuh"

#include "simt/export.h"

namespace {

using fastgan::ConvTileKind;
using fastgan::ModulatedConv;

// An array without elements is an absent tensor.
template <typename T>
T* optional(simt::Buffer<T> buffer) {
  return buffer.size == 0 ? nullptr : buffer.data;
}

// sizes: N, C_in, C_out, H, W. strides: x's (n, h, w), the weight's (o, h, w), in_scale's (n, c), out_scale's (n, c)
// and noise's n. kind: a tile, or -1 for what a GPU of so many multiprocessors gets.
template <typename T>
void modulated_conv2d(simt::Buffer<const T> x, simt::Buffer<const T> weight, simt::Buffer<const float> in_scale,
                      simt::Buffer<const float> out_scale, simt::Buffer<const float> noise,
                      simt::Buffer<const float> strength, simt::Buffer<const float> bias, std::vector<int64_t> sizes,
                      std::vector<int64_t> strides, bool relu, double slope, double gain, double clamp, int kind,
                      int multiprocessors, simt::Buffer<T> y, simt::Buffer<float> product) {
  ModulatedConv conv{};
  conv.x = x.data, conv.weight = weight.data;
  conv.x_n = strides[0], conv.x_h = strides[1], conv.x_w = strides[2];
  conv.weight_o = strides[3], conv.weight_h = strides[4], conv.weight_w = strides[5];
  conv.in_scale = optional(in_scale), conv.in_scale_n = strides[6], conv.in_scale_c = strides[7];
  conv.out_scale = optional(out_scale), conv.out_scale_n = strides[8], conv.out_scale_c = strides[9];
  conv.noise = optional(noise), conv.noise_n = strides[10];
  conv.strength = optional(strength), conv.bias = optional(bias);
  conv.y = y.data, conv.product = optional(product);
  conv.samples = static_cast<int>(sizes[0]), conv.c_in = static_cast<int>(sizes[1]);
  conv.c_out = static_cast<int>(sizes[2]), conv.height = static_cast<int>(sizes[3]);
  conv.width = static_cast<int>(sizes[4]);
  conv.relu = relu, conv.slope = static_cast<float>(slope);
  conv.gain = static_cast<float>(gain), conv.clamp = static_cast<float>(clamp);
  ConvTileKind chosen = fastgan::plan_conv(conv, multiprocessors);
  if (kind >= 0) {
    chosen = static_cast<ConvTileKind>(kind);
    fastgan::divide_conv(conv, chosen);
  }
  if (conv.splits > 1) {
    conv.partial = simt::workspace<float>(fastgan::conv_partial_size(conv, chosen), "partial");
    conv.counters = simt::workspace<unsigned>(fastgan::conv_tiles(conv), "counters", true);
  }
  fastgan::with_conv_tile(chosen, [&](auto tile) {
    using Tile = decltype(tile);
    simt::launch(static_cast<unsigned>(fastgan::conv_tiles(conv) * conv.splits), Tile::kThreads, Tile::kSharedBytes,
                 fastgan::modulated_conv_kernel<T, Tile>, conv);
  });
}

SIMT_EXPORT("float16", modulated_conv2d<__half>);
SIMT_EXPORT("bfloat16", modulated_conv2d<__nv_bfloat16>);

}  // namespace
