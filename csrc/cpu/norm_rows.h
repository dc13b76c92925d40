// norm_act over rows of channels, NHWC: a pass over the whole image after another, cut into tasks of some pixels of one
// sample. Sums are put together in the order of the tasks, so that the result does not depend on the number of threads.
#pragma once

#include <algorithm>

#include "convert.h"
#include "epilogue.h"
#include "norm_problem.h"

namespace fastgan {

template <typename C>
class NormRows {
 public:
  struct Task {
    int64_t index, sample, offset, size;
  };

  const NormProblem<C>& problem;
  int64_t lanes;  // channels, several times over where they are few

  explicit NormRows(const NormProblem<C>& p)
      : problem(p),
        lanes(p.c * std::max<int64_t>(1, 64 / p.c)),
        pixels_(std::max<int64_t>(64, kGrainElements / p.c)),
        per_sample_((p.pixels + pixels_ - 1) / pixels_) {}

  int64_t tasks() const { return problem.n * per_sample_; }
  int64_t per_sample() const { return per_sample_; }
  // Values that one chunk has at most.
  int64_t chunk() const { return std::max<int64_t>(1, kBlock / lanes) * lanes; }

  // Each thread calls make() once and its result with every task.
  template <typename F>
  void parallel(F&& make) const {
    const int64_t grain = std::max<int64_t>(1, kGrainElements / (std::min(pixels_, problem.pixels) * problem.c));
    torch::stable::parallel_for(0, tasks(), grain, [&](int64_t begin, int64_t end) {
      auto worker = make();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / per_sample_, first = i % per_sample_ * pixels_;
        const int64_t count = std::min(pixels_, problem.pixels - first);
        worker(Task{i, sample, (sample * problem.pixels + first) * problem.c, count * problem.c});
      }
    });
  }

  // f(first value, rows, values per row) for each chunk of a task.
  template <typename F>
  void for_chunks(const Task& task, F&& f) const {
    for (int64_t done = 0; done < task.size;) {
      const int64_t rest = task.size - done;
      const int64_t n = std::min(rest, lanes), rows = std::min(chunk() / lanes, rest / n);
      f(task.offset + done, rows, n);
      done += rows * n;
    }
  }

  // Repeats the channels' values along the lanes.
  void tile(C* values, int kinds) const {
    for (C* row = values; row < values + kinds * lanes; row += lanes) {
      for (int64_t i = problem.c; i < lanes; ++i) row[i] = row[i - problem.c];
    }
  }
  // The sum over a channel's lanes.
  double fold(const C* values, int64_t channel) const {
    double sum = 0;
    for (int64_t i = channel; i < lanes; i += problem.c) sum += values[i];
    return sum;
  }

 private:
  int64_t pixels_, per_sample_;
};

// A thread's view of the chunks: reads in the compute type, coefficients along the lanes.
template <typename T>
class NormChunk {
 public:
  using C = accumulate_t<T>;
  NormBlock<C> block{};

  NormChunk(const NormRows<C>& rows, int coefficients, int sums)
      : rows_(rows), coefficients_(coefficients * rows.lanes), sums_(sums * rows.lanes) {
    block.lanes = rows.lanes;
    block.coefficients = coefficients_.data();
    block.sums = sums_.data();
    block.act = rows.problem.act, block.alpha = rows.problem.alpha, block.gain = rows.problem.gain;
  }

  // Room for a chunk: what is read from a half type, or made on the way; zeros for an absent tensor.
  C* room(int which) {
    auto& buffer = rooms_[which];
    if (buffer.empty()) buffer.resize(rows_.chunk());
    return buffer.data();
  }
  const C* read(const T* data, int64_t at, int which) {
    if (!data) return room(which);
    return as_compute(data + at, block.rows * block.n, sizeof(T) == 2 ? room(which) : nullptr);
  }
  C* result(T* data, int64_t at, int which) {
    if (!data) return room(which);
    return result_buffer(data + at, sizeof(T) == 2 ? room(which) : nullptr);
  }
  void finish(const C* from, T* data, int64_t at) {
    if (data) flush(from, data + at, block.rows * block.n);
  }

  // fill(sample, channel, where the channel's first coefficient goes, stride between coefficients).
  template <typename F>
  void set_coefficients(int64_t sample, int kinds, F&& fill) {
    if (sample == sample_) return;
    for (int64_t c = 0; c < rows_.problem.c; ++c) fill(sample, c, coefficients_.data() + c, rows_.lanes);
    rows_.tile(coefficients_.data(), kinds);
    sample_ = sample;
  }
  C* coefficients() { return coefficients_.data(); }
  void clear_sums() { std::fill(sums_.begin(), sums_.end(), C(0)); }
  double sum(int kind, int64_t channel) const { return rows_.fold(sums_.data() + kind * rows_.lanes, channel); }

 private:
  const NormRows<C>& rows_;
  std::vector<C> coefficients_, sums_;
  std::vector<C> rooms_[7];
  int64_t sample_ = -1;
};

enum NormRoom : int { kRoomX, kRoomGy, kRoomH, kRoomA, kRoomB, kRoomOut, kRoomSecondOut };

