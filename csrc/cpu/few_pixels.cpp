// Dense convolution and transposed convolution of images with few pixels: one read of the weights, every pixel at once.
//
// convolution: columns [P, K] of the image (im2col, K = C_in kH kW), y[o, p] = <W[o, :], columns[p, :]>;
// transposed:  products[p, :] = sum_c x[c, p] W[c, :], each [C_out, kH, kW], added up where they overlap (col2im).
//
// P counts the pixels of all samples on the small side: of the result, transposed of x. One sum has one order, which
// depends on the shapes alone, so the number of threads changes nothing; and no pixel meets another one's values, so a
// NaN stays in its sample.
//
// W in bfloat16 is a copy that lies in the order in which it is read: task by task, within one block by block of
// columns, within one group by group of the rows that are read together, and of those 16 columns at a time, pairwise
// (bf16.h); then the columns that are left, row by row. Sums are those of a W of floats that was rounded.

#include "few_pixels.h"

#include <algorithm>
#include <memory>

#include "bf16.h"
#include "kept_weights.h"
#include "simd.h"

namespace fastgan {
namespace {

// Measured over the layers of the models, 1x1 to 4x4: at 32 pixels these kernels take 1 to 1/3 of the time of torch's
// convolution (1x1 gains least), at 64 up to 1.25 of it: read once, the weights are used often enough there.
constexpr int64_t kMaxPixels = 32;
// Blocks hold whole kernels: larger ones would outgrow the caches that the constants below are made for.
constexpr int64_t kMaxTaps = 64;
// Columns of the dot products that are finished for all rows of a task before the next: 4 KB of float per row and per
// pixel, so four rows stay in the first-level cache and all pixels in the second.
constexpr int64_t kDotColumns = 1024;
constexpr int64_t kDotRows = 4, kDotPixels = 2;  // 8 accumulators, 4 + 2 operands: the 16 registers of AVX2
constexpr int64_t kTaskRows = 32;
// Columns of W that one task of the transposed product sums over all channels: a page of float, since one channel's
// columns are far from the next one's.
constexpr int64_t kAxpyColumns = 1024;
// Channels whose products are summed in registers before they are added to the memory of the sums.
constexpr int64_t kAxpyChannels = 8;
constexpr int64_t kAxpyPixels = 4, kAxpyVectors = 2;  // again 8 accumulators

// Narrower instruction sets use two registers for one of these.
template <typename C>
using vector_t = register_t<C, 32>;

// ---- inner loops, compiled per instruction set

// Columns of a W in bfloat16 that are read at a time.
constexpr int64_t kPair = 2 * kLanes<vector_t<float>>;
// Whether weights lie in the order in which they are read.
template <typename W>
constexpr bool kInOrder = std::is_same_v<W, BFloat16>;
// Registers of weights that are loaded together.
template <typename W>
constexpr int kTogether = std::is_same_v<W, BFloat16> ? 2 : 1;

template <typename V, typename W, int kVectors>
FASTGAN_INLINE void load_weights(const W* from, V (&weights)[kVectors]) {
  if constexpr (std::is_same_v<W, BFloat16>) {
    static_assert(kVectors == 2);
    widen_pair(from, weights[0], weights[1]);
  } else {
    FASTGAN_UNROLL
    for (int v = 0; v < kVectors; ++v) weights[v] = load<V>(from + v * static_cast<int64_t>(sizeof(V) / sizeof(W)));
  }
}

// sums[r, p] += <w[r, :], x[p, :]>, x [P, n], for R rows and P pixels held in registers.
template <int R, int P, typename W, typename C>
FASTGAN_INLINE void dot_tile(const W* __restrict__ w, int64_t w_stride, const C* __restrict__ x, int64_t n,
                             C* __restrict__ sums, int64_t sums_stride) {
  using V = vector_t<C>;
  constexpr int kVectors = kTogether<W>;
  V acc[R][P] = {};
  int64_t i = 0;
  for (; i + kVectors * kLanes<V> <= n; i += kVectors * kLanes<V>) {
    V b[P][kVectors];
    FASTGAN_UNROLL
    for (int p = 0; p < P; ++p) load_weights(x + p * n + i, b[p]);
    FASTGAN_UNROLL
    for (int r = 0; r < R; ++r) {
      V a[kVectors];
      load_weights(w + (kInOrder<W> ? i * R + r * kPair : r * w_stride + i), a);
      FASTGAN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        FASTGAN_UNROLL
        for (int p = 0; p < P; ++p) acc[r][p] += a[v] * b[p][v];
      }
    }
  }
  FASTGAN_UNROLL
  for (int r = 0; r < R; ++r) {
    FASTGAN_UNROLL
    for (int p = 0; p < P; ++p) {
      C total = 0;
      const W* const rest = kInOrder<W> ? w + i * R + r * (n - i) : w + r * w_stride + i;
      for (int64_t j = i; j < n; ++j) total += static_cast<C>(rest[j - i]) * x[p * n + j];
      for (int lane = 0; lane < kLanes<V>; ++lane) total += acc[r][p][lane];
      sums[r * sums_stride + p] += total;
    }
  }
}

template <int R, typename W, typename C>
FASTGAN_INLINE void dot_rows(const W* w, int64_t w_stride, const C* x, int64_t pixels, int64_t n, C* sums) {
  int64_t p = 0;
  for (; p + kDotPixels <= pixels; p += kDotPixels) {
    dot_tile<R, kDotPixels>(w, w_stride, x + p * n, n, sums + p, pixels);
  }
  for (; p < pixels; ++p) dot_tile<R, 1>(w, w_stride, x + p * n, n, sums + p, pixels);
}

// sums[r, p] = <w[r, :], x[p, :]>; w [rows, columns] and sums are contiguous, x is one [pixels, n] after the other for
// each block of n = `block` columns (the last may be narrower), and so is a w in bfloat16, of [rows, n].
template <typename W, typename C>
FASTGAN_INLINE void dot_all(const W* w, int64_t rows, const C* x, int64_t pixels, int64_t columns, int64_t block,
                            C* sums) {
  std::fill_n(sums, rows * pixels, C(0));
  for (int64_t start = 0; start < columns; start += block) {
    const int64_t n = std::min(block, columns - start);
    const int64_t stride = kInOrder<W> ? n : columns;
    const W* const rows_of_w = w + start * (kInOrder<W> ? rows : 1);
    const C* const pixels_of_x = x + start * pixels;
    int64_t r = 0;
    for (; r + kDotRows <= rows; r += kDotRows) {
      dot_rows<kDotRows>(rows_of_w + r * stride, stride, pixels_of_x, pixels, n, sums + r * pixels);
    }
    for (; r < rows; ++r) dot_rows<1>(rows_of_w + r * stride, stride, pixels_of_x, pixels, n, sums + r * pixels);
  }
}
FASTGAN_MULTIVERSION void dot_task(const float* w, int64_t rows, const float* x, int64_t pixels, int64_t columns,
                                   int64_t block, float* sums) {
  dot_all(w, rows, x, pixels, columns, block, sums);
}
FASTGAN_MULTIVERSION void dot_task(const BFloat16* w, int64_t rows, const float* x, int64_t pixels, int64_t columns,
                                   int64_t block, float* sums) {
  dot_all(w, rows, x, pixels, columns, block, sums);
}
void dot_task(const double* w, int64_t rows, const double* x, int64_t pixels, int64_t columns, int64_t block,
              double* sums) {
  dot_all(w, rows, x, pixels, columns, block, sums);
}

// Columns of one tile.
template <typename C>
constexpr int64_t kAxpyStep = kAxpyVectors * kLanes<vector_t<C>>;

// sums[p, :] += sum_c x[c, p] w[c, :] for P pixels, `channels` channels and kVectors registers of columns (V may be C).
template <int P, int kVectors, typename V, typename W, typename C>
FASTGAN_INLINE void axpy_tile(const W* __restrict__ w, int64_t w_stride, const C* __restrict__ x, int64_t x_stride,
                              int64_t channels, C* __restrict__ sums) {
  constexpr int64_t kWidth = sizeof(V) / sizeof(C);
  // From zero and not from the sums: added block by block, a thousand channels round a third as much.
  V acc[P][kVectors] = {};
  for (int64_t c = 0; c < channels; ++c) {
    V a[kVectors];
    if constexpr (std::is_same_v<V, C>) {
      a[0] = static_cast<C>(w[c * w_stride]);
    } else {
      load_weights(w + c * w_stride, a);
    }
    FASTGAN_UNROLL
    for (int p = 0; p < P; ++p) {
      FASTGAN_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[p][v] += x[c * x_stride + p] * a[v];
    }
  }
  FASTGAN_UNROLL
  for (int p = 0; p < P; ++p) {
    FASTGAN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      C* const to = sums + p * kAxpyStep<C> + v * kWidth;
      store(load<V>(to) + acc[p][v], to);
    }
  }
}

