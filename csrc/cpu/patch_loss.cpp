// Adversarial losses over patch maps: value, hits and slopes in one pass, the gradient from the slopes, and the
// gradient of that.
//
// Each element contributes scale * f(x) to the loss, with one of four functions f and a constant called its anchor:
//   bce     softplus(x) - anchor * x     the anchor is the label
//   square  (x - anchor)^2               the target
//   linear  anchor * x                   the sign
//   hinge   max(0, 1 + anchor * x)       the sign
// A pairing applies f to real - fake. The Python op turns modes and sides into these.

#include "tile.h"
#include "vector_math.h"

namespace fastgan {
namespace {

enum class Form { kBce, kSquare, kLinear, kHinge };

Form parse_form(const std::string& name) {
  const std::string names[] = {"bce", "square", "linear", "hinge"};
  const auto* found = std::find(std::begin(names), std::end(names), name);
  STD_TORCH_CHECK(found != std::end(names), "patch_loss: form must be bce, square, linear or hinge, got ", name);
  return static_cast<Form>(found - std::begin(names));
}

// f and f' at x. Selects keep a NaN: a comparison with it is false, and the false branch passes it on.
template <Form F, typename C>
FASTGAN_INLINE void evaluate(C x, C anchor, C& value, C& slope) {
  if constexpr (F == Form::kBce) {
    const C e = vexp_nonpositive(x < C(0) ? x : -x);
    const C high = C(1) / (C(1) + e);
    const C low = e * high;
    value = (x > C(0) ? x : C(0)) - anchor * x + vlog1p_unit(e);
    // sigmoid(x) - anchor would lose a confident, right answer's slope to cancellation.
    slope = (C(1) - anchor) * (x < C(0) ? low : high) - anchor * (x < C(0) ? high : low);
  } else if constexpr (F == Form::kSquare) {
    value = (x - anchor) * (x - anchor);
    slope = C(2) * (x - anchor);
  } else if constexpr (F == Form::kLinear) {
    value = anchor * x;
    slope = anchor;
  } else {
    const C margin = C(1) + anchor * x;
    value = margin < C(0) ? C(0) : margin;
    slope = margin <= C(0) ? C(0) : anchor;
  }
}

// f'' at x; zero almost everywhere for linear and hinge.
template <Form F, typename C>
FASTGAN_INLINE C curvature(C x) {
  if constexpr (F == Form::kBce) {
    const C e = vexp_nonpositive(x < C(0) ? x : -x);
    const C high = C(1) / (C(1) + e);
    return e * high * high;
  } else {
    return F == Form::kSquare ? C(2) : C(0);
  }
}

template <typename C>
struct TileResult {
  C sum = 0;          // of f
  int32_t above = 0;  // elements > cut
  int32_t below = 0;  // elements <= cut; a NaN is neither
};

template <Form F, typename C>
FASTGAN_INLINE TileResult<C> forward_tile(const C* __restrict__ x, int64_t count, C anchor, C cut,
                                          C* __restrict__ slopes) {
  C sum = 0;
  int32_t above = 0, below = 0;
  if (slopes != nullptr) {
#pragma omp simd reduction(+ : sum, above, below)
    for (int64_t i = 0; i < count; ++i) {
      C value, slope;
      evaluate<F>(x[i], anchor, value, slope);
      sum += value;
      slopes[i] = slope;
      above += x[i] > cut;
      below += x[i] <= cut;
    }
  } else {
#pragma omp simd reduction(+ : sum, above, below)
    for (int64_t i = 0; i < count; ++i) {
      C value, slope;
      evaluate<F>(x[i], anchor, value, slope);
      sum += value;
      above += x[i] > cut;
      below += x[i] <= cut;
    }
  }
  return {sum, above, below};
}

template <typename C>
FASTGAN_INLINE TileResult<C> forward_tile_any(Form form, const C* x, int64_t count, C anchor, C cut, C* slopes) {
  switch (form) {
    case Form::kBce:
      return forward_tile<Form::kBce>(x, count, anchor, cut, slopes);
    case Form::kSquare:
      return forward_tile<Form::kSquare>(x, count, anchor, cut, slopes);
    case Form::kLinear:
      return forward_tile<Form::kLinear>(x, count, anchor, cut, slopes);
    default:
      return forward_tile<Form::kHinge>(x, count, anchor, cut, slopes);
  }
}

// result[i] = factor * cotangent[i] * f''(x[i]); returns the sum of cotangent * slope.
template <Form F, typename C>
FASTGAN_INLINE C curvature_tile(const C* __restrict__ x, const C* __restrict__ cotangent, const C* __restrict__ slopes,
                                int64_t count, C factor, C* __restrict__ result) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    sum += cotangent[i] * slopes[i];
    result[i] = factor * cotangent[i] * curvature<F>(x[i]);
  }
  return sum;
}

