#include "product.h"

#include <algorithm>

#include "bf16.h"
#include "fetch.h"
#include "simd.h"

namespace fastgan {
namespace {

// ---- rows of weights times a stretch of the image

template <typename V, int kVectors>
FASTGAN_INLINE void load_row(const float* const (&starts)[kVectors], int64_t offset, V (&pixels)[kVectors]) {
  FASTGAN_UNROLL
  for (int v = 0; v < kVectors; ++v) pixels[v] = load<V>(starts[v] + offset);
}
template <typename V, int kVectors>
FASTGAN_INLINE void load_row(const BFloat16* const (&starts)[kVectors], int64_t offset, V (&pixels)[kVectors]) {
  FASTGAN_UNROLL
  for (int v = 0; v < kVectors; v += 2) widen_pair(starts[v] + offset, pixels[v], pixels[v + 1]);
}

template <typename V, int kRows, int kVectors, typename T>
FASTGAN_INLINE void multiply_row(const float* weights, const T* const (&starts)[kVectors], int64_t offset,
                                 V (&sums)[kRows][kVectors]) {
  V pixels[kVectors];
  load_row(starts, offset, pixels);
  FASTGAN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTGAN_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[r][v] += weights[r * kPanelStride] * pixels[v];
  }
}

template <typename V, int kRows, int kVectors, bool kFetch, typename T>
FASTGAN_INLINE void panel_tile(const PanelProducts& p, const T* image, int64_t first) {
  const T* starts[kVectors];
  FASTGAN_UNROLL
  for (int v = 0; v < kVectors; ++v) starts[v] = image + p.columns[first + v];
  const float* __restrict__ weights = p.weights;
  const int32_t* __restrict__ offsets = p.offsets;
  V sums[kRows][kVectors] = {};
  if (offsets) {
    for (int64_t k = 0, depth = p.depth; k < depth; ++k) multiply_row(weights + k, starts, offsets[k], sums);
  } else {
    const int64_t step = p.step;
    const auto multiply = [&](int64_t k) FASTGAN_LAMBDA_INLINE { multiply_row(weights + k, starts, k * step, sums); };
    if constexpr (kFetch) {
      fetch_and_multiply(p.ahead, first / kVectors, p.depth, multiply);
    } else {
#pragma GCC unroll 2
      for (int64_t k = 0, depth = p.depth; k < depth; ++k) multiply(k);
    }
  }
  FASTGAN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTGAN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* const to = p.sums + r * p.sums_stride + (first + v) * kLanes<V>;
      if (!p.overwrite) sums[r][v] += load<V>(to);
      store(sums[r][v], to);
    }
  }
}

// The vectors from v on, fewer than a tile takes: at most kVectors of them.
template <typename V, int kRows, int kVectors, bool kFetch, typename T>
FASTGAN_INLINE void last_panel_tile(const PanelProducts& p, const T* image, int64_t v) {
  constexpr int kLeast = sizeof(T) == sizeof(float) ? 1 : 2;
  if constexpr (kVectors >= kLeast) {
    if (p.vectors - v == kVectors) return panel_tile<V, kRows, kVectors, kFetch>(p, image, v);
    last_panel_tile<V, kRows, kVectors - kLeast, kFetch>(p, image, v);
  }
}

// kVectors x kRows sums: as many as the registers hold beside their operands.
template <typename V, int kRows, int kVectors, bool kFetch = false, typename T>
FASTGAN_INLINE void panel(const PanelProducts& p, const T* image) {
  constexpr int kLeast = sizeof(T) == sizeof(float) ? 1 : 2;
  int64_t v = 0;
  for (; v + kVectors <= p.vectors; v += kVectors) panel_tile<V, kRows, kVectors, kFetch>(p, image, v);
  last_panel_tile<V, kRows, kVectors - kLeast, kFetch>(p, image, v);
}

