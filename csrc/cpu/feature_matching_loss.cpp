// Feature matching: the weighted mean of |fake - real| or (fake - real)^2 over lists of maps, its gradient, and the
// gradient of that.
//
// The gradient of l1 needs only the sign of every difference. The forward pass, which reads both sides once, keeps it
// in two bits, so that the backward pass reads 1/16 of one side and writes the gradient. Signs are in blocks of 256
// values: bits 2k and 2k + 1 of word j belong to value 16 k + j, so that packing and unpacking never cross the lanes of
// a vector.

#include "tile.h"

#include <cmath>
#include <limits>

namespace fastgan {
namespace {

using Maps = std::vector<Tensor>;

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = kLanes * 16;
static_assert(kTile % kBlock == 0 && kTaskElements % kTile == 0);

int64_t sign_words(int64_t elements) { return (elements + kBlock - 1) / kBlock * kLanes; }

// Two bits per difference: 1 above zero, 2 below, 0 equal, 3 NaN (both comparisons fail).
template <typename C>
FASTGAN_INLINE int32_t sign_code(C difference) {
  return static_cast<int32_t>(!(difference <= C(0))) | (static_cast<int32_t>(!(difference >= C(0))) << 1);
}

template <typename C>
FASTGAN_INLINE void pack_block(const C* __restrict__ difference, int32_t* __restrict__ words) {
  int32_t packed[kLanes] = {};
  for (int k = 0; k < 16; ++k) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      packed[j] |= sign_code(difference[k * kLanes + j]) << (2 * k);
    }
  }
  for (int j = 0; j < kLanes; ++j) {
    words[j] = packed[j];
  }
}

// The sum of |fake - real| * weight over a tile, and its signs where words is not null. weight may be null: ones.
template <typename C>
FASTGAN_INLINE C l1_tile(const C* __restrict__ fake, const C* __restrict__ real, const C* __restrict__ weight,
                         int64_t count, int32_t* __restrict__ words) {
  C sum = 0;
  C difference[kTile];
  if (weight == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      difference[i] = fake[i] - real[i];
      sum += difference[i] < C(0) ? -difference[i] : difference[i];
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      difference[i] = fake[i] - real[i];
      sum += weight[i] * (difference[i] < C(0) ? -difference[i] : difference[i]);
    }
  }
  if (words != nullptr) {
    const int64_t padded = (count + kBlock - 1) / kBlock * kBlock;
    for (int64_t i = count; i < padded; ++i) {
      difference[i] = 0;
    }
    for (int64_t i = 0; i < padded; i += kBlock) {
      pack_block(difference + i, words + i / kBlock * kLanes);
    }
  }
  return sum;
}

template <typename C>
FASTGAN_INLINE C l2_tile(const C* __restrict__ fake, const C* __restrict__ real, const C* __restrict__ weight,
                         int64_t count) {
  C sum = 0;
  if (weight == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      sum += (fake[i] - real[i]) * (fake[i] - real[i]);
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      sum += weight[i] * ((fake[i] - real[i]) * (fake[i] - real[i]));
    }
  }
  return sum;
}

// slope[i] = factor * sign of value i.
template <typename C>
FASTGAN_INLINE void unpack_tile(const int32_t* __restrict__ words, int64_t count, C factor, C* __restrict__ slope) {
  const C nan = std::numeric_limits<C>::quiet_NaN();
  int64_t start = 0;
  for (; start + kBlock <= count; start += kBlock, words += kLanes) {
    for (int k = 0; k < 16; ++k) {
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        const int32_t code = (words[j] >> (2 * k)) & 3;
        const C sign = static_cast<C>((code & 1) - (code >> 1)) * factor;
        slope[start + k * kLanes + j] = code == 3 ? nan : sign;
      }
    }
  }
  for (int64_t i = 0; start + i < count; ++i) {
    const int32_t code = (words[i % kLanes] >> (2 * (i / kLanes))) & 3;
    slope[start + i] = code == 3 ? nan : static_cast<C>((code & 1) - (code >> 1)) * factor;
  }
}

template <typename C>
FASTGAN_INLINE void l2_slope_tile(const C* __restrict__ fake, const C* __restrict__ real, int64_t count, C factor,
                                  C* __restrict__ slope) {
  for (int64_t i = 0; i < count; ++i) {
    slope[i] = factor * (fake[i] - real[i]);
  }
}

template <typename C>
FASTGAN_INLINE void multiply_tile(C factor, const C* x, const C* y, int64_t count, C* target) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    target[i] = factor * x[i] * y[i];
  }
}

template <typename C>
FASTGAN_INLINE C dot_tile(const C* x, const C* y, int64_t count) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    sum += x[i] * y[i];
  }
  return sum;
}

