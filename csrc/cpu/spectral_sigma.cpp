// spectral_sigma: power iteration of spectral normalisation for all layers of a network, one read of the weights per iteration.
//
// u <- n(W v), v <- n(W^T u), n(x) = x / max(|x|, eps): a row's dot product with v is final before the next row is read, so the row
// is added to W^T u at once, unnormalised, while it is in cache; both norms are divided out afterwards and sigma = u^T W v =
// |W^T u|^2 / max(|W^T u|, eps) needs no third product. The hook's order (v first) is the same with slabs of columns that stay in L2.
//
// Chunks of rows (columns) depend on the shapes alone and their partial sums are added in order: the number of threads changes nothing.
// Source: Miyato et al., Spectral Normalization for GANs (2018), algorithm 1.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>

#include "common.h"

namespace fastgan {
namespace {

// Elements of a chunk: 256 KB of float32, some 25 us of reading, several times what its partial vector and its dispatch cost.
constexpr int64_t kChunkElements = 65536;
// Partial vectors are added serially per layer: 64 of them are still small beside the weight and enough for as many threads.
constexpr int64_t kMaxChunks = 64;
// A slab of columns or a packed group of rows is read twice, the second time from L2; half of a small L2 (512 KB).
constexpr int64_t kCacheBytes = 256 * 1024;
// Below this many elements in all, a fork and join costs more than a second thread saves.
constexpr int64_t kSerialElements = 32768;
constexpr int64_t kLineBytes = 64;

// ---- inner loops, compiled per instruction set ----------------------------------------------------------------------------------

// y[r] = sum_c w[r, c] x[c] for rows of stride ld; four rows share each load of x.
template <typename C>
FASTGAN_INLINE void dot_rows_body(const C* __restrict__ w,  // [rows, columns]
                                  int64_t ld, int64_t rows, int64_t columns, const C* __restrict__ x, C* __restrict__ y) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const C *w0 = w + r * ld, *w1 = w0 + ld, *w2 = w1 + ld, *w3 = w2 + ld;
    C y0 = 0, y1 = 0, y2 = 0, y3 = 0;
#pragma omp simd reduction(+ : y0, y1, y2, y3)
    for (int64_t c = 0; c < columns; ++c) {
      y0 += w0[c] * x[c];
      y1 += w1[c] * x[c];
      y2 += w2[c] * x[c];
      y3 += w3[c] * x[c];
    }
    y[r] = y0, y[r + 1] = y1, y[r + 2] = y2, y[r + 3] = y3;
  }
  for (; r < rows; ++r) {
    const C* row = w + r * ld;
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < columns; ++c) {
      sum += row[c] * x[c];
    }
    y[r] = sum;
  }
}

// y[c] += sum_r x[r] w[r, c]; four rows share each load and store of y.
template <typename C>
FASTGAN_INLINE void add_rows_body(const C* __restrict__ w,  // [rows, columns]
                                  int64_t ld, int64_t rows, int64_t columns, const C* __restrict__ x, C* __restrict__ y) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const C *w0 = w + r * ld, *w1 = w0 + ld, *w2 = w1 + ld, *w3 = w2 + ld;
    const C x0 = x[r], x1 = x[r + 1], x2 = x[r + 2], x3 = x[r + 3];
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      y[c] += (x0 * w0[c] + x1 * w1[c]) + (x2 * w2[c] + x3 * w3[c]);
    }
  }
  for (; r < rows; ++r) {
    const C* row = w + r * ld;
    const C scale = x[r];
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      y[c] += scale * row[c];
    }
  }
}

// target[r, c] = source[r * row_stride + c * stride] for a run of `columns` columns; the smaller stride is walked innermost.
template <typename T>
FASTGAN_INLINE void pack_run_body(const T* __restrict__ source, int64_t row_stride, int64_t stride, int64_t rows, int64_t columns,
                                  accumulate_t<T>* __restrict__ target, int64_t ld) {
  if (stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        target[r * ld + c] = static_cast<accumulate_t<T>>(source[r * row_stride + c]);
      }
    }
    return;
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      target[r * ld + c] = static_cast<accumulate_t<T>>(source[r * row_stride + c * stride]);
    }
  }
}

