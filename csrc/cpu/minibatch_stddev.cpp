// minibatch_stddev: x with the mean standard deviation within each sample's group behind its channels, and the
// gradient.
//
//   s[i] = sqrt(variance over the group of value i + eps);  statistic = mean of s over a share of the channels
//   gradient: gx = gy + w * (x - mean over the group) / s,  w = sum of the statistic's cotangent / (group * share)
//
// A sample is one run of values in memory, and its share of the channels a part of that run (in channels_last there is
// one share: all). Source: Karras et al. 2018 (Progressive GAN), section 3.

#include <cmath>

#include "convert.h"
#include "image.h"

namespace fastgan {
namespace {

struct Groups {
  int64_t size, count, shares;       // samples in a group, groups, statistics of each
  int64_t channels, pixels, values;  // values = channels * pixels
  bool channels_last;

  Groups(const Tensor& x, int64_t group_size, int64_t num_channels)
      : size(group_size),
        count(x.size(0) / group_size),
        shares(num_channels),
        channels(x.size(1)),
        pixels(x.size(2) * x.size(3)),
        values(channels * pixels),
        channels_last(is_channels_last(x)) {}

  int64_t share() const { return values / shares; }
  int64_t sample(int64_t group, int64_t member) const { return member * count + group; }
  // A block is whole pixels in channels_last, so that its values can be found in a tensor with more channels.
  int64_t block() const { return channels_last ? std::max<int64_t>(1, kBlock / channels) * channels : kBlock; }
  int64_t blocks() const { return (share() + block() - 1) / block(); }
  // Where value `at` of a sample lies in a tensor with the statistics' channels behind x's, and how many follow it.
  int64_t wide_offset(int64_t n, int64_t at) const {
    const int64_t start = n * (channels + shares) * pixels;
    return start + (channels_last ? at / channels * (channels + shares) : at);
  }
};

template <typename C>
FASTGAN_INLINE void add_loop(const C* __restrict__ x, C* __restrict__ sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
}
template <typename C>
FASTGAN_INLINE void square_loop(const C* __restrict__ x, const C* __restrict__ mean, C* __restrict__ sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += (x[i] - mean[i]) * (x[i] - mean[i]);
}
template <typename C>
FASTGAN_INLINE C deviation_loop(C* __restrict__ variance, C size, C eps, int64_t n) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    variance[i] = std::sqrt(variance[i] / size + eps);
    sum += variance[i];
  }
  return sum;
}
template <typename C>
FASTGAN_INLINE void gradient_loop(const C* x, const C* mean, const C* deviation, const C* gy, C w, C* gx, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) gx[i] = gy[i] + w * (x[i] - mean[i]) / deviation[i];
}
FASTGAN_MULTIVERSION void add(const float* x, float* sum, int64_t n) { add_loop(x, sum, n); }
FASTGAN_MULTIVERSION void add_square(const float* x, const float* mean, float* sum, int64_t n) {
  square_loop(x, mean, sum, n);
}
FASTGAN_MULTIVERSION float deviations(float* variance, float size, float eps, int64_t n) {
  return deviation_loop(variance, size, eps, n);
}
FASTGAN_MULTIVERSION void gradient(const float* x, const float* mean, const float* deviation, const float* gy, float w,
                                   float* gx, int64_t n) {
  gradient_loop(x, mean, deviation, gy, w, gx, n);
}
void add(const double* x, double* sum, int64_t n) { add_loop(x, sum, n); }
void add_square(const double* x, const double* mean, double* sum, int64_t n) { square_loop(x, mean, sum, n); }
double deviations(double* variance, double size, double eps, int64_t n) {
  return deviation_loop(variance, size, eps, n);
}
void gradient(const double* x, const double* mean, const double* deviation, const double* gy, double w, double* gx,
              int64_t n) {
  gradient_loop(x, mean, deviation, gy, w, gx, n);
}

// Mean and standard deviation over one group of one block of values.
template <typename T>
struct Spread {
  using C = accumulate_t<T>;
  const Groups& groups;
  const T* x;
  double eps;
  std::vector<C> mean, deviation, buffer;

  Spread(const Groups& g, const T* data, double epsilon)
      : groups(g), x(data), eps(epsilon), mean(g.block()), deviation(g.block()), buffer(g.block()) {}

  const C* values(int64_t group, int64_t member, int64_t at, int64_t n) {
    return as_compute(x + groups.sample(group, member) * groups.values + at, n, buffer.data());
  }

  // The sum of the block's deviations.
  C measure(int64_t group, int64_t at, int64_t n) {
    std::fill(mean.begin(), mean.end(), C(0));
    std::fill(deviation.begin(), deviation.end(), C(0));
    for (int64_t member = 0; member < groups.size; ++member) add(values(group, member, at, n), mean.data(), n);
    for (int64_t i = 0; i < n; ++i) mean[i] /= static_cast<C>(groups.size);
    for (int64_t member = 0; member < groups.size; ++member) {
      add_square(values(group, member, at, n), mean.data(), deviation.data(), n);
    }
    return deviations(deviation.data(), static_cast<C>(groups.size), static_cast<C>(eps), n);
  }
};

// Calls f(group, share, block of the share, first value in the sample, values) for all blocks, in parallel.
template <typename F>
void for_blocks(const Groups& g, F&& f) {
  const int64_t per_share = g.blocks(), grain = std::max<int64_t>(1, kGrainElements / (g.block() * g.size));
  torch::stable::parallel_for(0, g.count * g.shares * per_share, grain, [&](int64_t begin, int64_t end) {
    auto worker = f();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t statistic = i / per_share, first = i % per_share * g.block();
      const int64_t at = statistic % g.shares * g.share() + first;
      worker(i, statistic, at, std::min(g.block(), g.share() - first));
    }
  });
}