template <int kVectors, typename V, typename W, typename C>
FASTGAN_INLINE void axpy_pixels(const W* w, int64_t w_stride, const C* x, int64_t pixels, int64_t channels, C* sums) {
  int64_t p = 0;
  for (; p + kAxpyPixels <= pixels; p += kAxpyPixels) {
    axpy_tile<kAxpyPixels, kVectors, V>(w, w_stride, x + p, pixels, channels, sums + p * kAxpyStep<C>);
  }
  for (; p < pixels; ++p) axpy_tile<1, kVectors, V>(w, w_stride, x + p, pixels, channels, sums + p * kAxpyStep<C>);
}

// sums[p, :n] = sum_c x[c, p] w[c, :n]; x is [channels, pixels], rows of w are w_stride apart. Sums lie as
// [ceil(n / kStep), pixels, kStep]: pixel by pixel they would be a power of two apart, as the rows of w often are, and
// all meet in one set of the first-level cache.
template <typename W, typename C>
FASTGAN_INLINE void axpy_all(const W* w, int64_t w_stride, const C* x, int64_t pixels, int64_t channels, int64_t n,
                             C* sums) {
  constexpr int64_t kStep = kAxpyStep<C>;
  std::fill_n(sums, (n + kStep - 1) / kStep * kStep * pixels, C(0));
  for (int64_t c = 0; c < channels; c += kAxpyChannels) {
    const int64_t block = std::min(kAxpyChannels, channels - c), next = std::min(kAxpyChannels, channels - c - block);
    const W* const rows = w + c * (kInOrder<W> ? n : w_stride);
    const C* const values = x + c * pixels;
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      if constexpr (kInOrder<W>) {
        axpy_pixels<kAxpyVectors, vector_t<C>>(rows + i * block, kPair, values, pixels, block, sums + i * pixels);
      } else {
        // The hardware follows a row only to the end of its page, where its columns of this task end.
        for (int64_t ahead = 0; ahead < next; ++ahead) {
          __builtin_prefetch(rows + (kAxpyChannels + ahead) * w_stride + i, 0, 2);
        }
        axpy_pixels<kAxpyVectors, vector_t<C>>(rows + i, w_stride, values, pixels, block, sums + i * pixels);
      }
    }
    const W* const rest = rows + (kInOrder<W> ? i * block : i);
    for (int64_t j = 0; i + j < n; ++j) {
      axpy_pixels<1, C>(rest + j, kInOrder<W> ? n - i : w_stride, values, pixels, block, sums + i * pixels + j);
    }
  }
}
FASTGAN_MULTIVERSION void axpy_task(const float* w, int64_t w_stride, const float* x, int64_t pixels, int64_t channels,
                                    int64_t n, float* sums) {
  axpy_all(w, w_stride, x, pixels, channels, n, sums);
}
FASTGAN_MULTIVERSION void axpy_task(const BFloat16* w, int64_t w_stride, const float* x, int64_t pixels,
                                    int64_t channels, int64_t n, float* sums) {
  axpy_all(w, w_stride, x, pixels, channels, n, sums);
}
void axpy_task(const double* w, int64_t w_stride, const double* x, int64_t pixels, int64_t channels, int64_t n,
               double* sums) {
  axpy_all(w, w_stride, x, pixels, channels, n, sums);
}

