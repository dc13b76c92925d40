#include "winograd.h"

#include <iterator>

#include "channel_patch.h"
#include "product.h"
#include "quads.h"

namespace fastgan {
namespace {

template <int kRows, int kColumns>
struct Matrix {
  float at[kRows][kColumns];
};

template <int kRows, int kColumns>
constexpr Matrix<kColumns, kRows> transposed(const Matrix<kRows, kColumns>& matrix) {
  Matrix<kColumns, kRows> result{};
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) result.at[j][i] = matrix.at[i][j];
  }
  return result;
}

template <int M, int R>
struct Filter;

// Nothing saved: every tap of a result is a product of its own.
template <int R>
struct Filter<1, R> {
  static constexpr Matrix<1, R> ones() {
    Matrix<1, R> matrix{};
    for (int i = 0; i < R; ++i) matrix.at[0][i] = 1;
    return matrix;
  }
  static constexpr Matrix<R, R> identity() {
    Matrix<R, R> matrix{};
    for (int i = 0; i < R; ++i) matrix.at[i][i] = 1;
    return matrix;
  }
  static constexpr Matrix<1, R> a = ones();
  static constexpr Matrix<R, R> g = identity(), b = identity();
};

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

// An axis along which a kernel has a single tap: each of its pixels is a product of its own.
template <int M>
struct Single {
  static constexpr Matrix<M, M> identity() {
    Matrix<M, M> matrix{};
    for (int i = 0; i < M; ++i) matrix.at[i][i] = 1;
    return matrix;
  }
  static constexpr Matrix<M, M> a = identity(), b = identity();
  static constexpr Matrix<1, 1> g{{{1}}};
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

// Registers of floats from memory of floats or integers, and to it.
template <typename V>
FASTGAN_INLINE V load_floats(const float* from) {
  return load<V>(from);
}
template <typename V>
FASTGAN_INLINE V load_floats(const int32_t* from) {
  return __builtin_convertvector(load<register_t<int32_t, sizeof(V)>>(from), V);
}
template <typename V>
FASTGAN_INLINE void store_floats(const V& values, float* to) {
  store(values, to);
}
template <typename V>
FASTGAN_INLINE void store_floats(const V& values, int16_t* to) {
  const auto whole = __builtin_convertvector(values, register_t<int32_t, sizeof(V)>);
  store(__builtin_convertvector(whole, register_t<int16_t, sizeof(V) / 2>), to);
}

// Values that lie `row` and `column` apart.
template <typename V, typename T>
struct Grid {
  const T* from;
  int64_t row, column;

  FASTGAN_INLINE V operator()(int i, int j, int64_t v) const {
    return load_floats<V>(from + i * row + j * column + v * kLanes<V>);
  }
};

// to = down values across^T, for every register of channels; value(i, j, register) are the values, to(i, j) where those
// of the result go.
template <typename V, int kDownRows, int kDown, int kAcrossRows, int kAcross, typename Value, typename To>
FASTGAN_INLINE void transform_to(const Matrix<kDownRows, kDown>& down, const Matrix<kAcrossRows, kAcross>& across,
                                 Value&& value, int64_t vectors, To&& to) {
  for (int64_t v = 0; v < vectors; ++v) {
    V half[kDownRows * kAcross];
    FASTGAN_UNROLL
    for (int j = 0; j < kAcross; ++j) {
      V column[kDown];
      FASTGAN_UNROLL
      for (int i = 0; i < kDown; ++i) column[i] = value(i, j, v);
      multiply(down, column, 1, half + j, kAcross);
    }
    FASTGAN_UNROLL
    for (int i = 0; i < kDownRows; ++i) {
      V row[kAcrossRows];
      multiply(across, half + i * kAcross, 1, row, 1);
      FASTGAN_UNROLL
      for (int j = 0; j < kAcrossRows; ++j) store_floats(row[j], to(i, j) + v * kLanes<V>);
    }
  }
}

// The same to one value behind the other.
template <typename V, int kDownRows, int kDown, int kAcrossRows, int kAcross, typename Value, typename To>
FASTGAN_INLINE void transform(const Matrix<kDownRows, kDown>& down, const Matrix<kAcrossRows, kAcross>& across,
                              Value&& value, int64_t vectors, To* to, int64_t to_stride) {
  transform_to<V>(down, across, value, vectors,
                  [=](int i, int j) FASTGAN_LAMBDA_INLINE { return to + (i * kAcrossRows + j) * to_stride; });
}

// Fetches kLines values that are `stride` apart, to be written or read.
template <int kLines, bool kToWrite, typename T>
FASTGAN_INLINE void fetch_lines(const T* from, int64_t stride) {
  FASTGAN_UNROLL
  for (int k = 0; k < kLines; ++k) __builtin_prefetch(from + k * stride, kToWrite);
}

// Columns of one row of a tile, a group of channels each -> rows of pixels, one for each channel: four pixels each,
// what is beyond the tile being 0.
template <typename V, int kColumns>
FASTGAN_INLINE void spread_channels(const float* from, float* to, int64_t channel) {
  for (int64_t c = 0; c < kGroup; c += kLanes<V>) {
    V columns[kQuad] = {};
    FASTGAN_UNROLL
    for (int b = 0; b < kColumns; ++b) columns[b] = load<V>(from + b * kGroup + c);
    transpose_quads(columns);
    FASTGAN_UNROLL
    for (int k = 0; k < kQuad; ++k) store_quads(columns[k], to + (c + k) * channel, kQuad * channel);
  }
}

template <typename V, int M, typename Down, typename Across>
struct Transforms {
  template <typename To>
  FASTGAN_INLINE static void input(const float* patch, int64_t row, int64_t column, const float* scale, int64_t vectors,
                                   To* to, int64_t to_stride, int64_t next) {
    if (next) fetch_lines<std::size(Down::b.at) * std::size(Across::b.at), true>(to + next, to_stride);
    const Grid<V, float> values{patch, row, column};
    if (!scale) return transform<V>(Down::b, Across::b, values, vectors, to, to_stride);
    const auto scaled = [=](int i, int j, int64_t v)
                            FASTGAN_LAMBDA_INLINE { return values(i, j, v) * load<V>(scale + v * kLanes<V>); };
    transform<V>(Down::b, Across::b, scaled, vectors, to, to_stride);
  }