// target[r, c] = x[r] y[c], the outer product that is sigma's gradient.
template <typename T>
FASTGAN_INLINE void outer_body(const accumulate_t<T>* __restrict__ x, int64_t rows, const accumulate_t<T>* __restrict__ y,
                               int64_t columns, accumulate_t<T> scale, T* __restrict__ target) {
  for (int64_t r = 0; r < rows; ++r) {
    const accumulate_t<T> factor = scale * x[r];
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      target[r * columns + c] = static_cast<T>(factor * y[c]);
    }
  }
}

#define FASTGAN_SIGMA_COMPUTE(C)                                                                                          \
  FASTGAN_MULTIVERSION void dot_rows(const C* w, int64_t ld, int64_t rows, int64_t columns, const C* x, C* y) {           \
    dot_rows_body(w, ld, rows, columns, x, y);                                                                            \
  }                                                                                                                       \
  FASTGAN_MULTIVERSION void add_rows(const C* w, int64_t ld, int64_t rows, int64_t columns, const C* x, C* y) {           \
    add_rows_body(w, ld, rows, columns, x, y);                                                                            \
  }
#define FASTGAN_SIGMA_STORAGE(T)                                                                                          \
  FASTGAN_MULTIVERSION void pack_run(const T* source, int64_t row_stride, int64_t stride, int64_t rows, int64_t columns,  \
                                     accumulate_t<T>* target, int64_t ld) {                                               \
    pack_run_body(source, row_stride, stride, rows, columns, target, ld);                                                 \
  }                                                                                                                       \
  FASTGAN_MULTIVERSION void outer(const accumulate_t<T>* x, int64_t rows, const accumulate_t<T>* y, int64_t columns,      \
                                  accumulate_t<T> scale, T* target) {                                                     \
    outer_body(x, rows, y, columns, scale, target);                                                                       \
  }
FASTGAN_SIGMA_COMPUTE(float)
FASTGAN_SIGMA_COMPUTE(double)
FASTGAN_SIGMA_STORAGE(float)
FASTGAN_SIGMA_STORAGE(double)
FASTGAN_SIGMA_STORAGE(BFloat16)
FASTGAN_SIGMA_STORAGE(Half)
#undef FASTGAN_SIGMA_COMPUTE
#undef FASTGAN_SIGMA_STORAGE

// ---- one layer ------------------------------------------------------------------------------------------------------------------

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Axis {
  int64_t size, stride, position;
};

// A weight as a matrix whose columns are numbered in the order of memory, whatever the strides: column m = outer * run + k lies at
// outer_offsets[outer] + k * run_stride from the row's start. `logical[m]` is its number in torch's flattening; empty if the same.
template <typename T>
struct Matrix {
  using C = accumulate_t<T>;
  const T* data;
  int64_t rows, columns, row_stride, run, run_stride;
  std::vector<int64_t> outer_offsets, logical;

  Matrix(const Tensor& weight, int64_t dim) : data(static_cast<const T*>(weight.const_data_ptr())) {
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
    run = 1, run_stride = 1;
    while (!axes.empty() && (run == 1 || axes.back().stride == run * run_stride)) {
      run_stride = run == 1 ? axes.back().stride : run_stride;
      run *= axes.back().size;
      axes.pop_back();
    }
    outer_offsets = offsets(axes, &Axis::stride);
  }

  // The matrix can be used where it lies: no conversion, unit stride along a row.
  bool direct() const { return std::is_same_v<T, C> && outer_offsets.size() == 1 && run_stride == 1; }

  // Rows that are packed together: rows that share cache lines, and at least 256 contiguous bytes where rows interleave.
  int64_t group() const {
    if (outer_offsets.size() == 1 && run_stride == 1) {
      return 4;
    }
    const int64_t row_bytes = std::abs(row_stride) * static_cast<int64_t>(sizeof(T));
    int64_t group = 4;
    while (group < 32 && (group * row_bytes % kLineBytes != 0 || group * row_bytes < 4 * kLineBytes)) {
      group += 4;
    }
    return group;
  }

