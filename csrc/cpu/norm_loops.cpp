#include "norm_loops.h"

namespace fastgan {
namespace {

// One coefficient: a constant of a planar block, else a value per lane. Copied into the loop's frame: a store could
// otherwise change what the block refers to, and every value would be loaded again.
template <bool kPlanar, typename C>
struct Coefficient {
  const C* lanes;
  C value;
  FASTGAN_INLINE Coefficient(const NormBlock<C>& b, NormCoefficient which)
      : lanes(b.coefficients + which * b.lanes), value(*lanes) {}
  FASTGAN_INLINE C operator[](int64_t i) const { return kPlanar ? value : lanes[i]; }
};

template <bool kPlanar, typename C>
struct Normalised {
  Coefficient<kPlanar, C> mean, rstd, shift;
  FASTGAN_INLINE explicit Normalised(const NormBlock<C>& b) : mean(b, kMean), rstd(b, kRstd), shift(b, kShift) {}
  FASTGAN_INLINE C operator()(C x, int64_t i) const { return (x - mean[i]) * rstd[i] + shift[i]; }
};

// f(lane, index) for every value.
template <typename C, typename F>
FASTGAN_INLINE void for_each(const NormBlock<C>& b, F&& f) {
  const int64_t rows = b.rows, n = b.n;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) f(i, first + i);
  }
}

template <typename C>
struct Terms {
  C a = 0, b = 0, c = 0, d = 0, e = 0;
};

// Adds the first kCount of f(lane, index)'s terms to the sums.
template <bool kPlanar, int kCount, typename C, typename F>
FASTGAN_INLINE void accumulate(const NormBlock<C>& block, F&& f) {
  const int64_t rows = block.rows, n = block.n;
  C *const sum_a = block.sums, *const sum_b = sum_a + block.lanes, *const sum_c = sum_b + block.lanes,
           *const sum_d = sum_c + block.lanes, *const sum_e = sum_d + block.lanes;
  if constexpr (kPlanar) {
    C a = 0, b = 0, c = 0, d = 0, e = 0;
#pragma omp simd reduction(+ : a, b, c, d, e)
    for (int64_t i = 0; i < n; ++i) {
      const Terms<C> t = f(i, i);
      a += t.a, b += t.b, c += t.c, d += t.d, e += t.e;
    }
    *sum_a += a;
    if constexpr (kCount > 1) *sum_b += b;
    if constexpr (kCount > 2) *sum_c += c, *sum_d += d, *sum_e += e;
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Terms<C> t = f(i, first + i);
      sum_a[i] += t.a;
      if constexpr (kCount > 1) sum_b[i] += t.b;
      if constexpr (kCount > 2) sum_c[i] += t.c, sum_d[i] += t.d, sum_e[i] += t.e;
    }
  }
}

// act'(z) and what the activation itself gives; relu and lrelu have their slope from z, whatever the sign of alpha.
template <Act A, typename C>
FASTGAN_INLINE C slope_at(C z, C t, C alpha) {
  constexpr bool kPiecewise = A == Act::kRelu || A == Act::kLrelu;
  return act_slope<A>(kPiecewise ? z : t, z, alpha);
}

template <Act A, bool kPlanar, typename C>
FASTGAN_INLINE void forward_loop(const NormBlock<C>& b) {
  const Normalised<kPlanar, C> u(b);
  const Coefficient<kPlanar, C> weight(b, kWeight), bias(b, kBias);
  const C* const x = b.x;
  C* const y = b.out;
  const C alpha = b.alpha, gain = b.gain;
  for_each(b, [=](int64_t i, int64_t at)
                  FASTGAN_LAMBDA_INLINE { y[at] = gain * act_value<A>(u(x[at], i) * weight[i] + bias[i], alpha); });
}