template <typename C>
FASTGAN_INLINE C curvature_tile_any(Form form, const C* x, const C* cotangent, const C* slopes, int64_t count, C factor,
                                    C* result) {
  switch (form) {
    case Form::kBce:
      return curvature_tile<Form::kBce>(x, cotangent, slopes, count, factor, result);
    case Form::kSquare:
      return curvature_tile<Form::kSquare>(x, cotangent, slopes, count, factor, result);
    default:
      return curvature_tile<Form::kLinear>(x, cotangent, slopes, count, factor, result);
  }
}

FASTGAN_MULTIVERSION TileResult<float> forward_tile_clone(Form form, const float* x, int64_t count, float anchor,
                                                          float cut, float* slopes) {
  return forward_tile_any(form, x, count, anchor, cut, slopes);
}
FASTGAN_MULTIVERSION TileResult<double> forward_tile_clone(Form form, const double* x, int64_t count, double anchor,
                                                           double cut, double* slopes) {
  return forward_tile_any(form, x, count, anchor, cut, slopes);
}
FASTGAN_MULTIVERSION float curvature_tile_clone(Form form, const float* x, const float* cotangent, const float* slopes,
                                                int64_t count, float factor, float* result) {
  return curvature_tile_any(form, x, cotangent, slopes, count, factor, result);
}
FASTGAN_MULTIVERSION double curvature_tile_clone(Form form, const double* x, const double* cotangent,
                                                 const double* slopes, int64_t count, double factor, double* result) {
  return curvature_tile_any(form, x, cotangent, slopes, count, factor, result);
}

// a[i] = p * x[i] + q * y[i] and a[i] = p * x[i]; `a` may be one of the others.
template <typename C>
FASTGAN_INLINE void combine_tile(C p, const C* x, C q, const C* y, int64_t count, C* a) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    a[i] = p * x[i] + q * y[i];
  }
}
template <typename C>
FASTGAN_INLINE void scale_tile(C p, const C* x, int64_t count, C* a) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    a[i] = p * x[i];
  }
}
FASTGAN_MULTIVERSION void combine(float p, const float* x, float q, const float* y, int64_t count, float* a) {
  combine_tile(p, x, q, y, count, a);
}
FASTGAN_MULTIVERSION void combine(double p, const double* x, double q, const double* y, int64_t count, double* a) {
  combine_tile(p, x, q, y, count, a);
}
FASTGAN_MULTIVERSION void scale(float p, const float* x, int64_t count, float* a) { scale_tile(p, x, count, a); }
FASTGAN_MULTIVERSION void scale(double p, const double* x, int64_t count, double* a) { scale_tile(p, x, count, a); }

using Maps = std::vector<Tensor>;

// What the three kernels are told about the loss.
struct Setting {
  const Maps& real;
  const Maps& fake;
  const std::optional<Tensor>& sample_weight;  // [N], compute dtype, contiguous
  const std::vector<double>& map_scale;
  bool paired;
  bool real_slopes, fake_slopes;  // of a pairing: either
};

// Consecutive elements of one map and, where samples are weighted, of one sample.
struct Run {
  size_t map;
  bool fake;  // which side x is of; a pairing's x is real - fake, and this is false
  int64_t start, count;
  int64_t slope_start;  // in the slopes of all maps, one after the other; -1 for a side without
  double scale;         // map_scale * sample_weight / elements of the map
};

struct Plan {
  std::vector<Run> runs;
  int64_t elements = 0, slopes = 0;
};