// ---- images

// An image [N, C, H, W] of any strides.
template <typename C>
struct Image {
  C* data;
  int64_t n, c, h, w, stride_n, stride_c, stride_h, stride_w;

  Image(const Tensor& t, C* pointer)
      : data(pointer),
        n(t.size(0)),
        c(t.size(1)),
        h(t.size(2)),
        w(t.size(3)),
        stride_n(t.stride(0)),
        stride_c(t.stride(1)),
        stride_h(t.stride(2)),
        stride_w(t.stride(3)) {}
  int64_t pixels() const { return n * h * w; }
  C* at(int64_t sample, int64_t y, int64_t x) const { return data + sample * stride_n + y * stride_h + x * stride_w; }
};

// The taps of one kernel that one small-side pixel lays over the large side, cut to what lies inside it: tap (i, j)
// meets the large pixel (y + i, x + j).
struct Window {
  int64_t sample, y, x, i_begin, i_end, j_begin, j_end;

  template <typename Small, typename Large>
  Window(const Small& small, const Large& large, int64_t pixel, int64_t kernel_h, int64_t kernel_w,
         const ConvGeometry& g)
      : sample(pixel / (small.h * small.w)),
        y(pixel / small.w % small.h * g.stride[0] - g.padding[0]),
        x(pixel % small.w * g.stride[1] - g.padding[1]),
        i_begin(std::max<int64_t>(0, -y)),
        i_end(std::min(kernel_h, large.h - y)),
        j_begin(std::max<int64_t>(0, -x)),
        j_end(std::min(kernel_w, large.w - x)) {}
};