  // Rows [r0, r1), columns [c0, c1) as a row-major tile: in place, or packed into `scratch`.
  const C* tile(int64_t r0, int64_t r1, int64_t c0, int64_t c1, C* scratch, int64_t* ld) const {
    if constexpr (std::is_same_v<T, C>) {
      if (direct()) {
        *ld = row_stride;
        return data + r0 * row_stride + c0;
      }
    }
    *ld = c1 - c0;
    for (int64_t c = c0; c < c1;) {
      const int64_t k = c % run;
      const int64_t count = std::min(run - k, c1 - c);
      pack_run(data + r0 * row_stride + outer_offsets[c / run] + k * run_stride, row_stride, run_stride, r1 - r0, count,
               scratch + (c - c0), *ld);
      c += count;
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

enum class Pass { kRead, kRowsFirst, kColumnsFirst };

// One layer under iteration. `first` is complete after a pass over the weight (W v, or W^T u for columns first); the other
// product is the sum of `partials`, one vector per chunk, both unnormalised.
template <typename T>
struct Layer {
  using C = accumulate_t<T>;
  Matrix<T> matrix;
  int64_t chunk, chunks, slab;
  C *u, *v, *first, *partials;  // v has the matrix's column order

  Layer(const Tensor& weight, int64_t dim, Pass pass) : matrix(weight, dim) {
    const int64_t rows = matrix.rows, columns = matrix.columns;
    const bool by_rows = pass != Pass::kColumnsFirst;
    const int64_t extent = by_rows ? rows : columns, other = by_rows ? columns : rows;
    const int64_t line = kLineBytes / static_cast<int64_t>(sizeof(C));
    slab = by_rows ? matrix.group() : std::clamp(kCacheBytes / static_cast<int64_t>(sizeof(C)) / rows / line * line, line, 64 * line);
    chunk = round_up(std::max({kChunkElements / other, extent / kMaxChunks, int64_t{1}}), by_rows ? round_up(32, slab) : slab);
    chunks = (extent + chunk - 1) / chunk;
    partial_size = pass == Pass::kRead ? 1 : other;
    by_rows_ = by_rows;
  }

  int64_t scratch_size() const { return matrix.rows + matrix.columns + std::max(matrix.rows, matrix.columns) + chunks * partial_size; }

  void place(C* memory) {
    u = memory;
    v = u + matrix.rows;
    first = v + matrix.columns;
    partials = first + std::max(matrix.rows, matrix.columns);
  }

  void load(const Tensor& u_in, const Tensor& v_in) {
    std::memcpy(u, u_in.const_data_ptr(), matrix.rows * sizeof(C));
    const C* source = static_cast<const C*>(v_in.const_data_ptr());
    for (int64_t m = 0; m < matrix.columns; ++m) {
      v[m] = source[matrix.logical.empty() ? m : matrix.logical[m]];
    }
  }

  void store(C* u_out, C* v_out) const {
    std::memcpy(u_out, u, matrix.rows * sizeof(C));
    for (int64_t m = 0; m < matrix.columns; ++m) {
      v_out[matrix.logical.empty() ? m : matrix.logical[m]] = v[m];
    }
  }

  // Everything that one chunk of rows or columns needs, with its part of the weight read once.
  void run_chunk(int64_t index, Pass pass) {
    C* partial = partials + index * partial_size;
    std::fill(partial, partial + partial_size, C(0));
    const int64_t extent = by_rows_ ? matrix.rows : matrix.columns, other = by_rows_ ? matrix.columns : matrix.rows;
    std::unique_ptr<C[]> packed(matrix.direct() ? nullptr : new C[slab * other]);
    const int64_t end = std::min(extent, (index + 1) * chunk);
    for (int64_t begin = index * chunk; begin < end; begin += slab) {
      const int64_t stop = std::min(end, begin + slab);
      int64_t ld = 0;
      if (by_rows_) {
        const C* w = matrix.tile(begin, stop, 0, other, packed.get(), &ld);
        dot_rows(w, ld, stop - begin, other, v, first + begin);
        if (pass == Pass::kRead) {
          dot_rows(first + begin, 0, 1, stop - begin, u + begin, first + begin);
          *partial += first[begin];
        } else {
          add_rows(w, ld, stop - begin, other, first + begin, partial);
        }
      } else {
        const C* w = matrix.tile(0, other, begin, stop, packed.get(), &ld);
        std::fill(first + begin, first + stop, C(0));
        add_rows(w, ld, other, stop - begin, u, first + begin);
        for (int64_t r = 0; r < other; r += kDotRows) {
          const int64_t count = std::min(kDotRows, other - r);
          C sums[kDotRows];
          dot_rows(w + r * ld, ld, count, stop - begin, first + begin, sums);
          for (int64_t i = 0; i < count; ++i) {
            partial[r + i] += sums[i];
          }
        }
      }
    }
  }

  // Adds the partials in order, normalises both vectors and returns sigma.
  C finish(Pass pass, double eps) {
    if (pass == Pass::kRead) {
      double sigma = 0;
      for (int64_t i = 0; i < chunks; ++i) {
        sigma += partials[i];
      }
      return static_cast<C>(sigma);
    }
    C* second = by_rows_ ? v : u;
    const C first_norm = normalise(first, by_rows_ ? matrix.rows : matrix.columns, eps, by_rows_ ? u : v).second;
    for (int64_t i = 1; i < chunks; ++i) {
      for (int64_t c = 0; c < partial_size; ++c) {
        partials[c] += partials[i * partial_size + c];
      }
    }
    for (int64_t c = 0; c < partial_size; ++c) {
      partials[c] /= first_norm;
    }
    const auto [squares, norm] = normalise(partials, partial_size, eps, second);
    return static_cast<C>(squares / norm);
  }

 private:
  static constexpr int64_t kDotRows = 64;
  int64_t partial_size;
  bool by_rows_;

  // y = x / max(|x|, eps); returns |x|^2 and the divisor. Summed in double: |x|^2 of float32 neither overflows nor vanishes there.
  static std::pair<double, double> normalise(const C* x, int64_t size, double eps, C* y) {
    double squares = 0;
    for (int64_t i = 0; i < size; ++i) {
      squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
    const double norm = std::sqrt(squares);
    // Written so that a NaN norm stays NaN, as in torch.
    const double divisor = norm < eps ? eps : norm;
    for (int64_t i = 0; i < size; ++i) {
      y[i] = x[i] / static_cast<C>(divisor);
    }
    return {squares, divisor};
  }
};

// ---- ops ------------------------------------------------------------------------------------------------------------------------

// Calls f(i) for every i < count; threads take the next index when they are done, so unequal tasks balance.
template <typename F>
void for_each_task(int64_t count, bool parallel, const F& f) {
  std::atomic<int64_t> next{0};
  const auto worker = [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      f(i);
    }
  };
  if (parallel) {
    torch::stable::parallel_for(0, count, 1, worker);
  } else {
    worker(0, count);
  }
}

template <typename T>
void iterate(std::vector<Layer<T>>& layers, int64_t n_iter, Pass pass, double eps, accumulate_t<T>* sigma) {
  std::vector<std::pair<int64_t, int64_t>> tasks;
  int64_t elements = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    elements += layers[i].matrix.rows * layers[i].matrix.columns;
    for (int64_t index = 0; index < layers[i].chunks; ++index) {
      tasks.emplace_back(i, index);
    }
  }
  const bool parallel = elements >= kSerialElements;
  for (int64_t iteration = 0; iteration < std::max(n_iter, int64_t{1}); ++iteration) {
    for_each_task(tasks.size(), parallel, [&](int64_t i) { layers[tasks[i].first].run_chunk(tasks[i].second, pass); });
    for_each_task(layers.size(), parallel, [&](int64_t i) { sigma[i] = layers[i].finish(pass, eps); });
  }
}

std::tuple<Tensor, Tensor, Tensor> spectral_sigma(std::vector<Tensor> weights, std::vector<Tensor> us, std::vector<Tensor> vs,
                                                  int64_t n_iter, bool hook, double eps, std::vector<int64_t> dims) {
  const Pass pass = n_iter == 0 ? Pass::kRead : (hook ? Pass::kColumnsFirst : Pass::kRowsFirst);
  const int64_t count = static_cast<int64_t>(weights.size());
  return dispatch_dtype("spectral_sigma", weights[0].scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    std::vector<Layer<T>> layers;
    layers.reserve(count);
    int64_t rows = 0, columns = 0, memory_size = 0;
    for (int64_t i = 0; i < count; ++i) {
      layers.emplace_back(weights[i], dims[i], pass);
      rows += layers[i].matrix.rows;
      columns += layers[i].matrix.columns;
      memory_size += layers[i].scratch_size();
    }
    std::unique_ptr<C[]> memory(new C[memory_size]);
    C* free = memory.get();
    for (int64_t i = 0; i < count; ++i) {
      layers[i].place(free);
      free += layers[i].scratch_size();
      layers[i].load(torch::stable::contiguous(us[i]), torch::stable::contiguous(vs[i]));
    }
    Tensor sigma = torch::stable::new_empty(us[0], {count});
    Tensor u = torch::stable::new_empty(us[0], {rows});
    Tensor v = torch::stable::new_empty(us[0], {columns});
    iterate(layers, n_iter, pass, eps, static_cast<C*>(sigma.mutable_data_ptr()));
    C* u_out = static_cast<C*>(u.mutable_data_ptr());
    C* v_out = static_cast<C*>(v.mutable_data_ptr());
    for (const Layer<T>& layer : layers) {
      layer.store(u_out, v_out);
      u_out += layer.matrix.rows;
      v_out += layer.matrix.columns;
    }
    return std::make_tuple(sigma, u, v);
  });
}

// grads[i] [outer, rows, inner] = grad_sigma[l] u_l[r] v_l[outer, inner] for each layer l = needed[i]; nothing for the others.
std::vector<Tensor> spectral_sigma_bwd(Tensor grad_sigma, Tensor u, Tensor v, std::vector<int64_t> blocks,
                                       std::vector<int64_t> needed, ScalarType dtype) {
  struct Block {
    int64_t outer, rows, inner, u_offset, v_offset;
  };
  std::vector<Block> layers;
  int64_t u_offset = 0, v_offset = 0;
  for (size_t i = 0; i < blocks.size(); i += 3) {
    layers.push_back({blocks[i], blocks[i + 1], blocks[i + 2], u_offset, v_offset});
    u_offset += blocks[i + 1];
    v_offset += blocks[i] * blocks[i + 2];
  }
  grad_sigma = torch::stable::contiguous(grad_sigma);
  u = torch::stable::contiguous(u);
  v = torch::stable::contiguous(v);
  return dispatch_dtype("spectral_sigma_bwd", dtype, [&]<typename T>() {
    using C = accumulate_t<T>;
    std::vector<Tensor> grads;
    for (const int64_t i : needed) {
      const Block b = layers[i];
      grads.push_back(torch::stable::new_empty(u, {b.outer, b.rows, b.inner}, dtype));
      T* target = static_cast<T*>(grads.back().mutable_data_ptr());
      const C* u_data = static_cast<const C*>(u.const_data_ptr()) + b.u_offset;
      const C* v_data = static_cast<const C*>(v.const_data_ptr()) + b.v_offset;
      const C scale = static_cast<const C*>(grad_sigma.const_data_ptr())[i];
      // One row of one outer block is the unit: [outer, rows] flattened, so that transposed weights parallelise as well.
      torch::stable::parallel_for(0, b.outer * b.rows, std::max<int64_t>(1, kGrainElements / b.inner), [=](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t block = begin / b.rows, row = begin % b.rows;
          const int64_t rows = std::min(b.rows - row, end - begin);
          outer(u_data + row, rows, v_data + block * b.inner, b.inner, scale, target + begin * b.inner);
          begin += rows;
        }
      });
    }
    return grads;
  });
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("spectral_sigma", TORCH_BOX(&fastgan::spectral_sigma));
  m.impl("spectral_sigma_bwd", TORCH_BOX(&fastgan::spectral_sigma_bwd));
}