template <typename C>
void plan_side(const Setting& setting, const Maps& maps, bool fake, bool slopes, Plan& plan) {
  const C* weight = setting.sample_weight ? setting.sample_weight->const_data_ptr<C>() : nullptr;
  for (size_t m = 0; m < maps.size(); ++m) {
    const int64_t total = maps[m].numel();
    const int64_t rows = weight != nullptr ? maps[m].size(0) : 1;
    const int64_t length = total == 0 ? 0 : total / rows;
    for (int64_t row = 0; row < rows && total > 0; ++row) {
      const double scale = setting.map_scale[m] * (weight != nullptr ? weight[row] : 1.0) / static_cast<double>(total);
      for (int64_t start = 0; start < length; start += kTaskElements) {
        const int64_t from = row * length + start;
        const int64_t slope_start = slopes ? plan.slopes + from : -1;
        plan.runs.push_back({m, fake, from, std::min(kTaskElements, length - start), slope_start, scale});
      }
    }
    plan.elements += total;
    plan.slopes += slopes ? total : 0;
  }
}

template <typename C>
Plan make_plan(const Setting& setting) {
  Plan plan;
  if (setting.paired) {
    plan_side<C>(setting, setting.real, false, setting.real_slopes || setting.fake_slopes, plan);
  } else {
    plan_side<C>(setting, setting.real, false, setting.real_slopes, plan);
    plan_side<C>(setting, setting.fake, true, setting.fake_slopes, plan);
  }
  return plan;
}

void check_slopes(const Plan& plan, const Tensor& slopes) {
  STD_TORCH_CHECK(slopes.numel() == plan.slopes, "patch_loss: slopes must have ", plan.slopes, " elements, got ",
                  slopes.numel());
}

template <typename F>
void for_runs(const Plan& plan, const F& f) {
  const int64_t count = static_cast<int64_t>(plan.runs.size());
  const int64_t grain = std::max<int64_t>(1, kParallelElements * count / std::max<int64_t>(1, plan.elements));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      f(i, plan.runs[i]);
    }
  });
}

void check_maps(const Setting& setting) {
  for (const Maps* side : {&setting.real, &setting.fake}) {
    STD_TORCH_CHECK(side->empty() || side->size() == setting.map_scale.size(), "patch_loss: ", setting.map_scale.size(),
                    " map scales for ", side->size(), " maps");
    for (const Tensor& x : *side) {
      check_dense("patch_loss", "every map", x);
    }
  }
  for (size_t m = 0; setting.paired && m < setting.real.size(); ++m) {
    STD_TORCH_CHECK(same_order(setting.real[m], setting.fake[m]), "patch_loss: paired maps must have one memory order");
  }
}

// x of a run: a map's own elements, or real - fake.
template <typename T>
const accumulate_t<T>* load_logits(const Setting& setting, const Run& run, int64_t start, int64_t count,
                                   accumulate_t<T>* buffer, accumulate_t<T>* second) {
  const Maps& side = run.fake ? setting.fake : setting.real;
  const auto* x = as_compute(side[run.map].const_data_ptr<T>() + run.start + start, count, buffer);
  if (!setting.paired) {
    return x;
  }
  const auto* y = as_compute(setting.fake[run.map].const_data_ptr<T>() + run.start + start, count, second);
  combine(1, x, -1, y, count, buffer);
  return buffer;
}

struct RunResult {
  double sum;
  int64_t above, below;
};

template <typename T>
std::vector<RunResult> forward_runs(const Setting& setting, const Plan& plan, Form form, const double (&anchors)[2],
                                    double cut, accumulate_t<T>* slopes) {
  using C = accumulate_t<T>;
  std::vector<RunResult> results(plan.runs.size());
  for_runs(plan, [&](int64_t i, const Run& run) {
    C buffer[kTile], second[kTile];
    RunResult total = {0.0, 0, 0};
    for_tiles(run.count, [&](int64_t start, int64_t count) {
      const C* x = load_logits<T>(setting, run, start, count, buffer, second);
      C* slope = run.slope_start < 0 ? nullptr : slopes + run.slope_start + start;
      const auto tile =
          forward_tile_clone(form, x, count, static_cast<C>(anchors[run.fake]), static_cast<C>(cut), slope);
      total.sum += tile.sum;
      total.above += tile.above;
      total.below += tile.below;
    });
    results[i] = total;
  });
  return results;
}

