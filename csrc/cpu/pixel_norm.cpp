// pixel_norm: y = x * r with r = 1 / sqrt(mean of x^2 along one dimension + eps), and its gradient
// r * g - x * r^3 * mean(g * x). Source: Karras et al. 2018 (Progressive GAN), section 4.2.

#include <cmath>

#include "convert.h"
#include "image.h"

namespace fastgan {
namespace {

// The tensor as [outer, C, inner]: what is normalised together is C values, `inner` apart.
struct Lines {
  int64_t outer, c, inner;
};

template <typename C>
struct Block {
  const C* x;
  const C* g;  // null in the forward
  C* sum_xx;
  C* sum_gx;
  C* y;
  int64_t n;
};

// Adjacent lines: one value of each of n lines.
template <bool kGrad, typename C>
FASTGAN_INLINE void add_loop(const Block<C>& b) {
  const C *const x = b.x, *const g = b.g;
  C *const sum_xx = b.sum_xx, *const sum_gx = b.sum_gx;
  const int64_t n = b.n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    sum_xx[i] += x[i] * x[i];
    if constexpr (kGrad) sum_gx[i] += g[i] * x[i];
  }
}
// sum_xx -> the factor on x or g, sum_gx -> the factor on x that is subtracted.
template <bool kGrad, typename C>
FASTGAN_INLINE void factors_loop(const Block<C>& b, C count, C eps) {
  C *const sum_xx = b.sum_xx, *const sum_gx = b.sum_gx;
  const int64_t n = b.n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const C r = C(1) / std::sqrt(sum_xx[i] / count + eps);
    sum_xx[i] = r;
    if constexpr (kGrad) sum_gx[i] *= r * r * r / count;
  }
}
template <bool kGrad, typename C>
FASTGAN_INLINE void write_loop(const Block<C>& b) {
  const C *const x = b.x, *const g = b.g, *const factor = b.sum_xx, *const off = b.sum_gx;
  C* const y = b.y;
  const int64_t n = b.n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = kGrad ? g[i] * factor[i] - x[i] * off[i] : x[i] * factor[i];
}
// One line of n adjacent values.
template <bool kGrad, typename C>
FASTGAN_INLINE void line_loop(const Block<C>& b, C eps) {
  const C *const x = b.x, *const g = b.g;
  C* const y = b.y;
  const int64_t n = b.n;
  C sum_xx = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_xx, sum_gx)
  for (int64_t i = 0; i < n; ++i) {
    sum_xx += x[i] * x[i];
    if constexpr (kGrad) sum_gx += g[i] * x[i];
  }
  const C count = static_cast<C>(n), r = C(1) / std::sqrt(sum_xx / count + eps), off = sum_gx * r * r * r / count;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = kGrad ? g[i] * r - x[i] * off : x[i] * r;
}

FASTGAN_MULTIVERSION void add(const Block<float>& b) { b.g ? add_loop<true>(b) : add_loop<false>(b); }
FASTGAN_MULTIVERSION void factors(const Block<float>& b, float count, float eps) {
  b.g ? factors_loop<true>(b, count, eps) : factors_loop<false>(b, count, eps);
}
FASTGAN_MULTIVERSION void write(const Block<float>& b) { b.g ? write_loop<true>(b) : write_loop<false>(b); }
FASTGAN_MULTIVERSION void line(const Block<float>& b, float eps) {
  b.g ? line_loop<true>(b, eps) : line_loop<false>(b, eps);
}
void add(const Block<double>& b) { b.g ? add_loop<true>(b) : add_loop<false>(b); }
void factors(const Block<double>& b, double count, double eps) {
  b.g ? factors_loop<true>(b, count, eps) : factors_loop<false>(b, count, eps);
}
void write(const Block<double>& b) { b.g ? write_loop<true>(b) : write_loop<false>(b); }
void line(const Block<double>& b, double eps) { b.g ? line_loop<true>(b, eps) : line_loop<false>(b, eps); }

