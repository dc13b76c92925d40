// A weight of any rank and strides as a matrix, and its tiles as row-major arrays: what kernels that multiply weights
// with vectors share.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common.h"

namespace fastgan {
namespace {

constexpr int64_t kLineBytes = 64;

// target[r, o * run + k] = source[r * row_stride + offsets[o] + k * stride] for o < outer, k < run: rows of any
// strides, packed.
template <typename T>
FASTGAN_INLINE void pack_body(const T* __restrict__ source, int64_t row_stride, const int64_t* __restrict__ offsets,
                              int64_t outer, int64_t run, int64_t stride, int64_t rows,
                              accumulate_t<T>* __restrict__ target, int64_t ld) {
  // Rows of a transposed convolution are short runs, pages apart, which no hardware prefetcher follows.
  constexpr int64_t kAhead = 8;
  constexpr int64_t kPrefetchBytes = 2048;
  for (int64_t o = 0; o < outer; ++o) {
    const T* block = source + offsets[o];
    if (o + kAhead < outer) {
      const char* ahead = reinterpret_cast<const char*>(source + offsets[o + kAhead]);
      const int64_t bytes = std::min<int64_t>((rows - 1) * row_stride + run, kPrefetchBytes / sizeof(T)) * sizeof(T);
      for (int64_t byte = 0; byte < bytes; byte += kLineBytes) {
        __builtin_prefetch(ahead + byte);
      }
    }
    accumulate_t<T>* out = target + o * run;
    for (int64_t r = 0; r < rows; ++r) {
      if (stride == 1) {
#pragma omp simd
        for (int64_t k = 0; k < run; ++k) {
          out[r * ld + k] = static_cast<accumulate_t<T>>(block[r * row_stride + k]);
        }
      } else {
        for (int64_t k = 0; k < run; ++k) {
          out[r * ld + k] = static_cast<accumulate_t<T>>(block[r * row_stride + k * stride]);
        }
      }
    }
  }
}

#define FASTGAN_PACK(T)                                                                                            \
  FASTGAN_MULTIVERSION void pack(const T* source, int64_t row_stride, const int64_t* offsets, int64_t outer,       \
                                 int64_t run, int64_t stride, int64_t rows, accumulate_t<T>* target, int64_t ld) { \
    pack_body(source, row_stride, offsets, outer, run, stride, rows, target, ld);                                  \
  }
FASTGAN_PACK(float)
FASTGAN_PACK(double)
FASTGAN_PACK(BFloat16)
FASTGAN_PACK(Half)
#undef FASTGAN_PACK

struct Axis {
  int64_t size, stride, position;
};

// A weight as a matrix in the order of memory, whatever its strides: row r starts at r * row_stride, column o * run + k
// lies at outer_offsets[o] + k * run_stride from there. If the weight's rows are closer together than its columns
// (channels_last transposed convolutions, W.t()), it is the transposed matrix that is described. `logical[m]` is the
// number in torch's flattening of the weight's column m in memory; empty if the same.
template <typename T>
struct WeightMatrix {
  using C = accumulate_t<T>;
  const T* data;
  int64_t rows, columns, row_stride, run = 1, run_stride = 1;
  bool transposed = false;
  std::vector<int64_t> outer_offsets, logical;

  WeightMatrix(const Tensor& weight, int64_t dim) : data(static_cast<const T*>(weight.const_data_ptr())) {
    std::vector<Axis> axes;
    rows = weight.size(dim);
    row_stride = weight.stride(dim);
    columns = weight.numel() / rows;
    int64_t position = columns;
    for (int64_t axis = 0; axis < weight.dim(); ++axis) {
      if (axis != dim && weight.size(axis) > 1) {
        position /= weight.size(axis);
        axes.push_back({weight.size(axis), weight.stride(axis), position});
      }
    }
    const auto by_stride = [](const Axis& a, const Axis& b) { return a.stride > b.stride; };
    if (!std::is_sorted(axes.begin(), axes.end(), by_stride)) {
      std::stable_sort(axes.begin(), axes.end(), by_stride);
      logical = offsets(axes, &Axis::position);
    }
    while (!axes.empty() && (run == 1 || axes.back().stride == run * run_stride)) {
      run_stride = run == 1 ? axes.back().stride : run_stride;
      run *= axes.back().size;
      axes.pop_back();
    }
    if (axes.empty() && rows > 1 && row_stride < run_stride) {
      transposed = true;
      columns = rows;
      std::swap(rows, run);
      std::swap(row_stride, run_stride);
    }
    outer_offsets = offsets(axes, &Axis::stride);
  }

  // Rows that one cache line never splits between groups, and at least 256 contiguous bytes where rows interleave.
  int64_t group() const {
    const int64_t row_bytes = row_stride * static_cast<int64_t>(sizeof(T));
    int64_t group = 4;
    while (outer_offsets.size() > 1 && group < 32 &&
           (group * row_bytes % kLineBytes != 0 || group * row_bytes < 4 * kLineBytes)) {
      group += 4;
    }
    return group;
  }

  // Columns that start a slab: a whole run where runs are apart.
  int64_t column_step() const { return outer_offsets.size() > 1 ? run : 1; }

  // Whether the matrix is used where it lies: no conversion, unit stride along a row.
  bool direct() const { return std::is_same_v<T, C> && outer_offsets.size() == 1 && run_stride == 1; }

  // Rows [r0, r1), columns [c0, c1) as a row-major tile: in place, or packed into `scratch`. c0 is a multiple of
  // column_step(), and so is c1 unless it is the end.
  const C* tile(int64_t r0, int64_t r1, int64_t c0, int64_t c1, C* scratch, int64_t* ld) const {
    if constexpr (std::is_same_v<T, C>) {
      if (direct()) {
        *ld = row_stride;
        return data + r0 * row_stride + c0;
      }
    }
    *ld = c1 - c0;
    const T* source = data + r0 * row_stride;
    if (outer_offsets.size() == 1) {
      pack(source + c0 * run_stride, row_stride, outer_offsets.data(), 1, c1 - c0, run_stride, r1 - r0, scratch, *ld);
    } else {
      pack(source, row_stride, outer_offsets.data() + c0 / run, (c1 - c0) / run, run, run_stride, r1 - r0, scratch,
           *ld);
    }
    return scratch;
  }

 private:
  // The value of every index tuple over `axes`, the last axis fastest: sum of index * axis.*field.
  static std::vector<int64_t> offsets(const std::vector<Axis>& axes, int64_t Axis::* field) {
    std::vector<int64_t> result{0};
    for (const Axis& axis : axes) {
      std::vector<int64_t> next;
      next.reserve(result.size() * axis.size);
      for (const int64_t base : result) {
        for (int64_t i = 0; i < axis.size; ++i) {
          next.push_back(base + i * (axis.*field));
        }
      }
      result.swap(next);
    }
    return result;
  }
};

}  // namespace
}  // namespace fastgan
