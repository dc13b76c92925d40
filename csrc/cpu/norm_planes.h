// norm_act over planes, NCHW: one group after another, so that what a group's later passes read again is in the
// second-level cache.
#pragma once

#include <algorithm>

#include "convert.h"
#include "epilogue.h"
#include "norm_problem.h"

namespace fastgan {

// How a group's values are walked: as one run per sample, straight from the tensor, or gathered in the compute type
// first, where the planes are short or of a half type; then as a single run, unless each sample has its own parameters.
template <typename C>
struct NormRuns {
  const NormProblem<C>& problem;
  int64_t samples;
  bool gathered;
  int64_t count, length;

  NormRuns(const NormProblem<C>& p, bool half) : problem(p), samples(p.batch ? p.n : 1) {
    constexpr int64_t kShortPlane = 512;  // sums over fewer values cost more than copying these costs
    gathered = half || (samples > 1 && p.pixels < kShortPlane);
    const bool merged = gathered && !p.per_sample();
    count = merged ? 1 : samples;
    length = merged ? samples * p.pixels : p.pixels;
  }

  int64_t values() const { return samples * problem.pixels; }
  // Whether a group's run has coefficients of its own.
  bool new_coefficients(int64_t run) const { return run == 0 || problem.per_sample(); }
  int64_t offset(const NormGroup& group, int64_t run) const {
    return ((group.begin + run) * problem.c + group.channel) * problem.pixels;
  }
  int64_t grain() const {
    constexpr int64_t kGroupCost = 256;  // a group's statistics and coefficients, in values
    return std::max<int64_t>(1, kGrainElements / (values() + kGroupCost));
  }
};

inline void gather(const float* from, float* to, int64_t n) { std::copy_n(from, n, to); }
inline void gather(const double* from, double* to, int64_t n) { std::copy_n(from, n, to); }
template <typename T>
void gather(const T* from, float* to, int64_t n) {
  widen(from, to, n);
}
inline void scatter(const float* from, float* to, int64_t n) { std::copy_n(from, n, to); }
inline void scatter(const double* from, double* to, int64_t n) { std::copy_n(from, n, to); }
template <typename T>
void scatter(const float* from, T* to, int64_t n) {
  narrow(from, to, n);
}

// A tensor's runs as a thread reads them; an absent tensor is zeros.
template <typename T>
class NormSource {
 public:
  using C = accumulate_t<T>;
  NormSource(const NormRuns<C>& runs, const T* data)
      : runs_(runs), data_(data), buffer_(runs.gathered || !data ? runs.values() : 0) {}

  void load(const NormGroup& group) {
    if (!runs_.gathered || !data_) return;
    const int64_t pixels = runs_.problem.pixels;
    for (int64_t s = 0; s < runs_.samples; ++s) {
      gather(data_ + runs_.offset(group, s), buffer_.data() + s * pixels, pixels);
    }
  }
  const C* run(const NormGroup& group, int64_t i) const {
    if constexpr (sizeof(T) == sizeof(C)) {
      if (!runs_.gathered && data_) return data_ + runs_.offset(group, i);
    }
    return buffer_.data() + i * runs_.length;
  }

 private:
  const NormRuns<C>& runs_;
  const T* data_;
  std::vector<C> buffer_;
};

// A tensor's runs as a thread writes them; what an absent tensor would get is dropped.
template <typename T>
class NormTarget {
 public:
  using C = accumulate_t<T>;
  NormTarget(const NormRuns<C>& runs, T* data)
      : runs_(runs), data_(data), buffer_(runs.gathered || !data ? runs.values() : 0) {}

  C* run(const NormGroup& group, int64_t i) {
    if constexpr (sizeof(T) == sizeof(C)) {
      if (!runs_.gathered && data_) return data_ + runs_.offset(group, i);
    }
    return buffer_.data() + i * runs_.length;
  }
  void store(const NormGroup& group) {
    if (!runs_.gathered || !data_) return;
    const int64_t pixels = runs_.problem.pixels;
    for (int64_t s = 0; s < runs_.samples; ++s) {
      scatter(buffer_.data() + s * pixels, data_ + runs_.offset(group, s), pixels);
    }
  }

