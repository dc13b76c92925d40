#include "winograd.h"

#include <iterator>

#include "channel_patch.h"
#include "product.h"
#include "simd.h"

namespace fastgan {
namespace {

template <int kRows, int kColumns>
struct Matrix {
  float at[kRows][kColumns];
};

template <int M, int R>
struct Filter;

// Points 0, 1, -1: only additions around the products.
template <>
struct Filter<2, 3> {
  static constexpr Matrix<2, 4> a{{{1, 1, 1, 0}, {0, 1, -1, 1}}};
  static constexpr Matrix<4, 3> g{{{-1, 0, 0}, {0.5f, 0.5f, 0.5f}, {0.5f, -0.5f, 0.5f}, {0, 0, 1}}};
  static constexpr Matrix<4, 4> b{{{-1, 0, 1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, -1, 0, 1}}};
};

// Points 0, 1, -1, 1/2, -2: a third of the rounding of 0, 1, -1, 2, -2.
template <>
struct Filter<4, 3> {
  static constexpr Matrix<4, 6> a{
      {{1, 1, 1, 1, 1, 0}, {0, 1, -1, 0.5f, -2, 0}, {0, 1, 1, 0.25f, 4, 0}, {0, 1, -1, 0.125f, -8, 1}}};
  static constexpr Matrix<6, 3> g{{{1, 0, 0},
                                   {1 / 3.f, 1 / 3.f, 1 / 3.f},
                                   {-1 / 3.f, 1 / 3.f, -1 / 3.f},
                                   {-16 / 15.f, -8 / 15.f, -4 / 15.f},
                                   {1 / 15.f, -2 / 15.f, 4 / 15.f},
                                   {0, 0, 1}}};
  static constexpr Matrix<6, 6> b{{{1, -1.5f, -2, 1.5f, 1, 0},
                                   {0, -1, 0.5f, 2.5f, 1, 0},
                                   {0, 1, -2.5f, 0.5f, 1, 0},
                                   {0, -2, -1, 2, 1, 0},
                                   {0, 0.5f, -1, -0.5f, 1, 0},
                                   {0, 1, -1.5f, -2, 1.5f, 1}}};
};

// Points 0, -1.
template <>
struct Filter<2, 2> {
  static constexpr Matrix<2, 3> a{{{1, 1, 0}, {0, -1, 1}}};
  static constexpr Matrix<3, 2> g{{{1, 0}, {-1, 1}, {0, 1}}};
  static constexpr Matrix<3, 3> b{{{1, 1, 0}, {0, 1, 0}, {0, 1, 1}}};
};

// Points 0, 1, -1.
template <>
struct Filter<3, 2> {
  static constexpr Matrix<3, 4> a{{{1, 1, 1, 0}, {0, 1, -1, 0}, {0, 1, 1, 1}}};
  static constexpr Matrix<4, 2> g{{{-1, 0}, {0.5f, 0.5f}, {0.5f, -0.5f}, {0, 1}}};
  static constexpr Matrix<4, 4> b{{{-1, 0, 1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, -1, 0, 1}}};
};

// Points 0, 1, -1, -1/2.
template <>
struct Filter<4, 2> {
  static constexpr Matrix<4, 5> a{{{1, 1, 1, 1, 0}, {0, 1, -1, -0.5f, 0}, {0, 1, 1, 0.25f, 0}, {0, 1, -1, -0.125f, 1}}};
  static constexpr Matrix<5, 2> g{{{-2, 0}, {1 / 3.f, 1 / 3.f}, {-1, 1}, {8 / 3.f, -4 / 3.f}, {0, 1}}};
  static constexpr Matrix<5, 5> b{{{-0.5f, -1, 0.5f, 1, 0},
                                   {0, 0.5f, 1.5f, 1, 0},
                                   {0, -0.5f, -0.5f, 1, 0},
                                   {0, -1, 0, 1, 0},
                                   {0, -0.5f, -1, 0.5f, 1}}};
};

// to = matrix from; the matrix is known, so a product with 0 or 1 costs nothing.
template <typename V, int kRows, int kColumns>
FASTGAN_INLINE void multiply(const Matrix<kRows, kColumns>& matrix, const V* from, int64_t from_step, V* to,
                             int64_t to_step) {
  FASTGAN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    V sum = {};
    bool empty = true;
    FASTGAN_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      const float factor = matrix.at[i][j];
      if (factor == 0) continue;
      const V value = from[j * from_step];
      const V term = factor == 1 ? value : factor == -1 ? -value : factor * value;
      sum = empty ? term : sum + term;
      empty = false;
    }
    to[i * to_step] = sum;
  }
}

// matrix values matrix^T for kColumns x kColumns values -> kRows x kRows.
template <typename V, int kRows, int kColumns>
FASTGAN_INLINE void both_sides(const Matrix<kRows, kColumns>& matrix, const V* values, V* to) {
  V half[kRows * kColumns];
  FASTGAN_UNROLL
  for (int j = 0; j < kColumns; ++j) multiply(matrix, values + j, kColumns, half + j, kColumns);
  FASTGAN_UNROLL
  for (int i = 0; i < kRows; ++i) multiply(matrix, half + i * kColumns, 1, to + i * kRows, 1);
}