#define FASTGAN_CLONES(C)                                                                                        \
  FASTGAN_MULTIVERSION C l1_clone(const C* f, const C* r, const C* w, int64_t n, int32_t* words) {               \
    return l1_tile(f, r, w, n, words);                                                                           \
  }                                                                                                              \
  FASTGAN_MULTIVERSION C l2_clone(const C* f, const C* r, const C* w, int64_t n) { return l2_tile(f, r, w, n); } \
  FASTGAN_MULTIVERSION void unpack_clone(const int32_t* words, int64_t n, C factor, C* slope) {                  \
    unpack_tile(words, n, factor, slope);                                                                        \
  }                                                                                                              \
  FASTGAN_MULTIVERSION void l2_slope_clone(const C* f, const C* r, int64_t n, C factor, C* slope) {              \
    l2_slope_tile(f, r, n, factor, slope);                                                                       \
  }                                                                                                              \
  FASTGAN_MULTIVERSION void multiply_clone(C factor, const C* x, const C* y, int64_t n, C* target) {             \
    multiply_tile(factor, x, y, n, target);                                                                      \
  }                                                                                                              \
  FASTGAN_MULTIVERSION C dot_clone(const C* x, const C* y, int64_t n) { return dot_tile(x, y, n); }
FASTGAN_CLONES(float)
FASTGAN_CLONES(double)
#undef FASTGAN_CLONES

struct Setting {
  const Maps& fake;
  const Maps& real;
  const Maps& masks;  // none, or one per map: [N, 1, ...], compute dtype, contiguous
  bool l1;
  bool want_fake, want_real;
};

struct Run {
  size_t map;
  int64_t start, count;
  int64_t words;  // where its signs start
};

Setting checked(const Maps& fake, const Maps& real, const Maps& masks, const std::string& kind, bool want_fake,
                bool want_real) {
  STD_TORCH_CHECK(kind == "l1" || kind == "l2", "feature_matching_loss: kind must be l1 or l2, got ", kind);
  STD_TORCH_CHECK(fake.size() == real.size() && (masks.empty() || masks.size() == fake.size()),
                  "feature_matching_loss: fake, real and masks must have the same number of maps");
  for (size_t m = 0; m < fake.size(); ++m) {
    check_dense("feature_matching_loss", "every map", fake[m]);
    STD_TORCH_CHECK(same_order(fake[m], real[m]),
                    "feature_matching_loss: both sides of a map must have one memory order");
  }
  return {fake, real, masks, kind == "l1", want_fake, want_real};
}

std::vector<Run> make_runs(const Maps& maps) {
  std::vector<Run> runs;
  int64_t words = 0;
  for (size_t m = 0; m < maps.size(); ++m) {
    const int64_t total = maps[m].numel();
    for (int64_t start = 0; start < total; start += kTaskElements) {
      runs.push_back({m, start, std::min(kTaskElements, total - start), words + start / kBlock * kLanes});
    }
    words += sign_words(total);
  }
  return runs;
}

void check_signs(const Setting& setting, const Tensor& signs) {
  int64_t words = 0;
  for (const Tensor& x : setting.fake) {
    words += sign_words(x.numel());
  }
  STD_TORCH_CHECK(!setting.l1 || signs.numel() == words, "feature_matching_loss: signs must have ", words,
                  " words, got ", signs.numel(), ": the forward pass was not told to keep them");
}

template <typename F>
void for_runs(const std::vector<Run>& runs, const F& f) {
  torch::stable::parallel_for(0, static_cast<int64_t>(runs.size()), kParallelElements / kTaskElements,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  f(i, runs[i]);
                                }
                              });
}

// The mask's values for elements start .. start + count of a map, in the map's memory order; null without masks.
template <typename C>
const C* load_weights(const Setting& setting, size_t map, int64_t start, int64_t count, C* buffer) {
  if (setting.masks.empty()) {
    return nullptr;
  }
  const C* mask = setting.masks[map].const_data_ptr<C>();
  const Tensor& x = setting.fake[map];
  const int64_t channels = x.size(1);
  if (!x.is_contiguous()) {
    for (int64_t i = 0; i < count; ++i) {
      buffer[i] = mask[(start + i) / channels];
    }
    return buffer;
  }
  const int64_t plane = setting.masks[map].numel() / x.size(0);
  for (int64_t i = 0; i < count;) {
    const int64_t sample = (start + i) / (plane * channels);
    const int64_t pixel = (start + i) % plane;
    const int64_t length = std::min(count - i, plane - pixel);
    std::copy_n(mask + sample * plane + pixel, length, buffer + i);
    i += length;
  }
  return buffer;
}