 private:
  const NormRuns<C>& runs_;
  T* data_;
  std::vector<C> buffer_;
};

template <typename C>
NormBlock<C> planar_block(const NormProblem<C>& p, const C* coefficients, C* sums) {
  NormBlock<C> block{};
  block.planar = true;
  block.rows = block.lanes = 1;
  block.coefficients = coefficients;
  block.sums = sums;
  block.act = p.act, block.alpha = p.alpha, block.gain = p.gain;
  return block;
}

// f(first value, number of values) for each block of a run.
template <typename F>
void for_blocks(int64_t length, F&& f) {
  for (int64_t at = 0; at < length; at += kBlock) f(at, std::min(kBlock, length - at));
}

template <typename C>
Moments run_moments(const C* x, int64_t length, const NormProblem<C>& p) {
  Moments moments;
  for_blocks(length, [&](int64_t at, int64_t n) {
    C sums[2] = {}, mean = 0;
    NormBlock<C> block = planar_block(p, &mean, sums);
    block.x = x + at, block.n = n;
    norm::sum(block);
    mean = sums[0] / static_cast<C>(n);
    sums[0] = 0;
    norm::deviations(block);
    moments.add(Moments::of(static_cast<double>(n), mean, sums[0], sums[1]));
  });
  return moments;
}

// mean and var are filled in unless they are given; p reads them. The residual is for results that are not gathered.
template <typename T, typename C = accumulate_t<T>>
void planes_forward(const NormProblem<C>& p, const T* x, T* y, double* mean, double* var,
                    const NormResidual<C>* residual = nullptr) {
  const NormRuns<C> runs(p, sizeof(T) == 2);
  torch::stable::parallel_for(0, p.groups(), runs.grain(), [&](int64_t begin, int64_t end) {
    NormSource<T> source(runs, x);
    NormTarget<T> target(runs, y);
    C coefficients[kAffine];
    NormBlock<C> block = planar_block<C>(p, coefficients, nullptr);
    for (int64_t i = begin; i < end; ++i) {
      const NormGroup group = p.group(i);
      source.load(group);
      if (!p.fixed) {
        Moments moments;
        for (int64_t r = 0; r < runs.count; ++r) moments.add(run_moments(source.run(group, r), runs.length, p));
        mean[i] = moments.mean;
        var[i] = moments.variance();
      }
      for (int64_t r = 0; r < runs.count; ++r) {
        if (runs.new_coefficients(r)) p.affine(group.begin + r, group.channel, coefficients, 1);
        const C* const from = source.run(group, r);
        C* const to = target.run(group, r);
        for_blocks(runs.length, [&](int64_t at, int64_t n) {
          block.x = from + at, block.out = to + at, block.n = n;
          norm::forward(block);
          if (residual) axpy(residual->gain, residual->data + runs.offset(group, r) + at, to + at, n);
        });
      }
      target.store(group);
    }
  });
}

// gx: null if it is not wanted.
template <typename T, typename C = accumulate_t<T>>
void planes_backward(const NormProblem<C>& p, const T* gy, const T* x, T* gx, bool need_sums, NormSums& sums) {
  const NormRuns<C> runs(p, sizeof(T) == 2);
  torch::stable::parallel_for(0, p.groups(), runs.grain(), [&](int64_t begin, int64_t end) {
    NormSource<T> x_source(runs, x), gy_source(runs, gy);
    std::optional<NormTarget<T>> target;
    if (gx) target.emplace(runs, gx);
    C coefficients[kFirst], partial[kFirstSums];
    // The cotangents of a whole group, if they stay in the second-level cache until they are wanted again.
    constexpr int64_t kKept = 32768;
    const bool kept = need_sums && runs.values() <= kKept;
    std::vector<C> cotangents(kept ? runs.values() : kBlock);
    NormBlock<C> block = planar_block<C>(p, coefficients, partial);
    for (int64_t i = begin; i < end; ++i) {
      const NormGroup group = p.group(i);
      x_source.load(group);
      gy_source.load(group);
      const auto for_cotangents = [&](int64_t r, bool made, auto&& f) {
        const C *const from_x = x_source.run(group, r), *const from_gy = gy_source.run(group, r);
        for_blocks(runs.length, [&](int64_t at, int64_t n) {
          block.x = from_x + at, block.gy = from_gy + at, block.n = n;
          block.g = cotangents.data() + (kept ? r * runs.length + at : 0);
          if (!made) norm::cotangent(block);
          f(at);
        });
      };
      for (int64_t r = 0; r < runs.count && need_sums; ++r) {
        if (runs.new_coefficients(r)) p.affine(group.begin + r, group.channel, coefficients, 1);
        for_cotangents(r, false, [&](int64_t) {
          std::fill_n(partial, kFirstSums, C(0));
          norm::first_sums(block);
          for (int k = 0; k < kFirstSums; ++k) sums.at(k, group.begin + r, group.channel) += partial[k];
        });
      }
      if (!gx) continue;
      const NormFirstMeans<C> means(p, sums, group);
      for (int64_t r = 0; r < runs.count; ++r) {
        if (runs.new_coefficients(r)) {
          p.affine(group.begin + r, group.channel, coefficients, 1);
          means.coefficients(p, group.begin + r, group.channel, coefficients, 1);
        }
        C* const to = target->run(group, r);
        for_cotangents(r, kept, [&](int64_t at) {
          block.out = to + at;
          norm::first_apply(block);
        });
      }
      target->store(group);
    }
  });
}

// h: null for zeros; grad_gy, grad_x: null if they are not wanted. grad_weight is [1, N, C].
template <typename T, typename C = accumulate_t<T>>
void planes_second(const NormProblem<C>& p, const T* h, const T* gy, const T* x, T* grad_gy, T* grad_x, NormSums& sums,
                   NormSums& grad_weight) {
  const NormRuns<C> runs(p, sizeof(T) == 2);
  torch::stable::parallel_for(0, p.groups(), runs.grain(), [&](int64_t begin, int64_t end) {
    NormSource<T> x_source(runs, x), gy_source(runs, gy), h_source(runs, h);
    NormTarget<T> gy_target(runs, grad_gy), x_target(runs, grad_x);
    C coefficients[kSecond], slope[kBlock], bend[kBlock], partial[kPlainSums];
    NormBlock<C> block = planar_block<C>(p, coefficients, partial);
    block.slope = slope, block.bend = bend;
    for (int64_t i = begin; i < end; ++i) {
      const NormGroup group = p.group(i);
      x_source.load(group);
      gy_source.load(group);
      h_source.load(group);
      const auto for_slopes = [&](int64_t r, auto&& f) {
        const C *const from_x = x_source.run(group, r), *const from_gy = gy_source.run(group, r),
                       *const from_h = h_source.run(group, r);
        for_blocks(runs.length, [&](int64_t at, int64_t n) {
          block.x = from_x + at, block.gy = from_gy + at, block.h = from_h + at, block.n = n;
          norm::slopes(block);
          f(at);
        });
      };
      const auto add_sums = [&](int64_t r, int first, int kinds, void (*loop)(const NormBlock<C>&)) {
        for_slopes(r, [&](int64_t) {
          std::fill_n(partial, kinds, C(0));
          loop(block);
          for (int k = 0; k < kinds; ++k) sums.at(first + k, group.begin + r, group.channel) += partial[k];
        });
      };
      for (int64_t r = 0; r < runs.count; ++r) {
        if (runs.new_coefficients(r)) p.affine(group.begin + r, group.channel, coefficients, 1);
        add_sums(r, 0, kPlainSums, norm::second_sums);
      }
      NormSecondMeans<C> means(p, sums, group);
      const auto set_coefficients = [&](int64_t r) {
        if (!runs.new_coefficients(r)) return;
        p.affine(group.begin + r, group.channel, coefficients, 1);
        means.coefficients(p, group.begin + r, group.channel, coefficients, 1);
      };
      for (int64_t r = 0; r < runs.count && p.curved(); ++r) {
        set_coefficients(r);
        add_sums(r, kSumE, kSecondSums - kSumE, norm::bend_sums);
      }
      means.finish(p, sums, group);
      for (int64_t n = group.begin; n < group.end; ++n) {
        grad_weight.at(0, n, group.channel) = means.weight_grad(p, sums, n, group.channel);
      }
      if (!grad_gy && !grad_x) continue;
      for (int64_t r = 0; r < runs.count; ++r) {
        set_coefficients(r);
        C *const to_gy = gy_target.run(group, r), *const to_x = x_target.run(group, r);
        for_slopes(r, [&](int64_t at) {
          block.out = to_gy + at, block.second_out = to_x + at;
          norm::second_apply(block);
        });
      }
      gy_target.store(group);
      x_target.store(group);
    }
  });
}

}  // namespace fastgan