// Channels of a block of about `columns` columns; 16 of them fill whole registers for any kernel.
int64_t channels_per_block(int64_t columns, int64_t taps) { return std::max<int64_t>(1, columns / (16 * taps)) * 16; }

template <typename W, typename C>
void convolve(const Image<const C>& x, const Tensor& weight, const W* w, const C* bias, const Image<C>& y,
              const ConvGeometry& g) {
  const int64_t kernel_h = weight.size(2), kernel_w = weight.size(3), taps = kernel_h * kernel_w;
  const int64_t pixels = y.pixels(), columns = x.c * taps;
  const int64_t channels = channels_per_block(kDotColumns, taps), blocks = (x.c + channels - 1) / channels;
  const auto cols = std::make_unique_for_overwrite<C[]>(pixels * columns);
  const int64_t im2col_grain = kGrainElements / (channels * taps) + 1;
  torch::stable::parallel_for(0, blocks * pixels, im2col_grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task % pixels, first = task / pixels * channels, count = std::min(channels, x.c - first);
      const Window window(y, x, p, kernel_h, kernel_w, g);
      C* to = cols.get() + (first * pixels + p * count) * taps;
      std::fill_n(to, count * taps, C(0));
      for (int64_t c = first; c < first + count; ++c, to += taps) {
        for (int64_t i = window.i_begin; i < window.i_end; ++i) {
          const C* const from = x.at(window.sample, window.y + i, 0) + c * x.stride_c;
          for (int64_t j = window.j_begin; j < window.j_end; ++j) {
            to[i * kernel_w + j] = from[(window.x + j) * x.stride_w];
          }
        }
      }
    }
  });
  const int64_t tasks = (y.c + kTaskRows - 1) / kTaskRows;
  const int64_t grain = kGrainElements / (kTaskRows * columns) + 1;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    C sums[kTaskRows * kMaxPixels];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kTaskRows, rows = std::min(kTaskRows, y.c - first);
      dot_task(w + first * columns, rows, cols.get(), pixels, columns, channels * taps, sums);
      for (int64_t p = 0; p < pixels; ++p) {
        C* const to = y.at(p / (y.h * y.w), p / y.w % y.h, p % y.w) + first * y.stride_c;
        for (int64_t r = 0; r < rows; ++r) to[r * y.stride_c] = sums[r * pixels + p] + (bias ? bias[first + r] : C(0));
      }
    }
  });
}