template <typename T>
double forward_run(const Setting& setting, const Run& run, int32_t* signs) {
  using C = accumulate_t<T>;
  const T* fake = setting.fake[run.map].const_data_ptr<T>() + run.start;
  const T* real = setting.real[run.map].const_data_ptr<T>() + run.start;
  C fake_buffer[kTile], real_buffer[kTile], weight_buffer[kTile];
  double total = 0;
  for_tiles(run.count, [&](int64_t start, int64_t count) {
    const C* f = as_compute(fake + start, count, fake_buffer);
    const C* r = as_compute(real + start, count, real_buffer);
    const C* w = load_weights(setting, run.map, run.start + start, count, weight_buffer);
    int32_t* words = signs == nullptr ? nullptr : signs + run.words + start / kBlock * kLanes;
    total += setting.l1 ? l1_clone(f, r, w, count, words) : l2_clone(f, r, w, count);
  });
  return total;
}

// weight / (elements, or the sum of the mask over them); 0 where nothing is averaged.
template <typename C>
double mean_factor(const Setting& setting, size_t map, double weight) {
  double count = static_cast<double>(setting.fake[map].numel());
  if (!setting.masks.empty()) {
    const C* mask = setting.masks[map].const_data_ptr<C>();
    count = 0;
    for (int64_t i = 0; i < setting.masks[map].numel(); ++i) {
      count += mask[i];
    }
    count *= static_cast<double>(setting.fake[map].size(1));
  }
  return count == 0 ? 0.0 : weight / count;
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;

ForwardResult feature_matching_loss(const Maps& fake, const Maps& real, const Maps& masks,
                                    const std::vector<double>& map_weight, const std::string& kind, bool keep_signs) {
  const Setting setting = checked(fake, real, masks, kind, false, false);
  const std::vector<Run> runs = make_runs(fake);
  int64_t words = 0;
  for (const Tensor& x : fake) {
    words += keep_signs && setting.l1 ? sign_words(x.numel()) : 0;
  }
  Tensor signs = empty_vector(words, ScalarType::Int);
  return dispatch_dtype("feature_matching_loss", fake[0].scalar_type(), [&]<typename T>() -> ForwardResult {
    using C = accumulate_t<T>;
    std::vector<double> sums(runs.size()), means(fake.size());
    int32_t* target = words == 0 ? nullptr : signs.mutable_data_ptr<int32_t>();
    for_runs(runs, [&](int64_t i, const Run& run) { sums[i] = forward_run<T>(setting, run, target); });
    for (size_t i = 0; i < runs.size(); ++i) {
      means[runs[i].map] += sums[i];
    }
    const auto compute = std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;
    Tensor factors = empty_vector(static_cast<int64_t>(fake.size()), compute);
    Tensor loss = empty_scalar(compute);
    double total = 0;
    for (size_t m = 0; m < fake.size(); ++m) {
      const double factor = mean_factor<C>(setting, m, map_weight[m]);
      factors.mutable_data_ptr<C>()[m] = static_cast<C>(factor);
      total += factor * means[m];
    }
    *loss.mutable_data_ptr<C>() = static_cast<C>(total);
    return {loss, signs, factors};
  });
}

// target = factor * mask * (sign, or 2 (fake - real)).
template <typename T>
void slope_tile(const Setting& setting, const Run& run, int64_t start, int64_t count, const int32_t* signs,
                accumulate_t<T> factor, accumulate_t<T>* target) {
  using C = accumulate_t<T>;
  C buffer[kTile];
  if (setting.l1) {
    unpack_clone(signs + run.words + start / kBlock * kLanes, count, factor, target);
  } else {
    C second[kTile];
    const int64_t offset = run.start + start;
    const C* f = as_compute(setting.fake[run.map].const_data_ptr<T>() + offset, count, buffer);
    const C* r = as_compute(setting.real[run.map].const_data_ptr<T>() + offset, count, second);
    l2_slope_clone(f, r, count, C(2) * factor, target);
  }
  const C* weight = load_weights(setting, run.map, run.start + start, count, buffer);
  if (weight != nullptr) {
    multiply_clone(C(1), target, weight, count, target);
  }
}

Maps empty_gradients(const Setting& setting) {
  Maps gradients;
  for (const auto& [maps, wanted] : {std::pair{&setting.fake, setting.want_fake}, {&setting.real, setting.want_real}}) {
    for (size_t m = 0; wanted && m < maps->size(); ++m) {
      gradients.push_back(empty_dense_like((*maps)[m]));
    }
  }
  return gradients;
}

// Calls f(index among the wanted gradients, sign) for the wanted sides of a map.
template <typename F>
void for_sides(const Setting& setting, size_t map, const F& f) {
  if (setting.want_fake) {
    f(map, 1);
  }
  if (setting.want_real) {
    f(map + (setting.want_fake ? setting.fake.size() : 0), -1);
  }
}

Maps feature_matching_loss_bwd(const Tensor& grad_loss, const Tensor& signs, const Tensor& factors, const Maps& fake,
                               const Maps& real, const Maps& masks, const std::string& kind, bool want_fake,
                               bool want_real) {
  const Setting setting = checked(fake, real, masks, kind, want_fake, want_real);
  check_signs(setting, signs);
  Maps gradients = empty_gradients(setting);
  const std::vector<Run> runs = make_runs(fake);
  dispatch_dtype("feature_matching_loss_bwd", fake[0].scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    const C g = *grad_loss.const_data_ptr<C>();
    for_runs(runs, [&](int64_t, const Run& run) {
      const C factor = factors.const_data_ptr<C>()[run.map] * g;
      for_sides(setting, run.map, [&](size_t index, int sign) {
        T* target = gradients[index].mutable_data_ptr<T>() + run.start;
        for_tiles(run.count, [&](int64_t start, int64_t count) {
          C buffer[kTile];
          C* tile = result_buffer(target + start, buffer);
          slope_tile<T>(setting, run, start, count, signs.const_data_ptr<int32_t>(), C(sign) * factor, tile);
          flush(tile, target + start, count);
        });
      });
    });
  });
  return gradients;
}

