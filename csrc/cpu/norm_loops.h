// The loops of norm_act over blocks that fit the first-level cache, one compilation per instruction set.
//
// With u = (x - mean) * rstd and z = u * weight + bias, of one run of a single channel or of rows of several channels:
//
//   forward      y = gain * act(z)
//   cotangent    g = gy * gain * act'(z)
//   slopes       slope = gain * act'(z), bend = gain * act''(z)
//
// The rest does not know the activation; norm_problem.h derives the coefficients.
#pragma once

#include "activation.h"

namespace fastgan {

// What a coefficient is for, in the order in which a block's coefficients lie.
enum NormCoefficient : int {
  kMean,
  kRstd,
  kShift,  // u = (x - mean) * rstd + shift: mean is rounded to the compute type, and shift makes up for that
  kWeight,
  kBias,
  kAffine,  // how many a forward needs
  // First order: gx = kGradG * g + kGradOne + kGradU * u.
  kGradG = kAffine,
  kGradOne,
  kGradU,
  kFirst,
  // Second order: q = kQH * h + kQOne + kQU * u, e = gy * bend * q, and
  // gx = kXE * e + kXG * g + kXH * h + kXOne + kXU * u.
  kQH = kAffine,
  kQOne,
  kQU,
  kXE,
  kXG,
  kXH,
  kXOne,
  kXU,
  kSecond,
};

// rows x n values. A planar block is one row of n values of one channel and has one lane: one value per coefficient and
// per sum. Else value i of a row belongs to lane i of `lanes`, of which a last row may have fewer.
template <typename C>
struct NormBlock {
  bool planar;
  int64_t rows, n, lanes;
  const C* coefficients;  // [kinds, lanes]
  C* sums;                // [kinds, lanes], added to
  Act act;
  C alpha, gain;
  const C *x, *gy, *h;
  C *g, *slope, *bend;
  C *out, *second_out;
};

#define FASTGAN_NORM_LOOP(name)         \
  void name(const NormBlock<float>& b); \
  void name(const NormBlock<double>& b);

namespace norm {
FASTGAN_NORM_LOOP(forward)       // x -> out
FASTGAN_NORM_LOOP(cotangent)     // x, gy -> g
FASTGAN_NORM_LOOP(slopes)        // x -> slope, bend
FASTGAN_NORM_LOOP(sum)           // sums of x
FASTGAN_NORM_LOOP(deviations)    // sums of d = x - mean and of d * d
FASTGAN_NORM_LOOP(first_sums)    // x, g -> sums of g, g * u
FASTGAN_NORM_LOOP(first_apply)   // x, g -> out = gx
FASTGAN_NORM_LOOP(second_sums)   // x, gy, slope, h -> sums of g, g * u, g * h, h, h * u, where g = gy * slope
FASTGAN_NORM_LOOP(bend_sums)     // x, gy, bend, h -> sums of e, e * u
FASTGAN_NORM_LOOP(second_apply)  // x, gy, slope, bend, h -> out = slope * q, second_out = gx
}  // namespace norm

#undef FASTGAN_NORM_LOOP

}  // namespace fastgan
