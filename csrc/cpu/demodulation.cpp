// demodulation: from a weight and the styles the factors around StyleGAN2's convolution, in one read of the weight.
//
//   in_scale[n, i] = style[n, i] / sqrt(l[n])
//   d[n, o] = 1 / sqrt(sum_i energy[o, i] * style[n, i]^2 / l[n] + eps * c[o]),   energy[o, i] = sum_kk weight^2
//
// The levels c and l, of the weight and of the style, are what "prenormalize" divides by: normalising the weight by
// sqrt(c) and multiplying d by 1 / sqrt(c) afterwards is the same as eps * c. Source: Karras et al. 2020 (StyleGAN2),
// equation 3.
//
// demodulation_factor: d / sqrt(l) from energies that are known, for a convolution of style * x itself.

#include <algorithm>
#include <cmath>

#include "convert.h"

namespace fastgan {
namespace {

enum class Prenormalize { kNone, kLargest, kMeanSquare };

Prenormalize parse_prenormalize(const std::string& name) {
  if (name == "none") return Prenormalize::kNone;
  if (name == "stylegan2_fp16") return Prenormalize::kLargest;
  STD_TORCH_CHECK(name == "stylegan3", "demodulation: unknown prenormalize ", name);
  return Prenormalize::kMeanSquare;
}

template <int kTaps, typename C>
FASTGAN_INLINE void energy_loop(const C* __restrict__ w, C* __restrict__ energy, int64_t channels, int64_t taps) {
  const int64_t count = kTaps > 0 ? kTaps : taps;
  for (int64_t i = 0; i < channels; ++i) {
    C sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += w[i * count + k] * w[i * count + k];
    energy[i] = sum;
  }
}
template <typename C>
FASTGAN_INLINE void energy_any(const C* w, C* energy, int64_t channels, int64_t taps) {
  if (taps == 1) return energy_loop<1>(w, energy, channels, taps);
  if (taps == 9) return energy_loop<9>(w, energy, channels, taps);
  energy_loop<0>(w, energy, channels, taps);
}
FASTGAN_MULTIVERSION void sum_squares(const float* w, float* energy, int64_t channels, int64_t taps) {
  energy_any(w, energy, channels, taps);
}
void sum_squares(const double* w, double* energy, int64_t channels, int64_t taps) {
  energy_any(w, energy, channels, taps);
}

template <typename C>
FASTGAN_INLINE C dot_loop(const C* __restrict__ a, const C* __restrict__ b, int64_t n) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}
FASTGAN_MULTIVERSION float dot(const float* a, const float* b, int64_t n) { return dot_loop(a, b, n); }
double dot(const double* a, const double* b, int64_t n) { return dot_loop(a, b, n); }

template <typename C>
FASTGAN_INLINE C largest_loop(const C* a, int64_t n) {
  C most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(a[i]));
  return most;
}
FASTGAN_MULTIVERSION float largest(const float* a, int64_t n) { return largest_loop(a, n); }
double largest(const double* a, int64_t n) { return largest_loop(a, n); }

// A row of zeros has nothing to normalise: its level is that of a row of ones.
template <typename C>
C one_for_zero(C value) {
  return value == C(0) ? C(1) : value;
}

template <typename C>
struct Styles {
  const C* style;
  C* in_scale;
  C* level;
  std::vector<C> square;  // of in_scale
  int64_t n, channels;

  void normalise(Prenormalize kind) {
    C shared = 1;
    if (kind == Prenormalize::kMeanSquare && n > 0) {
      double sum = 0;
      for (int64_t i = 0; i < n * channels; ++i) sum += static_cast<double>(style[i]) * style[i];
      shared = one_for_zero(static_cast<C>(sum / static_cast<double>(n * channels)));
    }
    square.resize(n * channels);
    for (int64_t row = 0; row < n; ++row) {
      const C* const from = style + row * channels;
      const C most = kind == Prenormalize::kLargest ? one_for_zero(largest(from, channels)) : C(1);
      level[row] = kind == Prenormalize::kLargest ? most * most : shared;
      const C factor = C(1) / std::sqrt(level[row]);
      for (int64_t i = 0; i < channels; ++i) {
        const C value = from[i] * factor;
        in_scale[row * channels + i] = value;
        square[row * channels + i] = value * value;
      }
    }
  }
};