// Lines of adjacent values.
template <typename T>
void run_adjacent(const T* x, const T* g, T* y, const Lines& lines, double eps) {
  using C = accumulate_t<T>;
  const int64_t c = lines.c, grain = std::max<int64_t>(1, kGrainElements / c);
  torch::stable::parallel_for(0, lines.outer, grain, [&](int64_t begin, int64_t end) {
    const int64_t size = sizeof(T) == 2 ? c : 0;
    std::vector<C> x_buffer(size), g_buffer(size), y_buffer(size);
    for (int64_t i = begin; i < end; ++i) {
      Block<C> b{as_compute(x + i * c, c, x_buffer.data()), nullptr, nullptr, nullptr,
                 result_buffer(y + i * c, y_buffer.data()), c};
      if (g) b.g = as_compute(g + i * c, c, g_buffer.data());
      line(b, static_cast<C>(eps));
      flush(b.y, y + i * c, c);
    }
  });
}

// Lines across planes: so many at a time that what the second pass reads again is still in a cache, and that every
// plane is read in long runs. Runs of 1 KiB (a block in the second-level cache) took 1.7 times as long as runs of 16
// KiB: planes are pages apart, and neither the prefetcher nor the address translation follows short ones.
template <typename T>
void run_planar(const T* x, const T* g, T* y, const Lines& lines, double eps) {
  using C = accumulate_t<T>;
  constexpr int64_t kCacheValues = 1 << 20;
  // Two tasks a thread; sums run along the lines, so the split changes no result.
  const int64_t share = lines.outer * lines.inner / (2 * static_cast<int64_t>(torch::stable::get_num_threads()));
  const int64_t most = std::max<int64_t>(32, std::min(kCacheValues / lines.c, std::max<int64_t>(256, share)));
  const int64_t width = std::min(lines.inner, most);
  const int64_t per_plane = (lines.inner + width - 1) / width;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (width * lines.c));
  torch::stable::parallel_for(0, lines.outer * per_plane, grain, [&](int64_t begin, int64_t end) {
    std::vector<C> sum_xx(width), sum_gx(width), x_buffer(width), g_buffer(width), y_buffer(width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % per_plane * width, n = std::min(width, lines.inner - first);
      const int64_t base = task / per_plane * lines.c * lines.inner + first;
      std::fill(sum_xx.begin(), sum_xx.end(), C(0));
      std::fill(sum_gx.begin(), sum_gx.end(), C(0));
      Block<C> b{nullptr, nullptr, sum_xx.data(), sum_gx.data(), nullptr, n};
      const auto read = [&](int64_t channel) {
        const int64_t offset = base + channel * lines.inner;
        b.x = as_compute(x + offset, n, x_buffer.data());
        if (g) b.g = as_compute(g + offset, n, g_buffer.data());
        return offset;
      };
      for (int64_t channel = 0; channel < lines.c; ++channel) {
        read(channel);
        add(b);
      }
      factors(b, static_cast<C>(lines.c), static_cast<C>(eps));
      for (int64_t channel = 0; channel < lines.c; ++channel) {
        const int64_t offset = read(channel);
        b.y = result_buffer(y + offset, y_buffer.data());
        write(b);
        flush(b.y, y + offset, n);
      }
    }
  });
}

Tensor normalise(const char* op, const Tensor& x, const Tensor* g, int64_t dim, double eps) {
  const bool channels_last = is_channels_last(x) && dim == 1;
  const Tensor source = in_layout(x, channels_last);
  const auto cotangent = g ? std::optional(in_layout(*g, channels_last)) : std::nullopt;
  Tensor y = empty_image(x, x.scalar_type(), channels_last);
  if (x.numel() == 0) return y;
  Lines lines{1, x.size(dim), 1};
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (i != dim) (i > dim && !channels_last ? lines.inner : lines.outer) *= x.size(i);
  }
  dispatch_dtype(op, x.scalar_type(), [&]<typename T>() {
    const T* const from = source.const_data_ptr<T>();
    const T* const with = cotangent ? cotangent->const_data_ptr<T>() : nullptr;
    T* const to = y.mutable_data_ptr<T>();
    lines.inner == 1 ? run_adjacent(from, with, to, lines, eps) : run_planar(from, with, to, lines, eps);
  });
  return y;
}

Tensor pixel_norm(const Tensor& x, int64_t dim, double eps) { return normalise("pixel_norm", x, nullptr, dim, eps); }
Tensor pixel_norm_grad(const Tensor& g, const Tensor& x, int64_t dim, double eps) {
  return normalise("pixel_norm_grad", x, &g, dim, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("pixel_norm", TORCH_BOX(&pixel_norm));
  m.impl("pixel_norm_grad", TORCH_BOX(&pixel_norm_grad));
}

}  // namespace fastgan