// float[side][map]: the fraction of each map's elements that its side's critic should like to see where they are.
void write_accuracy(const Maps& maps, const std::vector<int64_t>& hits, Tensor& target) {
  float* out = target.mutable_data_ptr<float>();
  for (size_t m = 0; m < maps.size(); ++m) {
    out[m] =
        static_cast<float>(static_cast<double>(hits[m]) / static_cast<double>(std::max<int64_t>(1, maps[m].numel())));
  }
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

ForwardResult patch_loss(const Maps& real, const Maps& fake, const std::optional<Tensor>& sample_weight,
                         const std::vector<double>& map_scale, const std::string& form, double real_anchor,
                         double fake_anchor, double cut, bool paired, bool real_slopes, bool fake_slopes) {
  const Setting setting{real, fake, sample_weight, map_scale, paired, real_slopes, fake_slopes};
  check_maps(setting);
  const Tensor& first = real.empty() ? fake[0] : real[0];
  return dispatch_dtype("patch_loss", first.scalar_type(), [&]<typename T>() -> ForwardResult {
    using C = accumulate_t<T>;
    const Plan plan = make_plan<C>(setting);
    const auto compute = std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;
    Tensor slopes = empty_vector(plan.slopes, compute);
    const double anchors[2] = {real_anchor, fake_anchor};
    const auto results = forward_runs<T>(setting, plan, parse_form(form), anchors, cut, slopes.mutable_data_ptr<C>());

    double total = 0;
    std::vector<int64_t> real_hits(real.size()), fake_hits(fake.size());
    for (size_t i = 0; i < results.size(); ++i) {
      const Run& run = plan.runs[i];
      total += run.scale * results[i].sum;
      (run.fake ? fake_hits : real_hits)[run.map] += run.fake ? results[i].below : results[i].above;
    }
    Tensor loss = empty_scalar(compute);
    *loss.mutable_data_ptr<C>() = static_cast<C>(total);
    Tensor real_accuracy = empty_vector(static_cast<int64_t>(real.size()), ScalarType::Float);
    Tensor fake_accuracy = empty_vector(static_cast<int64_t>(fake.size()), ScalarType::Float);
    write_accuracy(real, real_hits, real_accuracy);
    write_accuracy(fake, paired ? real_hits : fake_hits, fake_accuracy);
    return {loss, real_accuracy, fake_accuracy, slopes};
  });
}

Maps empty_gradients(const Setting& setting) {
  Maps gradients;
  for (const auto& [maps, wanted] :
       {std::pair{&setting.real, setting.real_slopes}, {&setting.fake, setting.fake_slopes}}) {
    for (size_t m = 0; wanted && m < maps->size(); ++m) {
      gradients.push_back(empty_dense_like((*maps)[m]));
    }
  }
  return gradients;
}

// Where the gradients of a run's map are among the wanted ones; -1 for a side that wants none.
int64_t gradient_index(const Setting& setting, const Run& run, bool fake) {
  const bool wanted = fake ? setting.fake_slopes : setting.real_slopes;
  const int64_t offset = fake && setting.real_slopes ? static_cast<int64_t>(setting.real.size()) : 0;
  return wanted ? offset + static_cast<int64_t>(run.map) : -1;
}

// Both sides of a pairing share a run; its fake side takes the opposite sign.
template <typename F>
void for_sides(const Setting& setting, const Run& run, const F& f) {
  if (!setting.paired) {
    f(gradient_index(setting, run, run.fake), 1.0);
    return;
  }
  f(gradient_index(setting, run, false), 1.0);
  f(gradient_index(setting, run, true), -1.0);
}

template <typename T>
void scale_into(const accumulate_t<T>* source, double factor, int64_t count, T* target) {
  accumulate_t<T> buffer[kTile];
  accumulate_t<T>* tile = result_buffer(target, buffer);
  scale(static_cast<accumulate_t<T>>(factor), source, count, tile);
  flush(tile, target, count);
}

Maps patch_loss_bwd(const Tensor& grad_loss, const Tensor& slopes, const Maps& real, const Maps& fake,
                    const std::optional<Tensor>& sample_weight, const std::vector<double>& map_scale,
                    const std::string&, bool paired, bool real_slopes, bool fake_slopes) {
  const Setting setting{real, fake, sample_weight, map_scale, paired, real_slopes, fake_slopes};
  check_maps(setting);
  Maps gradients = empty_gradients(setting);
  dispatch_dtype("patch_loss_bwd", (real.empty() ? fake : real)[0].scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    const Plan plan = make_plan<C>(setting);
    check_slopes(plan, slopes);
    const double g = *grad_loss.const_data_ptr<C>();
    for_runs(plan, [&](int64_t, const Run& run) {
      for_sides(setting, run, [&](int64_t index, double sign) {
        if (index < 0) {
          return;
        }
        const C* source = slopes.const_data_ptr<C>() + run.slope_start;
        T* target = gradients[index].mutable_data_ptr<T>() + run.start;
        for_tiles(run.count, [&](int64_t start, int64_t count) {
          scale_into<T>(source + start, sign * run.scale * g, count, target + start);
        });
      });
    });
  });
  return gradients;
}