template <Act A, bool kPlanar, typename C>
FASTGAN_INLINE void cotangent_loop(const NormBlock<C>& b) {
  const Normalised<kPlanar, C> u(b);
  const Coefficient<kPlanar, C> weight(b, kWeight), bias(b, kBias);
  const C *const x = b.x, *const gy = b.gy;
  C* const g = b.g;
  const C alpha = b.alpha, gain = b.gain;
  for_each(b, [=](int64_t i, int64_t at) FASTGAN_LAMBDA_INLINE {
    const C z = u(x[at], i) * weight[i] + bias[i];
    g[at] = gy[at] * (gain * slope_at<A>(z, act_value<A>(z, alpha), alpha));
  });
}

template <Act A, bool kPlanar, typename C>
FASTGAN_INLINE void slopes_loop(const NormBlock<C>& b) {
  const Normalised<kPlanar, C> u(b);
  const Coefficient<kPlanar, C> weight(b, kWeight), bias(b, kBias);
  const C* const x = b.x;
  C *const slope = b.slope, *const bend = b.bend;
  const C alpha = b.alpha, gain = b.gain;
  for_each(b, [=](int64_t i, int64_t at) FASTGAN_LAMBDA_INLINE {
    const C z = u(x[at], i) * weight[i] + bias[i], t = act_value<A>(z, alpha), first = slope_at<A>(z, t, alpha);
    constexpr bool kCurved = A != Act::kLinear && A != Act::kRelu && A != Act::kLrelu;
    slope[at] = gain * first;
    if constexpr (kCurved) bend[at] = gain * act_bend<A>(t, z) * (A == Act::kSwish ? C(1) : first);
    if constexpr (!kCurved) bend[at] = C(0);
  });
}

template <bool kPlanar, typename C>
FASTGAN_INLINE void sum_loop(const NormBlock<C>& b) {
  const C* const x = b.x;
  if constexpr (!kPlanar) {
    accumulate<kPlanar, 1>(b, [=](int64_t, int64_t at) FASTGAN_LAMBDA_INLINE { return Terms<C>{x[at]}; });
    return;
  }
  constexpr int64_t kShort = 512;
  if (b.n < kShort) {
    C s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < b.n; ++i) s += x[i];
    *b.sums += s;
    return;
  }
  // Four sums side by side: one addition alone waits for the one before it. To add up their lanes costs more than that
  // for a short row.
  const int64_t quarter = b.n / 4;
  const C *const x1 = x + quarter, *const x2 = x1 + quarter, *const x3 = x2 + quarter;
  C s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < quarter; ++i) s0 += x[i], s1 += x1[i], s2 += x2[i], s3 += x3[i];
  for (int64_t i = 4 * quarter; i < b.n; ++i) s0 += x[i];
  *b.sums += (s0 + s1) + (s2 + s3);
}

template <bool kPlanar, typename C>
FASTGAN_INLINE void deviations_loop(const NormBlock<C>& b) {
  const Coefficient<kPlanar, C> mean(b, kMean);
  const C* const x = b.x;
  accumulate<kPlanar, 2>(b, [=](int64_t i, int64_t at) FASTGAN_LAMBDA_INLINE {
    const C d = x[at] - mean[i];
    return Terms<C>{d, d * d};
  });
}

template <bool kPlanar, typename C>
FASTGAN_INLINE void first_sums_loop(const NormBlock<C>& b) {
  const Normalised<kPlanar, C> u(b);
  const C *const x = b.x, *const g = b.g;
  accumulate<kPlanar, 2>(
      b, [=](int64_t i, int64_t at) FASTGAN_LAMBDA_INLINE { return Terms<C>{g[at], g[at] * u(x[at], i)}; });
}

template <bool kPlanar, typename C>
FASTGAN_INLINE void first_apply_loop(const NormBlock<C>& b) {
  const Normalised<kPlanar, C> u(b);
  const Coefficient<kPlanar, C> by_g(b, kGradG), one(b, kGradOne), by_u(b, kGradU);
  const C *const x = b.x, *const g = b.g;
  C* const gx = b.out;
  for_each(b, [=](int64_t i, int64_t at)
                  FASTGAN_LAMBDA_INLINE { gx[at] = by_g[i] * g[at] + (by_u[i] * u(x[at], i) + one[i]); });
}