  FASTGAN_INLINE static void weight(const float* taps, const int64_t* positions, int64_t vectors, float* to,
                                    int64_t to_stride) {
    constexpr int kTaps = std::size(Across::g.at[0]);
    const auto value = [=](int i, int j, int64_t v)
                           FASTGAN_LAMBDA_INLINE { return load<V>(taps + positions[i * kTaps + j] + v * kLanes<V>); };
    transform<V>(Down::g, Across::g, value, vectors, to, to_stride);
  }

  FASTGAN_INLINE static void cotangent(const float* patch, int64_t row, int64_t column, int64_t vectors, float* to,
                                       int64_t to_stride) {
    constexpr auto down = transposed(Down::a), across = transposed(Across::a);
    transform<V>(down, across, Grid<V, float>{patch, row, column}, vectors, to, to_stride);
  }

  FASTGAN_INLINE static void taps(const float* sums, int64_t row, int64_t column, int64_t vectors, float* to,
                                  int64_t to_stride) {
    constexpr auto down = transposed(Down::g), across = transposed(Across::g);
    transform<V>(down, across, Grid<V, float>{sums, row, column}, vectors, to, to_stride);
  }

  template <typename Sum>
  FASTGAN_INLINE static void output(const Sum* sums, int64_t stride, int64_t next, float* to, int64_t channel,
                                    int64_t row) {
    constexpr int kSums = std::size(Across::a.at[0]);
    if (next) fetch_lines<std::size(Down::a.at[0]) * kSums, false>(sums + next, stride);
    const Grid<V, Sum> values{sums, kSums * stride, stride};
    if (channel == 1) {
      transform_to<V>(Down::a, Across::a, values, kGroup / kLanes<V>,
                      [=](int i, int j) FASTGAN_LAMBDA_INLINE { return to + i * row + j * kGroup; });
      return;
    }
    alignas(64) float tile[M * M * kGroup];
    transform<V>(Down::a, Across::a, values, kGroup / kLanes<V>, tile, kGroup);
    for (int a = 0; a < M; ++a) spread_channels<V, M>(tile + a * M * kGroup, to + a * row, channel);
  }
};

// The three transforms of one size and form for one instruction set.
#define FASTGAN_WINOGRAD(name, target, bytes)                                                                        \
  template <int M, typename Down, typename Across>                                                                   \
  struct name {                                                                                                      \
    using Of = Transforms<register_t<float, bytes>, M, Down, Across>;                                                \
    target static void input(const float* patch, int64_t row, int64_t column, const float* scale, int64_t vectors,   \
                             float* to, int64_t n, int64_t next) {                                                   \
      Of::input(patch, row, column, scale, vectors, to, n, next);                                                    \
    }                                                                                                                \
    target static void weight(const float* taps, const int64_t* positions, int64_t vectors, float* to, int64_t n) {  \
      Of::weight(taps, positions, vectors, to, n);                                                                   \
    }                                                                                                                \
    target static void output(const float* sums, int64_t stride, int64_t next, float* to, int64_t channel,           \
                              int64_t row) {                                                                         \
      Of::output(sums, stride, next, to, channel, row);                                                              \
    }                                                                                                                \
    target static void cotangent(const float* patch, int64_t row, int64_t column, int64_t vectors, float* to,        \
                                 int64_t n) {                                                                        \
      Of::cotangent(patch, row, column, vectors, to, n);                                                             \
    }                                                                                                                \
    target static void taps(const float* sums, int64_t row, int64_t column, int64_t vectors, float* to, int64_t n) { \
      Of::taps(sums, row, column, vectors, to, n);                                                                   \
    }                                                                                                                \
    target static void whole_input(const float* patch, int64_t row, int64_t column, int64_t vectors, int16_t* to,    \
                                   int64_t n, int64_t next) {                                                        \
      Of::input(patch, row, column, nullptr, vectors, to, n, next);                                                  \
    }                                                                                                                \
    target static void whole_output(const int32_t* sums, int64_t stride, int64_t next, float* to, int64_t channel,   \
                                    int64_t row) {                                                                   \
      Of::output(sums, stride, next, to, channel, row);                                                              \
    }                                                                                                                \
    static constexpr WinogradKernels kernels{input, weight, output};                                                 \
    static constexpr WholeKernels whole{whole_input, weight, whole_output};                                          \
    static constexpr WinogradGradKernels grad_kernels{cotangent, taps};                                              \
  };

FASTGAN_WINOGRAD(Portable, , 16)
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
FASTGAN_WINOGRAD(Avx2, FASTGAN_AVX2, 32)
FASTGAN_WINOGRAD(Avx512, FASTGAN_AVX512, 64)
#endif

template <int M, typename Down, typename Across>
const WinogradKernels& kernels_of() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
  if (product_lanes() == 16) return Avx512<M, Down, Across>::kernels;
  if (product_lanes() == 8) return Avx2<M, Down, Across>::kernels;
#endif
  return Portable<M, Down, Across>::kernels;
}