template <typename C>
C mean_square(const C* energy, int64_t channels, int64_t taps) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < channels; ++i) sum += energy[i];
  return one_for_zero(sum / static_cast<C>(channels * taps));
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five demodulation(const Tensor& weight, const Tensor& style, std::string prenormalize, double eps, bool save_energy) {
  const char* const op = "demodulation";
  const Prenormalize kind = parse_prenormalize(prenormalize);
  const int64_t outputs = weight.size(0), channels = weight.size(1), taps = weight.size(2) * weight.size(3);
  const int64_t n = style.size(0), row_values = channels * taps;
  const Tensor dense_weight = torch::stable::contiguous(weight), dense_style = torch::stable::contiguous(style);
  const auto empty = [&](std::vector<int64_t> sizes) { return torch::stable::new_empty(style, sizes); };
  Tensor in_scale = empty({n, channels}), d = empty({n, outputs}), weight_level = empty({outputs});
  Tensor style_level = empty({n}), energy = save_energy ? empty({outputs, channels}) : empty({0});
  dispatch_dtype(op, weight.scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    Styles<C> styles{dense_style.const_data_ptr<C>(),
                     in_scale.mutable_data_ptr<C>(),
                     style_level.mutable_data_ptr<C>(),
                     {},
                     n,
                     channels};
    styles.normalise(kind);
    const T* const from = dense_weight.const_data_ptr<T>();
    C* const energy_to = save_energy ? energy.mutable_data_ptr<C>() : nullptr;
    C* const level_to = weight_level.mutable_data_ptr<C>();
    C* const d_to = d.mutable_data_ptr<C>();
    const int64_t grain = std::max<int64_t>(1, kGrainElements / row_values);
    torch::stable::parallel_for(0, outputs, grain, [&](int64_t begin, int64_t end) {
      std::vector<C> wide(sizeof(T) == 2 ? row_values : 0), row(save_energy ? 0 : channels);
      for (int64_t o = begin; o < end; ++o) {
        const C* const w = as_compute(from + o * row_values, row_values, wide.data());
        C* const e = save_energy ? energy_to + o * channels : row.data();
        sum_squares(w, e, channels, taps);
        C level = 1;
        if (kind == Prenormalize::kLargest) {
          const C most = one_for_zero(largest(w, row_values));
          level = most * most * static_cast<C>(row_values);
        } else if (kind == Prenormalize::kMeanSquare) {
          level = mean_square(e, channels, taps);
        }
        level_to[o] = level;
        for (int64_t i = 0; i < n; ++i) {
          const C power = dot(styles.square.data() + i * channels, e, channels);
          d_to[i * outputs + o] = C(1) / std::sqrt(power + static_cast<C>(eps) * level);
        }
      }
    });
  });
  return {in_scale, d, energy, weight_level, style_level};
}

Tensor demodulation_factor(const Tensor& style, const Tensor& energy, const Tensor& peak, int64_t taps,
                           std::string prenormalize, double eps) {
  const Prenormalize kind = parse_prenormalize(prenormalize);
  const int64_t n = style.size(0), channels = style.size(1), outputs = energy.size(0);
  const Tensor dense_style = torch::stable::contiguous(style), dense_energy = torch::stable::contiguous(energy);
  const Tensor dense_peak = torch::stable::contiguous(peak);
  Tensor factor = torch::stable::new_empty(style, {n, outputs});
  dispatch_dtype("demodulation_factor", style.scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    std::vector<C> in_scale(n * channels), level(n);
    Styles<C> styles{dense_style.const_data_ptr<C>(), in_scale.data(), level.data(), {}, n, channels};
    styles.normalise(kind);
    const C* const energies = dense_energy.const_data_ptr<C>();
    const C* const peaks = dense_peak.const_data_ptr<C>();
    C* const factor_to = factor.mutable_data_ptr<C>();
    const int64_t grain = std::max<int64_t>(1, kGrainElements / (channels * std::max<int64_t>(n, 1)));
    torch::stable::parallel_for(0, outputs, grain, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        const C* const e = energies + o * channels;
        C weight_level = 1;
        if (kind == Prenormalize::kLargest) weight_level = peaks[o];
        if (kind == Prenormalize::kMeanSquare) weight_level = mean_square(e, channels, taps);
        for (int64_t i = 0; i < n; ++i) {
          const C power = dot(styles.square.data() + i * channels, e, channels) + static_cast<C>(eps) * weight_level;
          factor_to[i * outputs + o] = C(1) / (std::sqrt(power) * std::sqrt(level[i]));
        }
      }
    });
  });
  return factor;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("demodulation", TORCH_BOX(&demodulation));
  m.impl("demodulation_factor", TORCH_BOX(&demodulation_factor));
}

}  // namespace fastgan