template <typename V, int kWide, typename T>
FASTGAN_INLINE void any_panel_of(const PanelProducts& p, const T* image) {
  switch (p.rows) {
    case 1:
      return panel<V, 1, 4 * kWide>(p, image);
    case 2:
      return panel<V, 2, 4 * kWide>(p, image);
    case 3:
      return panel<V, 3, 4 * kWide>(p, image);
    case 4:
      return panel<V, 4, 2 * kWide>(p, image);
    case 5:
      return panel<V, 5, 2 * kWide>(p, image);
    default:
      return p.ahead.panel ? panel<V, kPanelRows, 2 * kWide, true>(p, image)
                           : panel<V, kPanelRows, 2 * kWide>(p, image);
  }
}

template <typename V, int kWide>
FASTGAN_INLINE void any_panel(const PanelProducts& p) {
  if (p.image) {
    any_panel_of<V, kWide>(p, p.image);
  } else {
    any_panel_of<V, kWide>(p, p.narrow_image);
  }
}

// ---- shifted stretches of an image times a slab of another one's channels

template <typename V, int kRows, int kVectors>
FASTGAN_INLINE void shifted_tile(const ShiftedProducts& p) {
  constexpr int64_t kSlab = kVectors * kLanes<V>;
  V sums[kRows][kVectors] = {};
  const float* __restrict__ slab = p.slab;
  for (int64_t sample = 0; sample < p.samples; ++sample) {
    for (int64_t line = 0; line < p.lines; ++line) {
      const float* rows[kRows];
      FASTGAN_UNROLL
      for (int r = 0; r < kRows; ++r) rows[r] = p.image + p.starts[r] + sample * p.sample_stride + line * p.line_stride;
      for (int64_t i = 0, pixels = p.pixels; i < pixels; ++i, slab += kSlab) {
        V values[kVectors];
        FASTGAN_UNROLL
        for (int v = 0; v < kVectors; ++v) values[v] = load<V>(slab + v * kLanes<V>);
        FASTGAN_UNROLL
        for (int r = 0; r < kRows; ++r) {
          FASTGAN_UNROLL
          for (int v = 0; v < kVectors; ++v) sums[r][v] += rows[r][i] * values[v];
        }
      }
    }
  }
  FASTGAN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTGAN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* const to = p.sums + r * kSlab + v * kLanes<V>;
      if (!p.overwrite) sums[r][v] += load<V>(to);
      store(sums[r][v], to);
    }
  }
}

template <typename V, int kWide>
FASTGAN_INLINE void any_shifted(const ShiftedProducts& p) {
  switch (p.rows) {
    case 1:
      return shifted_tile<V, 1, 2 * kWide>(p);
    case 2:
      return shifted_tile<V, 2, 2 * kWide>(p);
    case 3:
      return shifted_tile<V, 3, 2 * kWide>(p);
    case 4:
      return shifted_tile<V, 4, 2 * kWide>(p);
    case 5:
      return shifted_tile<V, 5, 2 * kWide>(p);
    default:
      return shifted_tile<V, kPanelRows, 2 * kWide>(p);
  }
}

// ---- two matrices whose rows are what is summed over

template <typename V, int kRows, int kVectors>
FASTGAN_INLINE void outer_tile(const OuterProducts& p, int64_t first) {
  float* const to = p.sums + first * kLanes<V>;
  if (!p.overwrite) {
    // They were left long ago; what they are added to is ready by the end.
    FASTGAN_UNROLL
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(to + r * p.sums_stride);
  }
  V sums[kRows][kVectors] = {};
  const float* __restrict__ rows = p.rows, * __restrict__ columns = p.columns + first * kLanes<V>;
  const int64_t row_step = p.row_step, column_step = p.column_step;
#pragma GCC unroll 2
  for (int64_t k = 0, depth = p.depth; k < depth; ++k, rows += row_step, columns += column_step) {
    V values[kVectors];
    FASTGAN_UNROLL
    for (int v = 0; v < kVectors; ++v) values[v] = load<V>(columns + v * kLanes<V>);
    FASTGAN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTGAN_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] += rows[r] * values[v];
    }
  }
  FASTGAN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTGAN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* const at = to + r * p.sums_stride + v * kLanes<V>;
      if (!p.overwrite) sums[r][v] += load<V>(at);
      store(sums[r][v], at);
    }
  }
}

