// Prints the dynamic shared memory that launches of csrc/cuda ask for at most, as the report of cuda_code.py names it.

#include <cstdio>

#include "cuda/filtered_lrelu_plan.h"
#include "cuda/modulated_conv2d_plan.h"
#include "cuda/norm_act_plan.h"
#include "cuda/spectral_sigma_plan.h"
#include "cuda/upfirdn2d_plan.h"

namespace {

template <typename Tile>
void print(const char* name) {
  std::printf("%s\t%d\n", name, Tile::kSharedBytes);
}

template <typename Strip>
void print_strip(const char* name) {
  std::printf("%s\t%d\n", name, static_cast<int>(4 * Strip::kSharedFloats));
}

// Of a plane of 8192 values in half types.
int plane_bytes() {
  fastgan::NormCall call{};
  call.samples = call.channels = 1;
  call.pixels = call.run = 8192;
  return fastgan::plan_norm_planes(call, true, 2).slice_bytes;
}

}  // namespace

int main() {
  std::printf("sigma_kernel<\t%d\n", fastgan::kSigmaSharedBytes);
  std::printf("fir_kernel\t%d\n", fastgan::kFirMostBytes);
  print_strip<fastgan::FlreluStrip22>("FlreluStrip<2, 12, 2, 12>");
  print_strip<fastgan::FlreluStrip42>("FlreluStrip<4, 24, 2, 12>");
  print_strip<fastgan::FlreluStrip24>("FlreluStrip<2, 12, 4, 24>");
  std::printf("flrelu_tile_kernel<\t%d\n", fastgan::kFlreluSharedBytes);
  std::printf("norm_plane_kernel<\t%d\n", plane_bytes());
  std::printf("norm_plane_grad_kernel<\t%d\n", 2 * plane_bytes());
  print<fastgan::ConvTile<1, 8, 16, 128, 2, 4>>("ConvTile<1, 8, 16, 128, 2, 4>");
  print<fastgan::ConvTile<1, 8, 16, 64, 2, 2>>("ConvTile<1, 8, 16, 64, 2, 2>");
  print<fastgan::ConvTile<1, 8, 8, 64, 2, 2>>("ConvTile<1, 8, 8, 64, 2, 2>");
  print<fastgan::ConvTile<4, 4, 4, 64, 2, 2>>("ConvTile<4, 4, 4, 64, 2, 2>");
}