// One run of the second order: writes the gradients of its map and returns the sum of cotangent * slope.
template <typename T>
double second_order_run(const Setting& setting, const Run& run, const Maps& cotangents, const int32_t* signs,
                        accumulate_t<T> factor, accumulate_t<T> g, Maps& gradients) {
  using C = accumulate_t<T>;
  double total = 0;
  for_tiles(run.count, [&](int64_t start, int64_t count) {
    C slope[kTile], buffer[kTile], weights[kTile], result[kTile], u[kTile] = {};
    const int64_t offset = run.start + start;
    for_sides(setting, run.map, [&](size_t index, int sign) {
      const C* v = as_compute(cotangents[index].const_data_ptr<T>() + offset, count, buffer);
      for (int64_t i = 0; i < count; ++i) {
        u[i] += C(sign) * v[i];
      }
    });
    slope_tile<T>(setting, run, start, count, signs, factor, slope);
    total += dot_clone(u, slope, count);
    // The curvature of (fake - real)^2 is 2, that of |fake - real| is 0 almost everywhere.
    const C* weight = load_weights(setting, run.map, offset, count, weights);
    for (int64_t i = 0; i < count; ++i) {
      result[i] = (setting.l1 ? C(0) : C(2) * factor * g) * (weight == nullptr ? C(1) : weight[i]);
    }
    for_sides(setting, run.map, [&](size_t index, int sign) {
      T* target = gradients[index].mutable_data_ptr<T>() + offset;
      C* tile = result_buffer(target, buffer);
      multiply_clone(C(sign), result, u, count, tile);
      flush(tile, target, count);
    });
  });
  return total;
}

// The gradient of grad_loss, then those of the wanted maps, for cotangents of feature_matching_loss_bwd's results.
Maps feature_matching_loss_bwd_bwd(const Maps& cotangents, const Tensor& grad_loss, const Tensor& signs,
                                   const Tensor& factors, const Maps& fake, const Maps& real, const Maps& masks,
                                   const std::string& kind, bool want_fake, bool want_real) {
  const Setting setting = checked(fake, real, masks, kind, want_fake, want_real);
  check_signs(setting, signs);
  Maps gradients = empty_gradients(setting);
  Maps ordered;
  for (size_t i = 0; i < gradients.size(); ++i) {
    ordered.push_back(in_order_of(cotangents[i], gradients[i]));
  }
  const std::vector<Run> runs = make_runs(fake);
  Tensor grad_grad_loss = empty_scalar(grad_loss.scalar_type());
  dispatch_dtype("feature_matching_loss_bwd_bwd", fake[0].scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    const C g = *grad_loss.const_data_ptr<C>();
    std::vector<double> sums(runs.size());
    for_runs(runs, [&](int64_t i, const Run& run) {
      const C factor = factors.const_data_ptr<C>()[run.map];
      sums[i] = second_order_run<T>(setting, run, ordered, signs.const_data_ptr<int32_t>(), factor, g, gradients);
    });
    double total = 0;
    for (const double sum : sums) {
      total += sum;
    }
    *grad_grad_loss.mutable_data_ptr<C>() = static_cast<C>(total);
  });
  gradients.insert(gradients.begin(), grad_grad_loss);
  return gradients;
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("feature_matching_loss", TORCH_BOX(&fastgan::feature_matching_loss));
  m.impl("feature_matching_loss_bwd", TORCH_BOX(&fastgan::feature_matching_loss_bwd));
  m.impl("feature_matching_loss_bwd_bwd", TORCH_BOX(&fastgan::feature_matching_loss_bwd_bwd));
}
