// Winograd's minimal filtering F(m x m, r x r): m x m results of an r x r correlation from t x t products, t = m + r
// - 1.
//
//   Y = A^T [ (G g G^T) (.) (B^T d B) ] A
//
// The matrices are those of Toom-Cook interpolation at t - 1 points p and infinity: A^T[j][i] = p_i^j,
// G[i][j] = p_i^j / prod_{k != i} (p_i - p_k), row i of B^T holds the coefficients of prod_{k != i} (x - p_k), and the
// last column of A^T and the last rows of G and B^T stand for infinity.
//
// Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks"; Barabasz et al. 2020, "Error
// Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", for the points of F(4, 3).
#pragma once

#include <cstdint>

namespace fastgan {

// The transforms of one size, for the instruction set chosen at run time. They work on whole registers of channels;
// `lines` of kGroup channels (channel_patch.h) hold at least `vectors` of them. Along an axis on which the kernel has a
// single tap there is nothing to save: m values instead of t, the matrices are 1.
//
// A tile's values and sums are far apart, more than a processor foresees. Where `next` is not 0, those of the tile that
// is transformed next, so far behind, are fetched meanwhile.
struct WinogradKernels {
  // to[xi * to_stride + c] = (B^T d B)[xi], d[i][j] = scale[c] * patch[i * row + j * column + c], of one tile; scale
  // may be null.
  void (*input)(const float* patch, int64_t row, int64_t column, const float* scale, int64_t vectors, float* to,
                int64_t to_stride, int64_t next);
  // to[xi * to_stride + c] = (G g G^T)[xi], g[k] = taps[positions[k] + c], for every tap.
  void (*weight)(const float* taps, const int64_t* positions, int64_t vectors, float* to, int64_t to_stride);
  // to[c * channel + a * row + b] = (A^T s A)[a][b], s[xi] = sums[xi * stride + c], for kGroup channels; and 0 for m <=
  // b < 4, which the tile to the right overwrites. Channels side by side (channel = 1) go to to[c + a * row + b *
  // kGroup].
  void (*output)(const float* sums, int64_t stride, int64_t next, float* to, int64_t channel, int64_t row);
};

// F(m x m, r x r), one of F(2,3), F(4,3), F(2,2), F(3,2); with r = 2 also for kernels of a single tap along an axis.
const WinogradKernels& winograd_kernels(int64_t m, int64_t r, bool single_y, bool single_x);

// The same for integers, which stay exact: a patch and taps hold whole numbers as floats; values and sums are integers,
// and weights are multiplied by `weight_factor`, which makes whole numbers of them.
struct WholeKernels {
  // `to`, `to_stride` and `next` count integers.
  void (*input)(const float* patch, int64_t row, int64_t column, int64_t vectors, int16_t* to, int64_t to_stride,
                int64_t next);
  void (*weight)(const float* taps, const int64_t* positions, int64_t vectors, float* to, int64_t to_stride);
  void (*output)(const int32_t* sums, int64_t stride, int64_t next, float* to, int64_t channel, int64_t row);
};

// F(m x m, r x r), one of F(1,2), F(2,2), F(3,2), F(1,3), F(2,3); those of m = 1 are the plain sums.
const WholeKernels& whole_kernels(int64_t m, int64_t r, bool single_y, bool single_x);

// How much of a whole number a transform makes at most, and what weights are multiplied by before.
struct WholeFactors {
  int64_t input, weight, weight_factor;
};
WholeFactors whole_factors(int64_t m, int64_t r);

// What the gradient of the weight needs beside WinogradKernels' `input`: dg = G^T [ sum over tiles of (A dY A^T) (.)
// (B^T d B) ] G.
struct WinogradGradKernels {
  // to[xi * to_stride + c] = (A d A^T)[xi], d[i][j] = patch[i * row + j * column + c], m x m of them.
  void (*cotangent)(const float* patch, int64_t row, int64_t column, int64_t vectors, float* to, int64_t to_stride);
  // to[k * to_stride + c] = (G^T s G)[k], s[i][j] = sums[i * row + j * column + c], for the r x r taps k.
  void (*taps)(const float* sums, int64_t row, int64_t column, int64_t vectors, float* to, int64_t to_stride);
};

// F(2 x 2, 3 x 3) for r = 3, F(3 x 3, 2 x 2) for r = 2: tiles of 4 x 4.
const WinogradGradKernels& winograd_grad_kernels(int64_t r);

}  // namespace fastgan