template <typename V, int kRows, int kVectors>
FASTGAN_INLINE void outer(const OuterProducts& p) {
  int64_t v = 0;
  for (; v + kVectors <= p.vectors; v += kVectors) outer_tile<V, kRows, kVectors>(p, v);
  for (; v < p.vectors; ++v) outer_tile<V, kRows, 1>(p, v);
}

template <typename V, int kWide>
FASTGAN_INLINE void any_outer(const OuterProducts& p) {
  switch (p.row_count) {
    case 1:
      return outer<V, 1, 2 * kWide>(p);
    case 2:
      return outer<V, 2, 2 * kWide>(p);
    case 3:
      return outer<V, 3, 2 * kWide>(p);
    case 4:
      return outer<V, 4, 2 * kWide>(p);
    case 5:
      return outer<V, 5, 2 * kWide>(p);
    default:
      return outer<V, kPanelRows, 2 * kWide>(p);
  }
}

// ---- dot products of stretches of two images

template <typename V, int kRows, int kColumns>
FASTGAN_INLINE void dot_tile(const DotProducts& p, int64_t row, int64_t column) {
  V sums[kRows][kColumns] = {};
  for (int64_t line = 0; line < p.lines; ++line) {
    const float* const a = p.rows + row * p.row_stride + line * p.row_line;
    const float* b[kColumns];
    FASTGAN_UNROLL
    for (int c = 0; c < kColumns; ++c) b[c] = p.image + p.columns[column + c] + line * p.image_line;
    for (int64_t i = 0, end = p.vectors * kLanes<V>; i < end; i += kLanes<V>) {
      V pixels[kColumns];
      FASTGAN_UNROLL
      for (int c = 0; c < kColumns; ++c) pixels[c] = load<V>(b[c] + i);
      FASTGAN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const V values = load<V>(a + r * p.row_stride + i);
        FASTGAN_UNROLL
        for (int c = 0; c < kColumns; ++c) sums[r][c] += values * pixels[c];
      }
    }
  }
  FASTGAN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTGAN_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      float* const to = p.sums + ((row + r) * p.column_count + column + c) * kLanes<V>;
      sums[r][c] += load<V>(to);
      store(sums[r][c], to);
    }
  }
}

template <typename V, int kRows, int kColumns>
FASTGAN_INLINE void dot_rows(const DotProducts& p, int64_t row) {
  int64_t c = 0;
  for (; c + kColumns <= p.column_count; c += kColumns) dot_tile<V, kRows, kColumns>(p, row, c);
  for (; c < p.column_count; ++c) dot_tile<V, kRows, 1>(p, row, c);
}

// As many sums as 16 registers hold beside the columns and one row.
template <typename V>
FASTGAN_INLINE void all_dots(const DotProducts& p) {
  constexpr int64_t kRows = 4;
  int64_t r = 0;
  for (; r + kRows <= p.row_count; r += kRows) dot_rows<V, kRows, 3>(p, r);
  switch (p.row_count - r) {
    case 1:
      return dot_rows<V, 1, 7>(p, r);
    case 2:
      return dot_rows<V, 2, 4>(p, r);
    case 3:
      return dot_rows<V, 3, 3>(p, r);
  }
}

// ---- the same code per instruction set, with registers of its width

using Portable = register_t<float, 16>;
void panel_portable(const PanelProducts& p) { any_panel<Portable, 1>(p); }
void shifted_portable(const ShiftedProducts& p) { any_shifted<Portable, 1>(p); }
void outer_portable(const OuterProducts& p) { any_outer<Portable, 1>(p); }
void dots_portable(const DotProducts& p) { all_dots<Portable>(p); }

