// spectral_sigma: power iteration of spectral normalisation for all layers of a network, one read of the weights per
// iteration.
//
// u <- n(W v), v <- n(W^T u), n(x) = x / max(|x|, eps): a row's dot product with v is final before the next row is
// read, so the row is added to W^T u at once, unnormalised, while it is in cache; both norms are divided out afterwards
// and sigma = u^T W v = |W^T u|^2 / max(|W^T u|, eps) needs no third product. The hook's order (v first) is the same
// with slabs of columns that stay in L2.
//
// Chunks of rows (columns) depend on the shapes alone and their partial sums are added in order: the number of threads
// changes nothing. Source: Miyato et al., Spectral Normalization for GANs (2018), algorithm 1.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "common.h"
#include "weight_matrix.h"

namespace fastgan {
namespace {

// Elements of a chunk: 256 KB of float32, some 25 us of reading, several times what its partial vector and its dispatch
// cost.
constexpr int64_t kChunkElements = 65536;
// Partial vectors are added serially per layer: 64 of them are still small beside the weight and enough for as many
// threads.
constexpr int64_t kMaxChunks = 64;
// A slab of columns or a packed group of rows is read twice, the second time from L2; half of a small L2 (512 KB).
constexpr int64_t kCacheBytes = 256 * 1024;
// Rows that are added up in one sum, before it is added to the chunk's: of a matrix of few columns a chunk has so many
// that one sum would lose a digit.
constexpr int64_t kSumRows = 512;
// Below this many elements in all, a fork and join costs more than a second thread saves.
constexpr int64_t kSerialElements = 32768;

// ---- inner loops, compiled per instruction set

// y[r] = sum_c w[r, c] x[c] for rows of stride ld; four rows share each load of x.
template <typename C>
FASTGAN_INLINE void dot_rows_body(const C* __restrict__ w,  // [rows, columns]
                                  int64_t ld, int64_t rows, int64_t columns, const C* __restrict__ x,
                                  C* __restrict__ y) {
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
                                  int64_t ld, int64_t rows, int64_t columns, const C* __restrict__ x,
                                  C* __restrict__ y) {
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

// target[r, c] = x[r] y[c], the outer product that is sigma's gradient.
template <typename T>
FASTGAN_INLINE void outer_body(const accumulate_t<T>* __restrict__ x, int64_t rows,
                               const accumulate_t<T>* __restrict__ y, int64_t columns, accumulate_t<T> scale,
                               T* __restrict__ target) {
  for (int64_t r = 0; r < rows; ++r) {
    const accumulate_t<T> factor = scale * x[r];
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      target[r * columns + c] = static_cast<T>(factor * y[c]);
    }
  }
}

#define FASTGAN_SIGMA_COMPUTE(C)                                                                                \
  FASTGAN_MULTIVERSION void dot_rows(const C* w, int64_t ld, int64_t rows, int64_t columns, const C* x, C* y) { \
    dot_rows_body(w, ld, rows, columns, x, y);                                                                  \
  }                                                                                                             \
  FASTGAN_MULTIVERSION void add_rows(const C* w, int64_t ld, int64_t rows, int64_t columns, const C* x, C* y) { \
    add_rows_body(w, ld, rows, columns, x, y);                                                                  \
  }
#define FASTGAN_SIGMA_STORAGE(T)                                                                                     \
  FASTGAN_MULTIVERSION void outer(const accumulate_t<T>* x, int64_t rows, const accumulate_t<T>* y, int64_t columns, \
                                  accumulate_t<T> scale, T* target) {                                                \
    outer_body(x, rows, y, columns, scale, target);                                                                  \
  }
FASTGAN_SIGMA_COMPUTE(float)
FASTGAN_SIGMA_COMPUTE(double)
FASTGAN_SIGMA_STORAGE(float)
FASTGAN_SIGMA_STORAGE(double)
FASTGAN_SIGMA_STORAGE(BFloat16)
FASTGAN_SIGMA_STORAGE(Half)
#undef FASTGAN_SIGMA_COMPUTE
#undef FASTGAN_SIGMA_STORAGE

// ---- one layer

// y = x / max(|x|, eps); returns |x|^2 and the divisor. Summed in double: |x|^2 of float32 neither overflows nor
// vanishes there.
template <typename C>
std::pair<double, double> normalise(const C* x, int64_t size, double eps, C* y) {
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

enum class Pass { kRead, kRowsFirst, kColumnsFirst };

// One layer under iteration. A pass over the matrix completes one product, `first` (M right for rows first, M^T left
// for columns first), while the other one is summed into `partials`, a vector per chunk; both are unnormalised until
// finish().
template <typename T>
class Layer {
 public:
  using C = accumulate_t<T>;

  Layer(const Tensor& weight, int64_t dim, int64_t n_iter, bool hook) : matrix_(weight, dim) {
    const bool columns_first = hook != matrix_.transposed;
    pass_ = n_iter == 0 ? Pass::kRead : (columns_first ? Pass::kColumnsFirst : Pass::kRowsFirst);
    by_rows_ = pass_ != Pass::kColumnsFirst;
    extent_ = by_rows_ ? matrix_.rows : matrix_.columns;
    other_ = by_rows_ ? matrix_.columns : matrix_.rows;
    partial_size_ = pass_ == Pass::kRead ? 1 : other_;
    if (by_rows_) {
      slab_ = matrix_.group();
      chunk_ = round_up(std::max({kChunkElements / other_, extent_ / kMaxChunks, int64_t{1}}), round_up(32, slab_));
    } else {
      const int64_t line = kLineBytes / sizeof(C);
      const int64_t fitting = kCacheBytes / static_cast<int64_t>(sizeof(C)) / other_;
      slab_ = round_up(std::clamp(fitting / line * line, line, 64 * line), matrix_.column_step());
      chunk_ = round_up(std::max({kChunkElements / other_, extent_ / kMaxChunks, int64_t{1}}), slab_);
    }
    chunks_ = (extent_ + chunk_ - 1) / chunk_;
  }

  int64_t chunks() const { return chunks_; }
  int64_t elements() const { return matrix_.rows * matrix_.columns; }
  int64_t rows() const { return matrix_.transposed ? matrix_.columns : matrix_.rows; }
  int64_t columns() const { return matrix_.transposed ? matrix_.rows : matrix_.columns; }

  // Numbers of type C that place() takes.
  int64_t memory_size() const { return extent_ + matrix_.rows + matrix_.columns + chunks_ * partial_size_; }

  void place(C* memory, const Tensor& u, const Tensor& v) {
    left_ = memory;
    right_ = left_ + matrix_.rows;
    first_ = right_ + matrix_.columns;
    partials_ = first_ + extent_;
    std::memcpy(u_work(), u.const_data_ptr(), rows() * sizeof(C));
    const C* source = static_cast<const C*>(v.const_data_ptr());
    for (int64_t m = 0; m < columns(); ++m) {
      v_work()[m] = source[matrix_.logical.empty() ? m : matrix_.logical[m]];
    }
  }

  void store(C* u, C* v) {
    std::memcpy(u, u_work(), rows() * sizeof(C));
    for (int64_t m = 0; m < columns(); ++m) {
      v[matrix_.logical.empty() ? m : matrix_.logical[m]] = v_work()[m];
    }
  }

  // Everything that chunk `index` contributes, its part of the weight read once from memory.
  void run_chunk(int64_t index) {
    C* partial = partials_ + index * partial_size_;
    std::fill(partial, partial + partial_size_, C(0));
    const std::unique_ptr<C[]> packed(matrix_.direct() ? nullptr : new C[slab_ * other_]);
    const int64_t end = std::min(extent_, (index + 1) * chunk_);
    std::vector<C> sums(by_rows_ && chunk_ > kSumRows ? partial_size_ : 0);
    int64_t summed = 0;
    for (int64_t begin = index * chunk_; begin < end; begin += slab_) {
      const int64_t stop = std::min(end, begin + slab_);
      if (!by_rows_) {
        run_columns(begin, stop, partial, packed.get());
        continue;
      }
      run_rows(begin, stop, sums.empty() ? partial : sums.data(), packed.get());
      summed += stop - begin;
      if (sums.empty() || (summed < kSumRows && stop < end)) continue;
      for (int64_t c = 0; c < partial_size_; ++c) partial[c] += std::exchange(sums[c], C(0));
      summed = 0;
    }
  }

  // Adds the partials in order, normalises both vectors and returns sigma.
  C finish(double eps) {
    if (pass_ == Pass::kRead) {
      double sigma = 0;
      for (int64_t i = 0; i < chunks_; ++i) {
        sigma += partials_[i];
      }
      return static_cast<C>(sigma);
    }
    const C first_norm = normalise(first_, extent_, eps, by_rows_ ? left_ : right_).second;
    for (int64_t i = 1; i < chunks_; ++i) {
      const C* __restrict__ partial = partials_ + i * partial_size_;
      for (int64_t c = 0; c < partial_size_; ++c) {
        partials_[c] += partial[c];
      }
    }
    for (int64_t c = 0; c < partial_size_; ++c) {
      partials_[c] /= first_norm;
    }
    const auto [squares, norm] = normalise(partials_, partial_size_, eps, by_rows_ ? right_ : left_);
    return static_cast<C>(squares / norm);
  }

 private:
  WeightMatrix<T> matrix_;
  Pass pass_;
  bool by_rows_;
  int64_t extent_, other_,
      partial_size_;  // chunks divide `extent_`, the rows or the columns; `other_` is the other of the two
  int64_t slab_, chunk_, chunks_;
  C *left_, *right_, *first_,
      *partials_;  // left [matrix rows], right [matrix columns]: u and v, or v and u if transposed

  C* u_work() { return matrix_.transposed ? right_ : left_; }
  C* v_work() { return matrix_.transposed ? left_ : right_; }

  void run_rows(int64_t begin, int64_t stop, C* partial, C* packed) {
    int64_t ld = 0;
    const C* w = matrix_.tile(begin, stop, 0, other_, packed, &ld);
    dot_rows(w, ld, stop - begin, other_, right_, first_ + begin);
    if (pass_ == Pass::kRead) {
      for (int64_t r = begin; r < stop; ++r) {
        *partial += left_[r] * first_[r];
      }
    } else {
      add_rows(w, ld, stop - begin, other_, first_ + begin, partial);
    }
  }

  void run_columns(int64_t begin, int64_t stop, C* partial, C* packed) {
    constexpr int64_t kDotRows = 64;
    int64_t ld = 0;
    const C* w = matrix_.tile(0, other_, begin, stop, packed, &ld);
    std::fill(first_ + begin, first_ + stop, C(0));
    add_rows(w, ld, other_, stop - begin, left_, first_ + begin);
    for (int64_t r = 0; r < other_; r += kDotRows) {
      const int64_t count = std::min(kDotRows, other_ - r);
      C sums[kDotRows];
      dot_rows(w + r * ld, ld, count, stop - begin, first_ + begin, sums);
      for (int64_t i = 0; i < count; ++i) {
        partial[r + i] += sums[i];
      }
    }
  }
};

// ---- ops

// Runs all chunks of all layers. A thread takes the next chunk when it is done with one, so unequal chunks balance; who
// finishes a layer's last chunk finishes the layer, so that an iteration is a single fork and join.
template <typename T>
void iterate(std::vector<Layer<T>>& layers, int64_t n_iter, double eps, accumulate_t<T>* sigma) {
  std::vector<std::pair<int64_t, int64_t>> tasks;
  int64_t elements = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    elements += layers[i].elements();
    for (int64_t index = 0; index < layers[i].chunks(); ++index) {
      tasks.emplace_back(i, index);
    }
  }
  const int64_t count = static_cast<int64_t>(tasks.size());
  std::vector<std::atomic<int64_t>> remaining(layers.size());
  for (int64_t iteration = 0; iteration < std::max(n_iter, int64_t{1}); ++iteration) {
    for (size_t i = 0; i < layers.size(); ++i) {
      remaining[i] = layers[i].chunks();
    }
    std::atomic<int64_t> next{0};
    const auto worker = [&](int64_t, int64_t) {
      for (int64_t task = next.fetch_add(1); task < count; task = next.fetch_add(1)) {
        const auto [i, index] = tasks[task];
        layers[i].run_chunk(index);
        if (remaining[i].fetch_sub(1) == 1) {
          sigma[i] = layers[i].finish(eps);
        }
      }
    };
    if (elements < kSerialElements) {
      worker(0, count);
    } else {
      torch::stable::parallel_for(0, count, 1, worker);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> spectral_sigma(std::vector<Tensor> weights, std::vector<Tensor> us,
                                                  std::vector<Tensor> vs, int64_t n_iter, bool hook, double eps,
                                                  std::vector<int64_t> dims) {
  const int64_t count = static_cast<int64_t>(weights.size());
  return dispatch_dtype("spectral_sigma", weights[0].scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    std::vector<Layer<T>> layers;
    layers.reserve(count);
    int64_t rows = 0, columns = 0, memory_size = 0;
    for (int64_t i = 0; i < count; ++i) {
      layers.emplace_back(weights[i], dims[i], n_iter, hook);
      rows += layers[i].rows();
      columns += layers[i].columns();
      memory_size += layers[i].memory_size();
    }
    std::unique_ptr<C[]> memory(new C[memory_size]);
    C* free = memory.get();
    for (int64_t i = 0; i < count; ++i) {
      layers[i].place(free, torch::stable::contiguous(us[i]), torch::stable::contiguous(vs[i]));
      free += layers[i].memory_size();
    }
    Tensor sigma = torch::stable::new_empty(us[0], {count});
    Tensor u = torch::stable::new_empty(us[0], {rows});
    Tensor v = torch::stable::new_empty(us[0], {columns});
    iterate(layers, n_iter, eps, static_cast<C*>(sigma.mutable_data_ptr()));
    C* u_out = static_cast<C*>(u.mutable_data_ptr());
    C* v_out = static_cast<C*>(v.mutable_data_ptr());
    for (Layer<T>& layer : layers) {
      layer.store(u_out, v_out);
      u_out += layer.rows();
      v_out += layer.columns();
    }
    return std::make_tuple(sigma, u, v);
  });
}

// grads[i] [outer, rows, inner] = grad_sigma[l] u_l[r] v_l[outer, inner] for each layer l = needed[i]; nothing for the
// others.
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
      // One row of one outer block is the unit: [outer, rows] flattened, so that transposed weights parallelise as
      // well.
      torch::stable::parallel_for(
          0, b.outer * b.rows, std::max<int64_t>(1, kGrainElements / b.inner), [=](int64_t begin, int64_t end) {
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