// The cotangent of a run's slopes: that of the one side, or real's minus fake's. Null if neither side wants gradients.
template <typename T>
const accumulate_t<T>* load_cotangent(const Setting& setting, const Run& run, const Maps& cotangents, int64_t start,
                                      int64_t count, accumulate_t<T>* buffer, accumulate_t<T>* second) {
  const accumulate_t<T>* loaded = nullptr;
  for_sides(setting, run, [&](int64_t index, double sign) {
    if (index < 0) {
      return;
    }
    const auto* v =
        as_compute(cotangents[index].const_data_ptr<T>() + run.start + start, count, loaded ? second : buffer);
    if (loaded != nullptr) {
      combine(1, loaded, static_cast<accumulate_t<T>>(sign), v, count, buffer);
      loaded = buffer;
    } else if (sign < 0) {
      scale(-1, v, count, buffer);
      loaded = buffer;
    } else {
      loaded = v;
    }
  });
  return loaded;
}

template <typename T>
double second_order_run(const Setting& setting, const Run& run, const Maps& cotangents, const accumulate_t<T>* slopes,
                        Form form, double g, Maps& gradients) {
  using C = accumulate_t<T>;
  C logits[kTile], second[kTile], cotangent_buffer[kTile], result[kTile];
  double total = 0;
  for_tiles(run.count, [&](int64_t start, int64_t count) {
    const C* v = load_cotangent<T>(setting, run, cotangents, start, count, cotangent_buffer, second);
    if (v == nullptr) {
      return;
    }
    const C* x = load_logits<T>(setting, run, start, count, logits, second);
    const C factor = static_cast<C>(run.scale * g);
    total += curvature_tile_clone(form, x, v, slopes + run.slope_start + start, count, factor, result);
    for_sides(setting, run, [&](int64_t index, double sign) {
      if (index >= 0) {
        scale_into<T>(result, sign, count, gradients[index].mutable_data_ptr<T>() + run.start + start);
      }
    });
  });
  return run.scale * total;
}

// The gradient of grad_loss, then those of the wanted maps, for cotangents of patch_loss_bwd's results.
Maps patch_loss_bwd_bwd(const Maps& cotangents, const Tensor& grad_loss, const Tensor& slopes, const Maps& real,
                        const Maps& fake, const std::optional<Tensor>& sample_weight,
                        const std::vector<double>& map_scale, const std::string& form, bool paired, bool real_slopes,
                        bool fake_slopes) {
  const Setting setting{real, fake, sample_weight, map_scale, paired, real_slopes, fake_slopes};
  check_maps(setting);
  Maps gradients = empty_gradients(setting);
  Maps ordered;
  for (size_t i = 0; i < gradients.size(); ++i) {
    ordered.push_back(in_order_of(cotangents[i], gradients[i]));
  }
  Tensor grad_grad_loss = empty_scalar(grad_loss.scalar_type());
  dispatch_dtype("patch_loss_bwd_bwd", (real.empty() ? fake : real)[0].scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    const Plan plan = make_plan<C>(setting);
    check_slopes(plan, slopes);
    const double g = *grad_loss.const_data_ptr<C>();
    std::vector<double> sums(plan.runs.size());
    for_runs(plan, [&](int64_t i, const Run& run) {
      sums[i] = second_order_run<T>(setting, run, ordered, slopes.const_data_ptr<C>(), parse_form(form), g, gradients);
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
  m.impl("patch_loss", TORCH_BOX(&fastgan::patch_loss));
  m.impl("patch_loss_bwd", TORCH_BOX(&fastgan::patch_loss_bwd));
  m.impl("patch_loss_bwd_bwd", TORCH_BOX(&fastgan::patch_loss_bwd_bwd));
}