// Copies n values of a sample between a dense run and a tensor with the statistics' channels behind x's.
template <typename T>
void put_values(const Groups& g, const T* run, T* wide, int64_t n) {
  const int64_t chunk = g.channels_last ? g.channels : n, skip = g.channels_last ? g.channels + g.shares : n;
  for (int64_t i = 0; i < n / chunk; ++i) std::copy(run + i * chunk, run + (i + 1) * chunk, wide + i * skip);
}
template <typename T>
void take_values(const Groups& g, const T* wide, T* run, int64_t n) {
  const int64_t chunk = g.channels_last ? g.channels : n, skip = g.channels_last ? g.channels + g.shares : n;
  for (int64_t i = 0; i < n / chunk; ++i) std::copy(wide + i * skip, wide + i * skip + chunk, run + i * chunk);
}

// Calls f(offset) for each pixel of a statistic's channel in every sample of its group.
template <typename F>
void for_statistic(const Groups& g, int64_t statistic, F&& f) {
  const int64_t wide = g.channels + g.shares, channel = g.channels + statistic % g.shares;
  for (int64_t member = 0; member < g.size; ++member) {
    const int64_t start = g.sample(statistic / g.shares, member) * wide * g.pixels;
    for (int64_t p = 0; p < g.pixels; ++p) f(start + (g.channels_last ? p * wide + channel : channel * g.pixels + p));
  }
}

template <typename T>
void run_forward(const Groups& g, const T* x, T* y, double eps) {
  using C = accumulate_t<T>;
  std::vector<C> partial(g.count * g.shares * g.blocks());
  for_blocks(g, [&] {
    return [&, spread = Spread<T>(g, x, eps)](int64_t i, int64_t statistic, int64_t at, int64_t n) mutable {
      partial[i] = spread.measure(statistic / g.shares, at, n);
      for (int64_t member = 0; member < g.size; ++member) {
        const int64_t sample = g.sample(statistic / g.shares, member);
        put_values(g, x + sample * g.values + at, y + g.wide_offset(sample, at), n);
      }
    };
  });
  for (int64_t statistic = 0; statistic < g.count * g.shares; ++statistic) {
    double sum = 0;
    for (int64_t i = 0; i < g.blocks(); ++i) sum += partial[statistic * g.blocks() + i];
    const T value = static_cast<T>(static_cast<C>(sum / static_cast<double>(g.share())));
    for_statistic(g, statistic, [&](int64_t offset) { y[offset] = value; });
  }
}

template <typename T>
void run_backward(const Groups& g, const T* gy, const T* x, T* gx, double eps) {
  using C = accumulate_t<T>;
  std::vector<C> weights(g.count * g.shares);
  for (int64_t statistic = 0; statistic < g.count * g.shares; ++statistic) {
    double sum = 0;
    for_statistic(g, statistic, [&](int64_t offset) { sum += static_cast<C>(gy[offset]); });
    weights[statistic] = static_cast<C>(sum / static_cast<double>(g.size * g.share()));
  }
  for_blocks(g, [&] {
    return [&, spread = Spread<T>(g, x, eps), cotangent = std::vector<T>(g.block()), wide = std::vector<C>(g.block()),
            result = std::vector<C>(g.block())](int64_t, int64_t statistic, int64_t at, int64_t n) mutable {
      const int64_t group = statistic / g.shares;
      spread.measure(group, at, n);
      for (int64_t member = 0; member < g.size; ++member) {
        const int64_t sample = g.sample(group, member);
        take_values(g, gy + g.wide_offset(sample, at), cotangent.data(), n);
        T* const to = gx + sample * g.values + at;
        C* const out = result_buffer(to, result.data());
        gradient(spread.values(group, member, at, n), spread.mean.data(), spread.deviation.data(),
                 as_compute(cotangent.data(), n, wide.data()), weights[statistic], out, n);
        flush(out, to, n);
      }
    };
  });
}

Tensor minibatch_stddev(const Tensor& x, int64_t group_size, int64_t num_channels, double eps) {
  const Groups groups(x, group_size, num_channels);
  Tensor y =
      empty_dense({x.size(0), x.size(1) + num_channels, x.size(2), x.size(3)}, x.scalar_type(), groups.channels_last);
  const Tensor source = in_layout(x, groups.channels_last);
  dispatch_dtype("minibatch_stddev", x.scalar_type(),
                 [&]<typename T>() { run_forward(groups, source.const_data_ptr<T>(), y.mutable_data_ptr<T>(), eps); });
  return y;
}

Tensor minibatch_stddev_grad(const Tensor& gy, const Tensor& x, int64_t group_size, int64_t num_channels, double eps) {
  const Groups groups(x, group_size, num_channels);
  const Tensor source = in_layout(x, groups.channels_last), cotangent = in_layout(gy, groups.channels_last);
  Tensor gx = empty_image(x, x.scalar_type(), groups.channels_last);
  dispatch_dtype("minibatch_stddev_grad", x.scalar_type(), [&]<typename T>() {
    run_backward(groups, cotangent.const_data_ptr<T>(), source.const_data_ptr<T>(), gx.mutable_data_ptr<T>(), eps);
  });
  return gx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("minibatch_stddev", TORCH_BOX(&minibatch_stddev));
  m.impl("minibatch_stddev_grad", TORCH_BOX(&minibatch_stddev_grad));
}

}  // namespace fastgan