// Adds products [channels kH kW, pixels of x] as axpy_all lays them to channels [first, first + channels) of y, which
// starts as the bias.
template <typename C>
void add_products(const C* products, const Image<const C>& x, int64_t first, int64_t channels, int64_t kernel_h,
                  int64_t kernel_w, const C* bias, const Image<C>& y, const ConvGeometry& g) {
  constexpr int64_t kStep = kAxpyStep<C>;
  for (int64_t sample = 0; sample < y.n; ++sample) {
    for (int64_t row = 0; row < y.h; ++row) {
      for (int64_t column = 0; column < y.w; ++column) {
        C* const to = y.at(sample, row, column) + first * y.stride_c;
        for (int64_t o = 0; o < channels; ++o) to[o * y.stride_c] = bias ? bias[first + o] : C(0);
      }
    }
  }
  for (int64_t p = 0; p < x.pixels(); ++p) {
    const Window window(x, y, p, kernel_h, kernel_w, g);
    const C* const of_pixel = products + p * kStep;
    for (int64_t o = 0; o < channels; ++o) {
      for (int64_t i = window.i_begin; i < window.i_end; ++i) {
        C* const to = y.at(window.sample, window.y + i, 0) + (first + o) * y.stride_c;
        const int64_t column = (o * kernel_h + i) * kernel_w;
        for (int64_t j = window.j_begin; j < window.j_end; ++j) {
          const int64_t step = (column + j) / kStep, lane = (column + j) % kStep;
          to[(window.x + j) * y.stride_w] += of_pixel[step * kStep * x.pixels() + lane];
        }
      }
    }
  }
}

template <typename W, typename C>
void convolve_transposed(const Image<const C>& x, const Tensor& weight, const W* w, const C* bias, const Image<C>& y,
                         const ConvGeometry& g) {
  const int64_t kernel_h = weight.size(2), kernel_w = weight.size(3), taps = kernel_h * kernel_w;
  const int64_t pixels = x.pixels(), columns = y.c * taps;
  const auto packed = std::make_unique_for_overwrite<C[]>(x.c * pixels);
  for (int64_t p = 0; p < pixels; ++p) {
    const C* const from = x.at(p / (x.h * x.w), p / x.w % x.h, p % x.w);
    for (int64_t c = 0; c < x.c; ++c) packed[c * pixels + p] = from[c * x.stride_c];
  }
  // Whole channels per task, so that no two tasks add to one value.
  const int64_t channels = channels_per_block(kAxpyColumns, taps);
  const int64_t tasks = (y.c + channels - 1) / channels;
  const int64_t grain = kGrainElements / (channels * taps * x.c) + 1;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const auto products = std::make_unique_for_overwrite<C[]>(pixels * channels * taps);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * channels, count = std::min(channels, y.c - first);
      axpy_task(w + first * taps * (kInOrder<W> ? x.c : 1), columns, packed.get(), pixels, x.c, count * taps,
                products.get());
      add_products(products.get(), x, first, count, kernel_h, kernel_w, bias, y, g);
    }
  });
}

// A group of rows of one block, `columns` apart, n columns from `from` on, as it lies in the copy.
void narrow_group(const float* from, int64_t rows, int64_t columns, int64_t n, BFloat16* to) {
  const int64_t in_pairs = n / kPair * kPair;
  for (int64_t r = 0; r < rows; ++r, from += columns) {
    for (int64_t i = 0; i < in_pairs; ++i) {
      to[i / kPair * kPair * rows + r * kPair + paired(i % kPair, kPair / 2)] = BFloat16(from[i]);
    }
    for (int64_t i = in_pairs; i < n; ++i) to[in_pairs * rows + r * (n - in_pairs) + i - in_pairs] = BFloat16(from[i]);
  }
}