template <bool kPlanar, typename C>
FASTGAN_INLINE void second_sums_loop(const NormBlock<C>& b) {
  const Normalised<kPlanar, C> u(b);
  const C *const x = b.x, *const gy = b.gy, *const slope = b.slope, *const h = b.h;
  accumulate<kPlanar, 5>(b, [=](int64_t i, int64_t at) FASTGAN_LAMBDA_INLINE {
    const C g = gy[at] * slope[at], at_u = u(x[at], i);
    return Terms<C>{g, g * at_u, g * h[at], h[at], h[at] * at_u};
  });
}

template <bool kPlanar, typename C>
FASTGAN_INLINE void bend_sums_loop(const NormBlock<C>& b) {
  const Normalised<kPlanar, C> u(b);
  const Coefficient<kPlanar, C> by_h(b, kQH), one(b, kQOne), by_u(b, kQU);
  const C *const x = b.x, *const gy = b.gy, *const bend = b.bend, *const h = b.h;
  accumulate<kPlanar, 2>(b, [=](int64_t i, int64_t at) FASTGAN_LAMBDA_INLINE {
    const C at_u = u(x[at], i), e = gy[at] * bend[at] * (by_h[i] * h[at] + (by_u[i] * at_u + one[i]));
    return Terms<C>{e, e * at_u};
  });
}

template <bool kPlanar, typename C>
FASTGAN_INLINE void second_apply_loop(const NormBlock<C>& b) {
  const Normalised<kPlanar, C> u(b);
  const Coefficient<kPlanar, C> q_h(b, kQH), q_one(b, kQOne), q_u(b, kQU);
  const Coefficient<kPlanar, C> x_e(b, kXE), x_g(b, kXG), x_h(b, kXH), x_one(b, kXOne), x_u(b, kXU);
  const C *const x = b.x, *const gy = b.gy, *const slope = b.slope, *const bend = b.bend, *const h = b.h;
  C *const grad_gy = b.out, *const grad_x = b.second_out;
  for_each(b, [=](int64_t i, int64_t at) FASTGAN_LAMBDA_INLINE {
    const C at_u = u(x[at], i), q = q_h[i] * h[at] + (q_u[i] * at_u + q_one[i]);
    const C g = gy[at] * slope[at], e = gy[at] * bend[at] * q;
    grad_gy[at] = slope[at] * q;
    grad_x[at] = x_e[i] * e + x_g[i] * g + x_h[i] * h[at] + (x_u[i] * at_u + x_one[i]);
  });
}

}  // namespace

namespace norm {

#define FASTGAN_NORM_ACT_LOOP(name)                                                                                    \
  template <typename C>                                                                                                \
  FASTGAN_INLINE void name##_any(const NormBlock<C>& b) {                                                              \
    dispatch_act(                                                                                                      \
        b.act, [&]<Act A>() FASTGAN_LAMBDA_INLINE { b.planar ? name##_loop<A, true>(b) : name##_loop<A, false>(b); }); \
  }                                                                                                                    \
  FASTGAN_MULTIVERSION void name(const NormBlock<float>& b) { name##_any(b); }                                         \
  void name(const NormBlock<double>& b) { name##_any(b); }

#define FASTGAN_NORM_LOOP(name)                               \
  FASTGAN_MULTIVERSION void name(const NormBlock<float>& b) { \
    b.planar ? name##_loop<true>(b) : name##_loop<false>(b);  \
  }                                                           \
  void name(const NormBlock<double>& b) { b.planar ? name##_loop<true>(b) : name##_loop<false>(b); }

FASTGAN_NORM_ACT_LOOP(forward)
FASTGAN_NORM_ACT_LOOP(cotangent)
FASTGAN_NORM_ACT_LOOP(slopes)
FASTGAN_NORM_LOOP(sum)
FASTGAN_NORM_LOOP(deviations)
FASTGAN_NORM_LOOP(first_sums)
FASTGAN_NORM_LOOP(first_apply)
FASTGAN_NORM_LOOP(second_sums)
FASTGAN_NORM_LOOP(bend_sums)
FASTGAN_NORM_LOOP(second_apply)

}  // namespace norm
}  // namespace fastgan