template <int M, typename Down, typename Across>
const WholeKernels& whole_kernels_of() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
  if (product_lanes() == 16) return Avx512<M, Down, Across>::whole;
  if (product_lanes() == 8) return Avx2<M, Down, Across>::whole;
#endif
  return Portable<M, Down, Across>::whole;
}

template <typename Both, int M>
const WinogradGradKernels& grad_kernels_of() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
  if (product_lanes() == 16) return Avx512<M, Both, Both>::grad_kernels;
  if (product_lanes() == 8) return Avx2<M, Both, Both>::grad_kernels;
#endif
  return Portable<M, Both, Both>::grad_kernels;
}

template <int M>
const WinogradKernels& kernels_of_two_taps(bool single_y, bool single_x) {
  using Pair = Filter<M, 2>;
  if (single_y) return single_x ? kernels_of<M, Single<M>, Single<M>>() : kernels_of<M, Single<M>, Pair>();
  return single_x ? kernels_of<M, Pair, Single<M>>() : kernels_of<M, Pair, Pair>();
}

template <int M>
const WholeKernels& whole_kernels_of_two_taps(bool single_y, bool single_x) {
  using Pair = Filter<M, 2>;
  if (single_y) return single_x ? whole_kernels_of<M, Single<M>, Single<M>>() : whole_kernels_of<M, Single<M>, Pair>();
  return single_x ? whole_kernels_of<M, Pair, Single<M>>() : whole_kernels_of<M, Pair, Pair>();
}

}  // namespace

const WholeKernels& whole_kernels(int64_t m, int64_t r, bool single_y, bool single_x) {
  if (r == 3) {
    return m == 2 ? whole_kernels_of<2, Filter<2, 3>, Filter<2, 3>>()
                  : whole_kernels_of<1, Filter<1, 3>, Filter<1, 3>>();
  }
  if (m == 1) return whole_kernels_of_two_taps<1>(single_y, single_x);
  return m == 3 ? whole_kernels_of_two_taps<3>(single_y, single_x) : whole_kernels_of_two_taps<2>(single_y, single_x);
}

WholeFactors whole_factors(int64_t m, int64_t r) {
  if (m == 1) return {1, 1, 1};
  if (r == 3) return {4, 9, 4};
  return {4, 4, m == 3 ? 4 : 1};
}

const WinogradKernels& winograd_kernels(int64_t m, int64_t r, bool single_y, bool single_x) {
  if (r == 3) return m == 4 ? kernels_of<4, Filter<4, 3>, Filter<4, 3>>() : kernels_of<2, Filter<2, 3>, Filter<2, 3>>();
  return m == 3 ? kernels_of_two_taps<3>(single_y, single_x) : kernels_of_two_taps<2>(single_y, single_x);
}

const WinogradGradKernels& winograd_grad_kernels(int64_t r) {
  return r == 3 ? grad_kernels_of<Filter<2, 3>, 2>() : grad_kernels_of<Filter<3, 2>, 3>();
}

}  // namespace fastgan