// The bfloat16 copy of W, [C_out, C_in kH kW] or transposed [C_in, C_out kH kW].
LargeBuffer narrowed(const Tensor& weight, bool transposed) {
  const int64_t taps = weight.size(2) * weight.size(3), rows = weight.size(0), columns = weight.size(1) * taps;
  const int64_t task_rows = transposed ? rows : kTaskRows;
  const int64_t block = channels_per_block(transposed ? kAxpyColumns : kDotColumns, taps) * taps;
  const float* const from = weight.const_data_ptr<float>();
  LargeBuffer copy = bf16_buffer(rows * columns);
  const int64_t blocks = ceil_div(columns, block);
  torch::stable::parallel_for(0, ceil_div(rows, task_rows) * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / blocks * task_rows, count = std::min(task_rows, rows - row);
      const int64_t start = task % blocks * block, n = std::min(block, columns - start);
      BFloat16* const to = bf16_of(copy) + row * columns + start * count;
      for (int64_t r = 0, group; r < count; r += group) {
        group = transposed ? std::min(kAxpyChannels, count - r) : count - r < kDotRows ? 1 : kDotRows;
        narrow_group(from + (row + r) * columns + start, group, columns, n, to + r * n);
      }
    }
  });
  return copy;
}

}  // namespace

Refusal refused_by_few_pixels(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::Double) return {"it takes float32 and 64"};
  if (const Refusal refusal = refuse_unless_plain(x, weight, std::nullopt, g)) return refusal;
  if (g.reflect) return {"it pads with zeros"};
  if (!weight.is_contiguous() || suggests_channels_last(weight)) return {"it takes a contiguous NCHW weight"};
  if (g.dilation[0] != 1 || g.dilation[1] != 1)
    return {"it takes dilation = 1, got # and #", g.dilation[0], g.dilation[1]};
  const int64_t taps = weight.size(2) * weight.size(3);
  if (taps > kMaxTaps) return {"it takes at most # taps, got #", kMaxTaps, taps};
  const int64_t pixels =
      x.size(0) * (g.transposed ? x.size(2) * x.size(3) : result_size(x, weight, g, 0) * result_size(x, weight, g, 1));
  if (pixels > kMaxPixels) return {"it takes at most # pixels, got #", kMaxPixels, pixels};
  return {};
}

Tensor convolve_few_pixels(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const ConvGeometry& g, Storage storage) {
  using torch::headeronly::MemoryFormat;
  const std::vector<int64_t> size{x.size(0), weight.size(g.transposed ? 1 : 0), result_size(x, weight, g, 0),
                                  result_size(x, weight, g, 1)};
  Tensor y = torch::stable::empty(size, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  suggests_channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  const auto run = [&]<typename W, typename C>(const W* w, C) {
    const Image<const C> from(x, x.const_data_ptr<C>());
    const Image<C> to(y, y.mutable_data_ptr<C>());
    const C* const b = bias ? bias->const_data_ptr<C>() : nullptr;
    if (g.transposed) {
      convolve_transposed<W, C>(from, weight, w, b, to, g);
    } else {
      convolve<W, C>(from, weight, w, b, to, g);
    }
  };
  if (x.scalar_type() == ScalarType::Double) {
    run(weight.const_data_ptr<double>(), double());
  } else if (storage == Storage::kFloat) {
    run(weight.const_data_ptr<float>(), float());
  } else {
    // Of Winograd's keys none is as short.
    const auto kept =
        made_of(weight.const_data_ptr<float>(), weight.numel(), {g.transposed, weight.size(0), weight.size(1)},
                [&](bool) { return narrowed(weight, g.transposed); });
    run(bf16_of(*kept), float());
  }
  return y;
}

}  // namespace fastgan
