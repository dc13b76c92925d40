#include "epilogue.h"

#include "simd.h"

namespace fastgan {
namespace {

template <Act A, bool kPerElement, bool kNoise, typename C>
FASTGAN_INLINE void epilogue_loop(const EpilogueBlock<C>& b) {
  // Copies: a store through y could otherwise change what b refers to, and every value would be loaded again.
  const C *const c = b.c, *const scale = b.scale, *const shift = b.shift, *const noise = b.noise;
  C* const y = b.y;
  const C strength = b.strength, alpha = b.alpha, gain = b.gain, clamp = b.clamp, scale0 = scale[0], shift0 = shift[0];
  const int64_t n = b.n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    C z = c[i] * (kPerElement ? scale[i] : scale0) + (kPerElement ? shift[i] : shift0);
    if constexpr (kNoise) z += strength * noise[i];
    const C v = act_value<A>(z, alpha) * gain;
    // In this form, and not with min and max, a NaN passes.
    y[i] = v > clamp ? clamp : (v < -clamp ? -clamp : v);
  }
}

template <typename C>
FASTGAN_INLINE void epilogue_any(const EpilogueBlock<C>& b, bool per_element) {
  dispatch_act(b.act, [&]<Act A>() FASTGAN_LAMBDA_INLINE {
    if (per_element) {
      epilogue_loop<A, true, false>(b);
    } else if (b.noise) {
      epilogue_loop<A, false, true>(b);
    } else {
      epilogue_loop<A, false, false>(b);
    }
  });
}

template <Act A, bool kNoise>
FASTGAN_INLINE void rows_loop(const EpilogueRows& rows) {
  const float alpha = rows.alpha, gain = rows.gain, clamp = rows.clamp, strength = rows.strength;
  const float* __restrict__ const noise = rows.noise;
  const int64_t n = rows.n;
  for (int64_t r = 0; r < rows.rows; ++r) {
    const float* __restrict__ const c = rows.c + r * rows.stride;
    float* __restrict__ const y = rows.y + r * rows.plane;
    const float scale = rows.scale[r], shift = rows.shift[r];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      float z = c[i] * scale + shift;
      if constexpr (kNoise) z += strength * noise[i];
      const float v = act_value<A>(z, alpha) * gain;
      y[i] = v > clamp ? clamp : (v < -clamp ? -clamp : v);
    }
  }
}

template <Act A, bool kNoise, bool kStream>
FASTGAN_INLINE void group_loop(const EpilogueGroup& g) {
  const float alpha = g.alpha, gain = g.gain, clamp = g.clamp, strength = g.strength;
  const float* __restrict__ const scale = g.scale, * __restrict__ const shift = g.shift;
  const int64_t n = g.n, stride = g.stride, step = g.step, ahead = g.ahead;
  for (int64_t p = 0; p < n; ++p) {
    const float* __restrict__ const c = g.c + p * stride;
    float* const pixel = g.y + p * step * kGroup;
    alignas(64) float line[kGroup];
    float* __restrict__ const y = kStream ? line : pixel;
    const float plus = kNoise ? strength * g.noise[p * step] : 0.0f;
    if constexpr (!kStream) __builtin_prefetch(pixel + ahead, 1);
#pragma omp simd
    for (int64_t i = 0; i < kGroup; ++i) {
      float z = c[i] * scale[i] + shift[i];
      if constexpr (kNoise) z += plus;
      const float v = act_value<A>(z, alpha) * gain;
      y[i] = v > clamp ? clamp : (v < -clamp ? -clamp : v);
    }
    if constexpr (kStream) stream_line(line, pixel);
  }
}

template <typename C>
FASTGAN_INLINE void axpy_loop(C a, const C* __restrict__ x, C* __restrict__ y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

}  // namespace

FASTGAN_MULTIVERSION void epilogue_block(const EpilogueBlock<float>& b, bool per_element) {
  epilogue_any(b, per_element);
}
void epilogue_block(const EpilogueBlock<double>& b, bool per_element) { epilogue_any(b, per_element); }

FASTGAN_MULTIVERSION void epilogue_rows(const EpilogueRows& rows) {
  dispatch_act(rows.act, [&]<Act A>() FASTGAN_LAMBDA_INLINE {
    if (rows.noise) {
      rows_loop<A, true>(rows);
    } else {
      rows_loop<A, false>(rows);
    }
  });
  if (!rows.residual) return;
  for (int64_t r = 0; r < rows.rows; ++r) {
    axpy_loop(rows.residual_gain, rows.residual + r * rows.plane, rows.y + r * rows.plane, rows.n);
  }
}

FASTGAN_MULTIVERSION void epilogue_group(const EpilogueGroup& g) {
  dispatch_act(g.act, [&]<Act A>() FASTGAN_LAMBDA_INLINE {
    if (g.stream) {
      g.noise ? group_loop<A, true, true>(g) : group_loop<A, false, true>(g);
    } else {
      g.noise ? group_loop<A, true, false>(g) : group_loop<A, false, false>(g);
    }
  });
}

FASTGAN_MULTIVERSION void axpy(float a, const float* x, float* y, int64_t n) { axpy_loop(a, x, y, n); }
void axpy(double a, const double* x, double* y, int64_t n) { axpy_loop(a, x, y, n); }

}  // namespace fastgan