struct Kernels {
  int64_t lanes, vectors;
  void (*panel)(const PanelProducts&);
  void (*shifted)(const ShiftedProducts&);
  void (*outer)(const OuterProducts&);
  void (*dots)(const DotProducts&);
};

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
using Avx2 = register_t<float, 32>;
using Avx512 = register_t<float, 64>;
FASTGAN_AVX2 void panel_avx2(const PanelProducts& p) { any_panel<Avx2, 1>(p); }
FASTGAN_AVX2 void shifted_avx2(const ShiftedProducts& p) { any_shifted<Avx2, 1>(p); }
FASTGAN_AVX2 void outer_avx2(const OuterProducts& p) { any_outer<Avx2, 1>(p); }
FASTGAN_AVX2 void dots_avx2(const DotProducts& p) { all_dots<Avx2>(p); }
// 32 registers instead of 16: twice the vectors.
FASTGAN_AVX512 void panel_avx512(const PanelProducts& p) { any_panel<Avx512, 2>(p); }
FASTGAN_AVX512 void shifted_avx512(const ShiftedProducts& p) { any_shifted<Avx512, 2>(p); }
FASTGAN_AVX512 void outer_avx512(const OuterProducts& p) { any_outer<Avx512, 2>(p); }
FASTGAN_AVX512 void dots_avx512(const DotProducts& p) { all_dots<Avx512>(p); }

Kernels choose() {
  if (has_avx512()) return {kLanes<Avx512>, 4, panel_avx512, shifted_avx512, outer_avx512, dots_avx512};
  if (has_avx2()) return {kLanes<Avx2>, 2, panel_avx2, shifted_avx2, outer_avx2, dots_avx2};
  return {kLanes<Portable>, 2, panel_portable, shifted_portable, outer_portable, dots_portable};
}
#else
Kernels choose() { return {kLanes<Portable>, 2, panel_portable, shifted_portable, outer_portable, dots_portable}; }
#endif

const Kernels kKernels = choose();

template <int64_t kPixel>
FASTGAN_INLINE void pack_all_lines(const Lines& l) {
  constexpr int64_t kStep = 16;
  for (int64_t line = 0; line < l.lines; ++line) {
    const float* __restrict__ from = l.from + line * l.line;
    float* __restrict__ to = l.to + line * l.to_line;
    const float scale = l.scale, least = l.least;
    const int64_t pixel = kPixel ? kPixel : l.pixel;
    for (int64_t i = 0; i < l.pixels; i += kStep) {
      // The last step overlaps the one before: a remainder one by one would cost more than the line.
      const int64_t at = l.pixels < kStep ? 0 : std::min(i, l.pixels - kStep), count = std::min(kStep, l.pixels);
      if (count == kStep) {
#pragma omp simd
        for (int64_t j = 0; j < kStep; ++j) to[at + j] = at_least(scale * from[(at + j) * pixel], least);
      } else {
        for (int64_t j = 0; j < count; ++j) to[j] = at_least(scale * from[j * pixel], least);
      }
    }
  }
}

}  // namespace

int64_t product_lanes() { return kKernels.lanes; }
int64_t product_vectors() { return kKernels.vectors; }
void panel_products(const PanelProducts& p) { kKernels.panel(p); }
void shifted_products(const ShiftedProducts& p) { kKernels.shifted(p); }
void outer_products(const OuterProducts& p) { kKernels.outer(p); }
void dot_products(const DotProducts& p) { kKernels.dots(p); }

void pack_panel(const float* from, const int32_t* offsets, int64_t depth, int64_t row_stride, int64_t rows, float* to) {
  const bool in_order = depth > 0 && offsets[depth - 1] - offsets[0] == depth - 1;
  for (int64_t r = 0; r < rows; ++r, from += row_stride, to += kPanelStride) {
    if (in_order) {
      std::copy_n(from + offsets[0], depth, to);
    } else {
      for (int64_t k = 0; k < depth; ++k) to[k] = from[offsets[k]];
    }
  }
}

FASTGAN_MULTIVERSION void pack_lines(const Lines& l) {
  if (l.pixel == 1) return pack_all_lines<1>(l);
  if (l.pixel == 2) return pack_all_lines<2>(l);
  pack_all_lines<0>(l);
}

FASTGAN_MULTIVERSION void interleave(const float* const* phases, int64_t count, float* __restrict__ to, int64_t n) {
  if (count == 2) {
    const float* __restrict__ const even = phases[0], * __restrict__ const odd = phases[1];
    for (int64_t i = 0; i < n / 2; ++i) {
      to[2 * i] = even[i];
      to[2 * i + 1] = odd[i];
    }
    if (n % 2) to[n - 1] = even[n / 2];
    return;
  }
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t i = 0; i * count + p < n; ++i) to[i * count + p] = phases[p][i];
  }
}

}  // namespace fastgan