template <typename T, typename C = accumulate_t<T>>
void rows_moments(const NormRows<C>& rows, const T* x, double* mean, double* var) {
  const NormProblem<C>& p = rows.problem;
  std::vector<double> counts(rows.tasks()), means(rows.tasks() * p.c), squares(rows.tasks() * p.c);
  rows.parallel([&] {
    return [&, chunk = NormChunk<T>(rows, 1, 2)](const typename NormRows<C>::Task& task) mutable {
      NormBlock<C>& block = chunk.block;
      const double count = static_cast<double>(task.size / p.c);
      const auto pass = [&](void (*loop)(const NormBlock<C>&)) {
        chunk.clear_sums();
        rows.for_chunks(task, [&](int64_t at, int64_t n_rows, int64_t n) {
          block.rows = n_rows, block.n = n;
          block.x = chunk.read(x, at, kRoomX);
          loop(block);
        });
      };
      pass(norm::sum);
      for (int64_t c = 0; c < p.c; ++c) chunk.coefficients()[c] = static_cast<C>(chunk.sum(0, c) / count);
      rows.tile(chunk.coefficients(), 1);
      pass(norm::deviations);
      counts[task.index] = count;
      for (int64_t c = 0; c < p.c; ++c) {
        const Moments part = Moments::of(count, chunk.coefficients()[c], chunk.sum(0, c), chunk.sum(1, c));
        means[task.index * p.c + c] = part.mean;
        squares[task.index * p.c + c] = part.squares;
      }
    };
  });
  // As Moments::add, for all channels at once and with the mean first: a division per channel and not per part.
  const int64_t parts = (p.batch ? p.n : 1) * rows.per_sample();
  const double values = static_cast<double>(p.pixels * (p.batch ? p.n : 1));
  for (int64_t first = 0; first < rows.tasks(); first += parts, mean += p.c, var += p.c) {
    const auto for_parts = [&](auto&& f) {
      for (int64_t part = first; part < first + parts; ++part) {
        for (int64_t c = 0; c < p.c; ++c) f(c, counts[part], part * p.c + c);
      }
    };
    std::fill_n(mean, p.c, 0.0);
    std::fill_n(var, p.c, 0.0);
    for_parts([&](int64_t c, double count, int64_t i) { mean[c] += count * means[i]; });
    for (int64_t c = 0; c < p.c; ++c) mean[c] /= values;
    for_parts([&](int64_t c, double count, int64_t i) {
      const double difference = means[i] - mean[c];
      var[c] += squares[i] + count * difference * difference;
    });
    for (int64_t c = 0; c < p.c; ++c) var[c] /= values;
  }
}

// As planes_forward; the residual is for results of the compute type.
template <typename T, typename C = accumulate_t<T>>
void rows_forward(const NormProblem<C>& p, const T* x, T* y, double* mean, double* var,
                  const NormResidual<C>* residual = nullptr) {
  const NormRows<C> rows(p);
  if (!p.fixed) rows_moments(rows, x, mean, var);
  rows.parallel([&] {
    return [&, chunk = NormChunk<T>(rows, kAffine, 0)](const typename NormRows<C>::Task& task) mutable {
      NormBlock<C>& block = chunk.block;
      chunk.set_coefficients(task.sample, kAffine,
                             [&](int64_t n, int64_t c, C* out, int64_t stride) { p.affine(n, c, out, stride); });
      rows.for_chunks(task, [&](int64_t at, int64_t n_rows, int64_t n) {
        block.rows = n_rows, block.n = n;
        block.x = chunk.read(x, at, kRoomX);
        block.out = chunk.result(y, at, kRoomOut);
        norm::forward(block);
        if (residual) axpy(residual->gain, residual->data + at, block.out, n_rows * n);
        chunk.finish(block.out, y, at);
      });
    };
  });
}

// One pass over the image that adds `kinds` sums per sample and channel to sums, from kind `first` on.
//
// fill: as NormChunk::set_coefficients has it. body(chunk, first value): makes one chunk's terms and adds them.
template <typename T, typename C, typename Fill, typename Body>
void rows_sums(const NormRows<C>& rows, int coefficients, int first, int kinds, NormSums& sums, Fill&& fill,
               Body&& body) {
  const NormProblem<C>& p = rows.problem;
  std::vector<double> parts(rows.tasks() * kinds * p.c);
  rows.parallel([&] {
    return [&, chunk = NormChunk<T>(rows, coefficients, kinds)](const typename NormRows<C>::Task& task) mutable {
      chunk.set_coefficients(task.sample, coefficients, fill);
      chunk.clear_sums();
      rows.for_chunks(task, [&](int64_t at, int64_t n_rows, int64_t n) {
        chunk.block.rows = n_rows, chunk.block.n = n;
        body(chunk, at);
      });
      for (int k = 0; k < kinds; ++k) {
        for (int64_t c = 0; c < p.c; ++c) parts[(task.index * kinds + k) * p.c + c] = chunk.sum(k, c);
      }
    };
  });
  for (int64_t task = 0; task < rows.tasks(); ++task) {
    for (int k = 0; k < kinds; ++k) {
      const double* const part = parts.data() + (task * kinds + k) * p.c;
      for (int64_t c = 0; c < p.c; ++c) sums.at(first + k, task / rows.per_sample(), c) += part[c];
    }
  }
}

