// What one call of norm_act is about: the tensors' sizes, parameters and statistics, and the coefficients that they
// give to the loops of norm_loops.h.
//
// A group is what has one mean: a channel of a sample (instance) or of the batch (batch), M values. Of its values, with
// <.> their mean, r = rstd, u normalised, g the cotangent of z and k = weight * g that of u:
//
//   gx = r (k - <k> - u <k u>)                                                       (Ioffe and Szegedy 2015, section
//   3)
//
// For the second order let h, hw, hb be the cotangents of gx and of the gradients of weight and bias. Their inner
// product with these is the sum over the group of g q, where
//
//   p = r (h - <h> - u <h u>),  q = weight p + hb + hw u                    (q is what (h, hw, hb) move z by)
//
// so grad_gy = gain act'(z) q, and with e = gy gain act''(z) q what act' contributes,
//
//   U = weight e + (hw - weight r <h u>) g - r <k u> h                               (the cotangent of u)
//   grad_x = r (U - <U> - u (<U u> + <k p>)),  <k p> = r (<k h> - <k> <h> - <k u> <h u>)
//   grad_weight = sum of (e u + g p),  grad_bias = sum of e
//
// where <k p> comes from rstd as a factor. Given statistics do not follow x: then p = r h, and every mean above is 0.
#pragma once

#include <cmath>

#include "image.h"
#include "norm_loops.h"

namespace fastgan {

// Per channel [C] or per sample and channel [N, C]; absent means a constant.
template <typename C>
struct NormParameter {
  const C* data = nullptr;
  int64_t stride_n = 0;
  C missing = 0;

  NormParameter(const std::optional<Tensor>& t, C otherwise) : missing(otherwise) {
    if (!t) return;
    data = t->template const_data_ptr<C>();
    stride_n = t->dim() == 2 ? t->size(1) : 0;
  }
  double at(int64_t n, int64_t c) const { return data ? data[n * stride_n + c] : missing; }
};

struct NormGroup {
  int64_t channel, begin, end;  // its samples
};

// Sums over the pixels of each sample and channel, [kinds, N, C] in double.
class NormSums {
 public:
  NormSums(int64_t kinds, int64_t n, int64_t c) : n_(n), c_(c), data_(kinds * n * c) {}
  double& at(int64_t kind, int64_t n, int64_t c) { return data_[(kind * n_ + n) * c_ + c]; }
  double at(int64_t kind, int64_t n, int64_t c) const { return data_[(kind * n_ + n) * c_ + c]; }
  int64_t channels() const { return c_; }

 private:
  int64_t n_, c_;
  std::vector<double> data_;
};

enum NormFirstSum : int { kSumG, kSumGU, kFirstSums };
enum NormSecondSum : int { kSumGH = kFirstSums, kSumH, kSumHU, kPlainSums, kSumE = kPlainSums, kSumEU, kSecondSums };

template <typename C>
struct NormProblem {
  int64_t n, c, pixels;
  bool batch, fixed;  // fixed: the statistics are given, they do not follow x
  double eps;
  Act act;
  C alpha, gain;
  NormParameter<C> weight, bias, h_weight, h_bias;
  const double *mean, *var;  // [C] for batch, else [N, C]

  int64_t groups() const { return batch ? c : n * c; }
  NormGroup group(int64_t i) const { return batch ? NormGroup{i, 0, n} : NormGroup{i % c, i / c, i / c + 1}; }
  double count(const NormGroup& g) const { return static_cast<double>((g.end - g.begin) * pixels); }
  bool per_sample() const { return weight.stride_n || bias.stride_n || h_weight.stride_n || h_bias.stride_n; }
  bool curved() const { return act != Act::kLinear && act != Act::kRelu && act != Act::kLrelu; }

  int64_t statistic(int64_t sample, int64_t channel) const { return batch ? channel : sample * c + channel; }
  double rstd(int64_t sample, int64_t channel) const { return 1.0 / std::sqrt(var[statistic(sample, channel)] + eps); }

  // Coefficient j of the channel goes to out[j * stride].
  void affine(int64_t sample, int64_t channel, C* out, int64_t stride) const {
    const double exact = mean[statistic(sample, channel)], r = rstd(sample, channel);
    const C rounded = static_cast<C>(exact);
    out[kMean * stride] = rounded;
    out[kRstd * stride] = static_cast<C>(r);
    out[kShift * stride] = static_cast<C>((rounded - exact) * r);
    out[kWeight * stride] = static_cast<C>(weight.at(sample, channel));
    out[kBias * stride] = static_cast<C>(bias.at(sample, channel));
  }
};

// An image that is added to results, where they still are in the first-level cache.
template <typename C>
struct NormResidual {
  const C* data;
  C gain;
};

// The first order's means over one group.
template <typename C>
struct NormFirstMeans {
  double k = 0, ku = 0;

