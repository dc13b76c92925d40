// How upfirdn2d's result is divided among blocks: plain C++, the same for nvcc's launches and csrc/simt's.
//
// A block makes a tile of results: some columns x rows x units. A unit is a plane in NCHW, a channel of one sample in
// NHWC. What the tile sees of the image lies in shared memory, [unit, row, column] or [row, column, unit], as float; so
// does the tile itself before the epilogue.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "activation.h"

namespace fastgan {

// n / divisor for n < 2^31 by a multiplication (Granlund and Montgomery, "Division by invariant integers using
// multiplication", 1994).
struct Divisor {
  unsigned divisor = 1, multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(unsigned by) : divisor(by) {
    while ((uint64_t{1} << shift) < divisor) {
      ++shift;
    }
    multiplier = static_cast<unsigned>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }
};

// One axis: result[i] = sum over k of f[k] u[i down + k - pad], where u[j up] = x[j] and u is zero elsewhere.
struct FirAxis {
  int in, out, up, down, taps, pad;
  // The tile's results, a power of two; tiles begin `shift` results early where that puts tap 0 on a pixel, as the
  // specialised kernels want it.
  int tile_log2, shift, tiles;
  int span;  // inputs that the results of a tile see
  int held;  // inputs in shared memory at a time: of rows of a vector's alignment some more, or fewer than the span
};

// The kernel's parameter. Image tensors are dense in one layout; those of another type are float.
struct FirParams {
  const void* x;
  const float *f, *noise, *strength, *bias;  // each but x may be null
  const void* residual;
  void* y;
  FirAxis across, along;
  int samples, channels;
  int units, unit_log2;         // planes or channels in all; of a tile, a power of two
  int64_t noise_stride;         // between samples
  int filter_stride;            // between the filter's rows; 0: one vector for both axes
  bool flip;                    // correlation
  bool two_passes;              // filter along x first, then along y
  bool wide_in, wide_out;       // accesses of 16 bytes
  int tile_offset, mid_offset;  // in shared memory, floats
  Divisor runs, rows, tiles_x, tiles_y, groups, per_sample;
  Act act;
  float fir_gain, slope, gain, clamp, residual_gain;
};
static_assert(sizeof(FirParams) <= 4096);

// What the kernels are specialised for, along both axes: StyleGAN2's filters; StyleGAN3's, 6 taps a phase.
struct FirCase {
  int up, down, taps;
};
constexpr FirCase kFirCases[] = {{1, 1, 4}, {2, 1, 4},  {1, 2, 4},  {2, 1, 6},
                                 {1, 2, 6}, {2, 1, 12}, {1, 2, 12}, {4, 1, 24}};
constexpr int kFirGeneral = -1;

constexpr int kFirThreads = 256;
// Channels of a tile in NHWC: in half types a sector of 32 bytes a pixel.
constexpr int kFirChunk = 16;
// Within what every launch may have, less the static kind; and what a tile should not exceed, for three blocks to fit
// into the 64 KB of sm_75.
constexpr int kFirMostBytes = 47 * 1024, kFirGoodBytes = 21 * 1024;

// Rows of the result that a thread makes one after another, for which it filters each row of the image along x once.
constexpr int fir_strip(FirCase c) { return c.down > 1 && c.taps <= 4 ? 4 : 8; }

struct FirPlan {
  FirParams params;
  int fir_case;
  int64_t blocks;
  int shared_bytes;
};

constexpr int fir_log2(int64_t least) {
  int log2 = 0;
  while ((int64_t{1} << log2) < least) {
    ++log2;
  }
  return log2;
}

inline int64_t fir_floor(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// The kernel for the parameters' axes and filter.
inline int choose_fir_case(const FirParams& p) {
  const FirAxis &x = p.across, &y = p.along;
  for (int i = 0; i < static_cast<int>(std::size(kFirCases)); ++i) {
    const FirCase& c = kFirCases[i];
    if (x.up == c.up && y.up == c.up && x.down == c.down && y.down == c.down && x.taps == c.taps && y.taps == c.taps &&
        p.f != nullptr && (p.filter_stride == 0 || c.taps <= 4)) {
      return i;
    }
  }
  return kFirGeneral;
}

// Of a tile of 2^log2 results: the inputs that it sees, and how many tiles there are.
inline void set_fir_tile(FirAxis& axis, int log2, bool specialised) {
  axis.tile_log2 = log2;
  axis.shift = specialised ? static_cast<int>(-axis.pad - fir_floor(-axis.pad, axis.up) * axis.up) : 0;
  const int64_t last = ((int64_t{1} << log2) - 1) * axis.down + axis.taps - 1 + (specialised ? 0 : axis.up - 1);
  axis.span = static_cast<int>(last / axis.up + 1);
  axis.tiles = static_cast<int>((int64_t{axis.out} + axis.shift + (1 << log2) - 1) >> log2);
}

// How many inputs of each axis are in shared memory, and where what lies behind them begins. Returns all bytes.
inline int64_t set_fir_shared(FirParams& p, bool channels_last, int vector, int most_inputs) {
  FirAxis &x = p.across, &y = p.along;
  const int unit = 1 << p.unit_log2, align = p.wide_in && !channels_last ? vector : 1;
  const int64_t wide = (int64_t{x.span} + 2 * align - 2) / align * align;
  x.held = static_cast<int>(std::min<int64_t>(wide, std::max(most_inputs / unit / align * align, align)));
  y.held = static_cast<int>(std::min<int64_t>(y.span, std::max(most_inputs / unit / x.held, 1)));
  const int64_t inputs = int64_t{x.held} * y.held << p.unit_log2;
  const int64_t mid = p.two_passes ? int64_t{y.held} << (x.tile_log2 + p.unit_log2) : 0;
  p.tile_offset = static_cast<int>((inputs + 3) / 4 * 4);
  const int64_t results = int64_t{1} << (x.tile_log2 + y.tile_log2 + p.unit_log2);
  p.mid_offset = static_cast<int>(p.tile_offset + (results + 3) / 4 * 4);
  return 4 * (p.mid_offset + mid);
}

// The specialised kernels: the whole span in shared memory, a strip of results for each thread.
inline int64_t plan_fir_case(FirParams& p, FirCase c, bool channels_last, int vector) {
  FirAxis &x = p.across, &y = p.along;
  const int strip = fir_strip(c), group = c.up;
  // As many groups of neighbouring results as make kFirThreads strips: rows of 64 results in NCHW, in NHWC pixel tiles
  // as square as shared memory has room for.
  const int most_w = channels_last ? (c.down > 1 ? 8 : 8 * std::min(group, 2)) : 64;
  const int most_h = channels_last ? (c.down > 1 ? 8 : 16) : c.down > 1 ? 16 : std::min(32 * group, 64);
  const int log2_w = std::clamp(fir_log2(int64_t{x.out} + x.up - 1), fir_log2(std::max(group, 4)), fir_log2(most_w));
  const int log2_h = std::clamp(fir_log2(int64_t{y.out} + y.up - 1), fir_log2(strip), fir_log2(most_h));
  set_fir_tile(x, log2_w, true);
  set_fir_tile(y, log2_h, true);
  p.two_passes = false;
  const auto bytes = [&] { return set_fir_shared(p, channels_last, vector, INT32_MAX); };
  if (channels_last) {
    p.unit_log2 = fir_log2(kFirChunk);
    return bytes();
  }
  p.unit_log2 = 0;
  // Several small planes.
  while ((1 << (log2_w + log2_h + p.unit_log2)) / (strip * group) < kFirThreads && (1 << p.unit_log2) < p.units) {
    ++p.unit_log2;
    if (bytes() > kFirGoodBytes) {
      --p.unit_log2;
      break;
    }
  }
  return bytes();
}

// Any factors and any filter: what a tile sees comes through shared memory in as many pieces as it takes.
inline int64_t plan_fir_general(FirParams& p, bool channels_last, int vector) {
  constexpr int kInputs = 4096, kResults = 1024;
  FirAxis &x = p.across, &y = p.along;
  int log2_w = std::min(fir_log2(x.out), channels_last ? 3 : 5),
      log2_h = std::min(fir_log2(y.out), channels_last ? 3 : 5);
  p.unit_log2 = channels_last ? fir_log2(kFirChunk) : 0;
  while (!channels_last && 1 << (log2_w + log2_h + p.unit_log2) < kResults && 1 << p.unit_log2 < p.units) {
    ++p.unit_log2;
  }
  const auto spans = [&] {
    set_fir_tile(x, log2_w, false);
    set_fir_tile(y, log2_h, false);
    return int64_t{x.span} * y.span << p.unit_log2;
  };
  // Fewer planes and results, down to 8 x 8, before pieces.
  while (spans() > kInputs) {
    if (!channels_last && p.unit_log2 > 0) {
      --p.unit_log2;
    } else if (log2_w > 3 || log2_h > 3) {
      --(log2_w >= log2_h ? log2_w : log2_h);
    } else {
      break;
    }
  }
  spans();
  // Products a result: two passes filter each row that the tile sees once along x.
  const double along_x = static_cast<double>(x.taps) / x.up, along_y = static_cast<double>(y.taps) / y.up;
  p.two_passes = p.filter_stride == 0 && y.span * along_x / (1 << log2_h) + along_y < along_x * along_y;
  int64_t bytes = 0;
  int inputs = kInputs;
  while ((bytes = set_fir_shared(p, channels_last, vector, inputs)) > kFirMostBytes) {
    inputs /= 2;
  }
  return bytes;
}

// Divides the result of some samples among blocks. p: the addresses, of which the images' alignment decides on loads;
// of both axes in, out, up, down, taps and pad; samples, channels, filter_stride; what else the caller knows.
inline FirPlan plan_fir(FirParams p, bool channels_last, int item_bytes) {
  const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  const int vector = 16 / item_bytes;
  FirAxis &x = p.across, &y = p.along;
  p.units = channels_last ? p.channels : p.samples * p.channels;
  p.wide_in = aligned(p.x) && (channels_last ? p.channels : x.in) % vector == 0;
  const int fir_case = choose_fir_case(p);
  const int64_t bytes = fir_case == kFirGeneral ? plan_fir_general(p, channels_last, vector)
                                                : plan_fir_case(p, kFirCases[fir_case], channels_last, vector);
  // Beside the image, what lies along the result's vectors: noise in NCHW, bias in NHWC.
  p.wide_out =
      aligned(p.y) && aligned(p.residual) && aligned(channels_last ? p.bias : p.noise) &&
      (channels_last ? p.channels % vector == 0 : x.out % vector == 0 && x.shift == 0 && 1 << x.tile_log2 >= vector);
  const int run = channels_last ? 1 << p.unit_log2 : x.held, unit = 1 << p.unit_log2;
  p.runs = Divisor(static_cast<unsigned>(channels_last ? x.held : run / (p.wide_in ? vector : 1)));
  p.rows = Divisor(static_cast<unsigned>(y.held));
  const int groups = (p.units + unit - 1) / unit;
  p.groups = Divisor(static_cast<unsigned>(groups));
  p.tiles_x = Divisor(static_cast<unsigned>(x.tiles));
  p.tiles_y = Divisor(static_cast<unsigned>(y.tiles));
  p.per_sample = Divisor(static_cast<unsigned>(p.channels));
  const int64_t blocks = int64_t{x.tiles} * y.tiles * groups * (channels_last ? p.samples : 1);
  return {p, fir_case, blocks, static_cast<int>(bytes)};
}

// So many samples of a batch have fewer than 2^30 planes and blocks.
inline int64_t fir_samples(int64_t samples, int64_t channels, int64_t out_h, int64_t out_w) {
  // No tile has fewer than 8 results but that of a smaller plane, which then is one tile.
  const int64_t tiles = std::max<int64_t>(1, out_h * out_w / 8);
  return std::clamp<int64_t>((int64_t{1} << 30) / std::max<int64_t>(1, tiles * channels), 1, samples);
}

}  // namespace fastgan