// As planes_backward.
template <typename T, typename C = accumulate_t<T>>
void rows_backward(const NormProblem<C>& p, const T* gy, const T* x, T* gx, bool need_sums, NormSums& sums) {
  const NormRows<C> rows(p);
  const auto cotangent = [&](NormChunk<T>& chunk, int64_t at) {
    NormBlock<C>& block = chunk.block;
    block.x = chunk.read(x, at, kRoomX), block.gy = chunk.read(gy, at, kRoomGy), block.g = chunk.room(kRoomA);
    norm::cotangent(block);
  };
  if (need_sums) {
    rows_sums<T>(
        rows, kAffine, 0, kFirstSums, sums, [&](int64_t n, int64_t c, C* out, int64_t s) { p.affine(n, c, out, s); },
        [&](NormChunk<T>& chunk, int64_t at) {
          cotangent(chunk, at);
          norm::first_sums(chunk.block);
        });
  }
  if (!gx) return;
  std::vector<NormFirstMeans<C>> means;
  for (int64_t i = 0; i < p.groups(); ++i) means.emplace_back(p, sums, p.group(i));
  rows.parallel([&] {
    return [&, chunk = NormChunk<T>(rows, kFirst, 0)](const typename NormRows<C>::Task& task) mutable {
      NormBlock<C>& block = chunk.block;
      chunk.set_coefficients(task.sample, kFirst, [&](int64_t n, int64_t c, C* out, int64_t stride) {
        p.affine(n, c, out, stride);
        means[p.statistic(n, c)].coefficients(p, n, c, out, stride);
      });
      rows.for_chunks(task, [&](int64_t at, int64_t n_rows, int64_t n) {
        block.rows = n_rows, block.n = n;
        cotangent(chunk, at);
        block.out = chunk.result(gx, at, kRoomOut);
        norm::first_apply(block);
        chunk.finish(block.out, gx, at);
      });
    };
  });
}

// As planes_second.
template <typename T, typename C = accumulate_t<T>>
void rows_second(const NormProblem<C>& p, const T* h, const T* gy, const T* x, T* grad_gy, T* grad_x, NormSums& sums,
                 NormSums& grad_weight) {
  const NormRows<C> rows(p);
  const auto slopes = [&](NormChunk<T>& chunk, int64_t at) {
    NormBlock<C>& block = chunk.block;
    block.x = chunk.read(x, at, kRoomX), block.gy = chunk.read(gy, at, kRoomGy), block.h = chunk.read(h, at, kRoomH);
    block.slope = chunk.room(kRoomA), block.bend = chunk.room(kRoomB);
    norm::slopes(block);
  };
  rows_sums<T>(
      rows, kAffine, 0, kPlainSums, sums, [&](int64_t n, int64_t c, C* out, int64_t s) { p.affine(n, c, out, s); },
      [&](NormChunk<T>& chunk, int64_t at) {
        slopes(chunk, at);
        norm::second_sums(chunk.block);
      });
  std::vector<NormSecondMeans<C>> means;
  for (int64_t i = 0; i < p.groups(); ++i) means.emplace_back(p, sums, p.group(i));
  const auto fill = [&](int64_t n, int64_t c, C* out, int64_t stride) {
    p.affine(n, c, out, stride);
    means[p.statistic(n, c)].coefficients(p, n, c, out, stride);
  };
  if (p.curved()) {
    rows_sums<T>(rows, kSecond, kSumE, kSecondSums - kSumE, sums, fill, [&](NormChunk<T>& chunk, int64_t at) {
      slopes(chunk, at);
      norm::bend_sums(chunk.block);
    });
  }
  for (int64_t i = 0; i < p.groups(); ++i) {
    const NormGroup group = p.group(i);
    means[i].finish(p, sums, group);
    for (int64_t n = group.begin; n < group.end; ++n) {
      grad_weight.at(0, n, group.channel) = means[i].weight_grad(p, sums, n, group.channel);
    }
  }
  if (!grad_gy && !grad_x) return;
  rows.parallel([&] {
    return [&, chunk = NormChunk<T>(rows, kSecond, 0)](const typename NormRows<C>::Task& task) mutable {
      NormBlock<C>& block = chunk.block;
      chunk.set_coefficients(task.sample, kSecond, fill);
      rows.for_chunks(task, [&](int64_t at, int64_t n_rows, int64_t n) {
        block.rows = n_rows, block.n = n;
        slopes(chunk, at);
        block.out = chunk.result(grad_gy, at, kRoomOut);
        block.second_out = chunk.result(grad_x, at, kRoomSecondOut);
        norm::second_apply(block);
        chunk.finish(block.out, grad_gy, at);
        chunk.finish(block.second_out, grad_x, at);
      });
    };
  });
}

}  // namespace fastgan