  NormFirstMeans(const NormProblem<C>& p, const NormSums& sums, const NormGroup& group) {
    if (p.fixed) return;
    for (int64_t n = group.begin; n < group.end; ++n) {
      const double weight = p.weight.at(n, group.channel) / p.count(group);
      k += weight * sums.at(kSumG, n, group.channel);
      ku += weight * sums.at(kSumGU, n, group.channel);
    }
  }

  void coefficients(const NormProblem<C>& p, int64_t sample, int64_t channel, C* out, int64_t stride) const {
    const double r = p.rstd(sample, channel);
    out[kGradG * stride] = static_cast<C>(r * p.weight.at(sample, channel));
    out[kGradOne * stride] = static_cast<C>(-r * k);
    out[kGradU * stride] = static_cast<C>(-r * ku);
  }
};

// The second order's; those of e come after its own pass.
template <typename C>
struct NormSecondMeans {
  NormFirstMeans<C> first;
  double h = 0, hu = 0, kh = 0, cotangent = 0, cotangent_u = 0;

  NormSecondMeans(const NormProblem<C>& p, const NormSums& sums, const NormGroup& group) : first(p, sums, group) {
    if (p.fixed) return;
    const double count = p.count(group);
    for (int64_t n = group.begin; n < group.end; ++n) {
      h += sums.at(kSumH, n, group.channel) / count;
      hu += sums.at(kSumHU, n, group.channel) / count;
      kh += p.weight.at(n, group.channel) * sums.at(kSumGH, n, group.channel) / count;
    }
  }

  // <U> and <U u>, once the sums of e are there too.
  void finish(const NormProblem<C>& p, const NormSums& sums, const NormGroup& group) {
    if (p.fixed) return;
    const double count = p.count(group);
    for (int64_t n = group.begin; n < group.end; ++n) {
      const double weight = p.weight.at(n, group.channel) / count, by_g = q_u(p, n, group.channel) / count;
      cotangent += weight * sums.at(kSumE, n, group.channel) + by_g * sums.at(kSumG, n, group.channel);
      cotangent_u += weight * sums.at(kSumEU, n, group.channel) + by_g * sums.at(kSumGU, n, group.channel);
    }
    const double r = p.rstd(group.begin, group.channel);
    cotangent -= r * first.ku * h;
    cotangent_u -= r * first.ku * hu;
  }

  double q_u(const NormProblem<C>& p, int64_t sample, int64_t channel) const {
    return p.h_weight.at(sample, channel) - p.weight.at(sample, channel) * p.rstd(sample, channel) * hu;
  }

  void coefficients(const NormProblem<C>& p, int64_t sample, int64_t channel, C* out, int64_t stride) const {
    const double r = p.rstd(sample, channel), weight = p.weight.at(sample, channel);
    const double by_u = q_u(p, sample, channel), kp = r * (kh - first.k * h - first.ku * hu);
    out[kQH * stride] = static_cast<C>(weight * r);
    out[kQOne * stride] = static_cast<C>(p.h_bias.at(sample, channel) - weight * r * h);
    out[kQU * stride] = static_cast<C>(by_u);
    out[kXE * stride] = static_cast<C>(r * weight);
    out[kXG * stride] = static_cast<C>(r * by_u);
    out[kXH * stride] = static_cast<C>(-r * r * first.ku);
    out[kXOne * stride] = static_cast<C>(-r * cotangent);
    out[kXU * stride] = static_cast<C>(p.fixed ? 0.0 : -r * (cotangent_u + kp));
  }

  // The sum over one sample's pixels of e u + g p.
  double weight_grad(const NormProblem<C>& p, const NormSums& sums, int64_t sample, int64_t channel) const {
    const auto sum = [&](int kind) { return sums.at(kind, sample, channel); };
    return sum(kSumEU) + p.rstd(sample, channel) * (sum(kSumGH) - h * sum(kSumG) - hu * sum(kSumGU));
  }
};

// Mean and variance put together from parts, as Chan, Golub and LeVeque 1983 have it: nothing cancels.
struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: sum of squared deviations from the mean

  // A part of n values from the sums of d = x - about and of d * d.
  static Moments of(double n, double about, double sum, double sum_squares) {
    const double squares = sum_squares - sum * sum / n;
    return {n, about + sum / n, squares < 0.0 ? 0.0 : squares};  // in this form a NaN stays
  }
  void add(const Moments& part) {
    if (count == 0) {
      *this = part;
      return;
    }
    const double total = count + part.count, difference = part.mean - mean;
    mean += difference * (part.count / total);
    squares += part.squares + difference * difference * (count * part.count / total);
    count = total;
  }
  double variance() const { return squares / count; }
};

}  // namespace fastgan