template <typename V, int kRows, int kColumns, typename At>
FASTGAN_INLINE void transform(const Matrix<kRows, kColumns>& matrix, At&& at, int64_t vectors, float* to,
                              int64_t to_stride) {
  for (int64_t v = 0; v < vectors; ++v) {
    V values[kColumns * kColumns], results[kRows * kRows];
    FASTGAN_UNROLL
    for (int k = 0; k < kColumns * kColumns; ++k) values[k] = load<V>(at(k) + v * kLanes<V>);
    both_sides(matrix, values, results);
    FASTGAN_UNROLL
    for (int k = 0; k < kRows * kRows; ++k) store(results[k], to + k * to_stride + v * kLanes<V>);
  }
}

template <typename V, typename F>
FASTGAN_INLINE void input_transform(const float* patch, int64_t row, int64_t column, int64_t vectors, float* to,
                                    int64_t to_stride) {
  constexpr int kSize = std::size(F::b.at);
  transform<V>(
      F::b, [=](int k) FASTGAN_LAMBDA_INLINE { return patch + k / kSize * row + k % kSize * column; }, vectors, to,
      to_stride);
}

template <typename V, typename F>
FASTGAN_INLINE void weight_transform(const float* taps, const int64_t* positions, int64_t vectors, float* to,
                                     int64_t to_stride) {
  transform<V>(F::g, [=](int k) FASTGAN_LAMBDA_INLINE { return taps + positions[k]; }, vectors, to, to_stride);
}

// Columns of one row of a tile, a group of channels each -> rows of pixels, one for each channel: four pixels each,
// what is beyond the tile being 0.
template <int kColumns>
FASTGAN_INLINE void spread_channels(const float* from, float* to, int64_t channel) {
  using Quad = register_t<float, 16>;
  constexpr int64_t kQuad = 4;
  for (int64_t c = 0; c < kGroup; c += kQuad) {
    Quad columns[kQuad] = {};
    FASTGAN_UNROLL
    for (int b = 0; b < kColumns; ++b) columns[b] = load<Quad>(from + b * kGroup + c);
    FASTGAN_UNROLL
    for (int k = 0; k < kQuad; ++k) {
      store(Quad{columns[0][k], columns[1][k], columns[2][k], columns[3][k]}, to + (c + k) * channel);
    }
  }
}

template <typename V, typename F>
FASTGAN_INLINE void output_transform(const float* sums, int64_t stride, float* to, int64_t channel, int64_t row) {
  constexpr int kSize = std::size(F::a.at);
  alignas(64) float tile[kSize * kSize * kGroup];
  transform<V>(F::a, [=](int k) FASTGAN_LAMBDA_INLINE { return sums + k * stride; }, kGroup / kLanes<V>, tile, kGroup);
  for (int a = 0; a < kSize; ++a) spread_channels<kSize>(tile + a * kSize * kGroup, to + a * row, channel);
}

// The three transforms of one size for one instruction set.
#define FASTGAN_WINOGRAD(name, target, bytes)                                                                          \
  template <int M, int R>                                                                                              \
  struct name {                                                                                                        \
    using V = register_t<float, bytes>;                                                                                \
    using F = Filter<M, R>;                                                                                            \
    target static void input(const float* patch, int64_t row, int64_t column, int64_t vectors, float* to, int64_t n) { \
      input_transform<V, F>(patch, row, column, vectors, to, n);                                                       \
    }                                                                                                                  \
    target static void weight(const float* taps, const int64_t* positions, int64_t vectors, float* to, int64_t n) {    \
      weight_transform<V, F>(taps, positions, vectors, to, n);                                                         \
    }                                                                                                                  \
    target static void output(const float* sums, int64_t stride, float* to, int64_t channel, int64_t row) {            \
      output_transform<V, F>(sums, stride, to, channel, row);                                                          \
    }                                                                                                                  \
    static constexpr WinogradKernels kernels{M, R, input, weight, output};                                             \
  };

FASTGAN_WINOGRAD(Portable, , 16)
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
FASTGAN_WINOGRAD(Avx2, FASTGAN_AVX2, 32)
FASTGAN_WINOGRAD(Avx512, FASTGAN_AVX512, 64)
#endif

template <int M, int R>
const WinogradKernels& kernels_of() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
  if (product_lanes() == 16) return Avx512<M, R>::kernels;
  if (product_lanes() == 8) return Avx2<M, R>::kernels;
#endif
  return Portable<M, R>::kernels;
}

}  // namespace

const WinogradKernels& winograd_kernels(int64_t m, int64_t r) {
  if (r == 3) return m == 4 ? kernels_of<4, 3>() : kernels_of<2, 3>();
  return m == 4 ? kernels_of<4, 2>() : m == 3 ? kernels_of<3, 2>() : kernels_of<2, 2>();
}

}  // namespace fastgan
