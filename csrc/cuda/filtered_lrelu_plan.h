// How filtered_lrelu's image is divided among blocks: plain C++, the same for nvcc's launches and csrc/simt's.
//
// One map serves the op, its gradient and the gradient of that. Along each axis
//
//   z[q] = sum_k fu[k] u[q + k - pad]             u[j * up] = x[j] + bias, zero elsewhere;  0 <= q < mid
//   y[o] = sum_k fd[k] a[o * down + offset + k]   a = activated z, or z times the slopes of a call before; else zero
//
// The transpose has up and down exchanged, fu and fd too and turned around, pad = fd_taps - 1 + offset and
// offset = pad - (fu_taps - 1): the same form, on the same grid of z.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>

namespace fastgan {

struct FlreluAxis {
  int in, mid, out, up, down, pad, offset, up_taps, down_taps;
};

enum class FlreluMode { kActivate, kRecord, kReplay };

// Rows of z that share a word of signs. Bits 2 i and 2 i + 1 of word [plane, row / 16, column] belong to row 16 k + i:
// the activation's argument was not above zero; the clamp was active.
constexpr int kFlreluSignRows = 16;

struct FlreluCall {
  const void* x;
  void* y;
  const float *bias, *fu, *fd;  // [channels]; [taps] or [taps of y, taps of x]; null for none
  uint32_t* signs;              // [planes, ceil(mid of y / 16), mid of x]
  int64_t planes;
  int channels;
  FlreluAxis along, across;  // x and y
  bool up_separable, down_separable;
  bool correlate;  // else the filters are turned around
  bool clamps;
  FlreluMode mode;
  float fir_gain, gain, slope_gain, clamp;  // slope_gain is slope * gain; clamp infinite unless it clamps
};

// A filter as a caller has it: [width], then along both axes, or [height, width]. None is one tap of 1.
struct FlreluFilter {
  const float* taps = nullptr;
  int64_t width = 1, height = 1;
  bool separable = true;
};

// Factors and filters up to this size have tiles whose sizes are ints; the smallest of larger ones would not fit.
constexpr int64_t kFlreluMostTaps = 512;

// What is the same for the op and its gradients. planes: N * channels.
inline FlreluCall describe_flrelu(int64_t planes, int64_t channels, const FlreluFilter& fu, const FlreluFilter& fd,
                                  int64_t up, int64_t down, bool correlate, double gain, double slope) {
  FlreluCall call{};
  call.planes = planes, call.channels = static_cast<int>(channels);
  call.fu = fu.taps, call.fd = fd.taps, call.up_separable = fu.separable, call.down_separable = fd.separable;
  call.correlate = correlate;
  call.gain = static_cast<float>(gain), call.slope_gain = static_cast<float>(gain * slope);
  call.clamp = std::numeric_limits<float>::infinity();
  for (FlreluAxis* axis : {&call.along, &call.across}) {
    axis->up = static_cast<int>(up), axis->down = static_cast<int>(down);
  }
  call.along.up_taps = static_cast<int>(fu.width), call.along.down_taps = static_cast<int>(fd.width);
  call.across.up_taps = static_cast<int>(fu.height), call.across.down_taps = static_cast<int>(fd.height);
  return call;
}

// The op itself along one axis. Of z, what reaches no output is left away.
inline void set_flrelu_axis(FlreluAxis& axis, int64_t in, int64_t before, int64_t after) {
  const int64_t mid = in * axis.up + before + after - (axis.up_taps - 1);
  axis.in = static_cast<int>(in), axis.pad = static_cast<int>(before), axis.offset = 0;
  axis.out = static_cast<int>((mid - axis.down_taps) / axis.down + 1);
  axis.mid = (axis.out - 1) * axis.down + axis.down_taps;
}

// A gradient along one axis.
inline void set_flrelu_replay(FlreluAxis& axis, int64_t in, int64_t pad, int64_t offset, int64_t mid, int64_t out) {
  axis.in = static_cast<int>(in), axis.pad = static_cast<int>(pad), axis.offset = static_cast<int>(offset);
  axis.mid = static_cast<int>(mid), axis.out = static_cast<int>(out);
}

// Compile-time sizes of the strip kernel, whose block owns kWidth columns of the output and walks down. kColumns of z
// pass through it in chunks of kChunk rows.
template <int kUp_, int kUpTaps_, int kDown_, int kDownTaps_>
struct FlreluStrip {
  static constexpr int kUp = kUp_, kUpTaps = kUpTaps_, kDown = kDown_, kDownTaps = kDownTaps_;
  // Input values below one value of z, and outputs that one reaches, along one axis.
  static constexpr int kWindow = kUpTaps / kUp, kPending = kDownTaps / kDown;
  static constexpr int kColumns = 128, kChunk = 32;
  static constexpr int kStep = kUp > kDown ? kUp : kDown;  // rows of z after which both phases are the same again
  static constexpr int kInputRows = kChunk / kUp, kOutputRows = kChunk / kDown;
  // Of z, up to kUp - 1 columns may come before the first that counts.
  static constexpr int kWidth = ((kColumns - (kUp - 1) - kDownTaps) / kDown + 1) / 8 * 8;
  static constexpr int kInputPitch = (kColumns / kUp + kWindow + 2) / 4 * 4, kPitch = kColumns + 4;
  static constexpr int kSharedFloats =
      kUpTaps + kDownTaps + kInputRows * kInputPitch + kChunk / kUp * kPitch + kOutputRows * kPitch;
  static_assert(kUpTaps % kUp == 0 && kDownTaps % kDown == 0 && kStep % kUp == 0 && kStep % kDown == 0);
  static_assert(kWindow <= kInputRows && kChunk % kStep == 0 && 4 % kUp == 0 && 4 % kDown == 0);
};

// StyleGAN3's filters have six taps per factor: its layers without and with a doubled resolution, and the gradient of
// the latter.
using FlreluStrip22 = FlreluStrip<2, 12, 2, 12>;
using FlreluStrip42 = FlreluStrip<4, 24, 2, 12>;
using FlreluStrip24 = FlreluStrip<2, 12, 4, 24>;

enum class FlreluKernel { kTile, kStrip22, kStrip42, kStrip24 };

constexpr int kFlreluStripThreads = FlreluStrip22::kColumns;
constexpr int kFlreluTileThreads = 256;
// What every launch on every GPU may have.
constexpr int kFlreluSharedBytes = 48 * 1024;

struct FlreluPlan {
  FlreluKernel kernel;
  int width, height;     // outputs of a block
  int tiles_x, tiles_y;  // blocks of a plane
  int64_t blocks;
  int threads, shared_bytes;
  int load_bytes;  // of a load of x
  bool pairs;      // two outputs side by side may be stored at once
};

// Sizes of a tile of the general kernel: its input, its z, and where they lie in shared memory, in floats.
struct FlreluTile {
  int in_width, in_height, mid_width, mid_height;
  int up_filter, down_filter, first, second, mid;  // first: input and its upsampled rows, later the downsampled columns
  int floats;
};

#ifdef __CUDACC__
__host__ __device__
#endif
    inline FlreluTile flrelu_tile(const FlreluCall& call, int width, int height) {
  const FlreluAxis &along = call.along, &across = call.across;
  FlreluTile tile{};
  tile.mid_width = (width - 1) * along.down + along.down_taps;
  tile.mid_height = (height - 1) * across.down + across.down_taps;
  tile.in_width = (tile.mid_width + along.up_taps - 2) / along.up + 1;
  tile.in_height = (tile.mid_height + across.up_taps - 2) / across.up + 1;
  tile.up_filter = 0;
  tile.down_filter = call.up_separable ? along.up_taps : along.up_taps * across.up_taps;
  tile.first = tile.down_filter + (call.down_separable ? along.down_taps : along.down_taps * across.down_taps);
  tile.second = tile.first + tile.in_width * tile.in_height;
  const int upsampled = tile.second + (call.up_separable ? tile.in_height * tile.mid_width : 0);
  const int downsampled = tile.first + (call.down_separable ? height * tile.mid_width : 0);
  tile.mid = upsampled > downsampled ? upsampled : downsampled;
  tile.floats = tile.mid + tile.mid_width * tile.mid_height;
  return tile;
}

// Outputs of a block have to begin at a word of signs.
inline int flrelu_height_unit(const FlreluAxis& across) {
  return kFlreluSignRows / std::gcd(across.down, kFlreluSignRows);
}

// In bytes; more than kFlreluSharedBytes cannot be launched. fastgan/ops/filtered_lrelu.py has the same formula.
inline int64_t flrelu_smallest_tile(const FlreluCall& call) {
  return int64_t{4} * flrelu_tile(call, 1, flrelu_height_unit(call.across)).floats;
}

template <typename Strip>
bool flrelu_is(const FlreluCall& call) {
  return call.up_separable && call.down_separable && call.along.up == Strip::kUp && call.along.down == Strip::kDown &&
         call.along.up_taps == Strip::kUpTaps && call.along.down_taps == Strip::kDownTaps;
}

inline FlreluKernel choose_flrelu(const FlreluCall& call) {
  if (flrelu_is<FlreluStrip22>(call)) {
    return FlreluKernel::kStrip22;
  }
  if (flrelu_is<FlreluStrip42>(call)) {
    return FlreluKernel::kStrip42;
  }
  // Only as a gradient: nobody needs the op itself with these factors.
  if (flrelu_is<FlreluStrip24>(call) && call.mode == FlreluMode::kReplay) {
    return FlreluKernel::kStrip24;
  }
  return FlreluKernel::kTile;
}

// The largest tile that fits, wide rather than high.
inline void plan_flrelu_tile(const FlreluCall& call, FlreluPlan& plan) {
  const int unit = flrelu_height_unit(call.across);
  plan.width = plan.height = 0;
  for (int height = 32; height >= unit; height /= 2) {
    for (int width = 32; width >= 1; width /= 2) {
      // Beyond the image there is nothing to compute.
      const bool wasteful =
          (width > 1 && width / 2 >= call.along.out) || (height > unit && height / 2 >= call.across.out);
      if (!wasteful && 4 * flrelu_tile(call, width, height).floats <= kFlreluSharedBytes &&
          width * height > plan.width * plan.height) {
        plan.width = width, plan.height = height;
      }
    }
  }
  plan.threads = kFlreluTileThreads;
  plan.shared_bytes = plan.width > 0 ? 4 * flrelu_tile(call, plan.width, plan.height).floats : 0;
}

// The longer a strip, the less is computed twice; the shorter, the more blocks there are. So many keep any GPU busy.
constexpr int64_t kFlreluBlocks = 1024;

template <typename Strip>
void plan_flrelu_strip(const FlreluCall& call, int64_t blocks, FlreluPlan& plan) {
  constexpr int64_t kLongest = 128;
  const int64_t out = call.across.out, columns = (call.along.out + Strip::kWidth - 1) / Strip::kWidth;
  const int64_t wanted = (blocks + call.planes * columns - 1) / (call.planes * columns);
  const int64_t most = (out + kFlreluSignRows - 1) / kFlreluSignRows;
  const int64_t strips = std::max((out + kLongest - 1) / kLongest, std::min(wanted, most));
  const int64_t height = (out + strips - 1) / strips;
  plan.width = Strip::kWidth;
  plan.height = static_cast<int>((height + kFlreluSignRows - 1) / kFlreluSignRows * kFlreluSignRows);
  plan.threads = kFlreluStripThreads;
  plan.shared_bytes = 4 * Strip::kSharedFloats;
}

// Of a call whose smallest tile fits and which has at least one plane. blocks: that strips are shortened for.
inline FlreluPlan plan_flrelu(const FlreluCall& call, int item_bytes, int64_t blocks = kFlreluBlocks) {
  FlreluPlan plan{};
  plan.kernel = choose_flrelu(call);
  switch (plan.kernel) {
    case FlreluKernel::kStrip22:
      plan_flrelu_strip<FlreluStrip22>(call, blocks, plan);
      break;
    case FlreluKernel::kStrip42:
      plan_flrelu_strip<FlreluStrip42>(call, blocks, plan);
      break;
    case FlreluKernel::kStrip24:
      plan_flrelu_strip<FlreluStrip24>(call, blocks, plan);
      break;
    case FlreluKernel::kTile:
      plan_flrelu_tile(call, plan);
  }
  plan.tiles_x = (call.along.out + plan.width - 1) / plan.width;
  plan.tiles_y = (call.across.out + plan.height - 1) / plan.height;
  plan.blocks = call.planes * plan.tiles_x * plan.tiles_y;
  // Every row has to begin where a load may.
  const uint64_t address = reinterpret_cast<uintptr_t>(call.x) | static_cast<uint64_t>(call.along.in) * item_bytes | 16;
  plan.load_bytes = static_cast<int>(address & ~(address - 1));
  plan.pairs = call.along.out % 2 == 0 && reinterpret_cast<uintptr_t>(call.y) % (2 * item_bytes) == 0;
  return plan;
}

// The blocks from `first` on that one launch may have.
inline unsigned flrelu_blocks(const FlreluPlan& plan, int64_t first) {
  return static_cast<unsigned>(std::min<int64_t>(plan.blocks - first, std::numeric_limits<int>::max()));
}

}  // namespace fastgan
