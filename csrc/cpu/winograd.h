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

// The transforms of one size, for the instruction set chosen at run time. They work on whole registers of tiles.
struct WinogradKernels {
  int64_t m, r;

  // to[xi * to_stride + i] = (B^T d B)[xi], d[k] = patch[positions[k] + i], for t^2 positions and i < vectors * lanes.
  void (*input)(const float* patch, const int32_t* positions, int64_t vectors, float* to, int64_t to_stride);
  // to[xi * to_stride + i] = (G g G^T)[xi], g[k] = taps[k * stride + i], for r^2 taps.
  void (*weight)(const float* taps, int64_t stride, int64_t vectors, float* to, int64_t to_stride);
  // to[k * to_stride + i] = (A^T s A)[k], s[xi] = sums[xi * stride + i], for m^2 results.
  void (*output)(const float* sums, int64_t stride, int64_t vectors, float* to, int64_t to_stride);

  int64_t t() const { return m + r - 1; }
};

// F(m x m, r x r), one of F(2,3), F(4,3), F(2,2), F(3,2), F(4,2).
const WinogradKernels& winograd_kernels(int64_t m, int64_t r);

}  // namespace fastgan
