// norm_act: y = gain * act(weight * (x - mean) / sqrt(var + eps) + bias) with mean and variance per channel of a sample
// or of the batch, and its gradients of first and second order. The formulas are in norm_problem.h.

#include "norm_planes.h"
#include "norm_rows.h"
#include "recorded_calls.h"

namespace fastgan {
namespace {

using OptionalTensor = std::optional<Tensor>;

struct NormSettings {
  bool batch, fixed;
  double eps;
  Act act;
  double alpha, gain;
};

// NCHW with one pixel is the same memory as NHWC; of a batch, its channels lie side by side.
bool as_rows(const Tensor& x, bool channels_last) { return channels_last || x.size(2) * x.size(3) == 1; }

template <typename C>
NormProblem<C> make_problem(const Tensor& x, const NormSettings& s, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& h_weight, const OptionalTensor& h_bias,
                            const double* mean, const double* var) {
  return {x.size(0),
          x.size(1),
          x.size(2) * x.size(3),
          s.batch,
          s.fixed,
          s.eps,
          s.act,
          static_cast<C>(s.alpha),
          static_cast<C>(s.gain),
          {weight, C(1)},
          {bias, C(0)},
          {h_weight, C(0)},
          {h_bias, C(0)},
          mean,
          var};
}

// Sums per sample and channel as the gradient of a parameter, of its shape.
template <typename C>
void write_parameter_grad(const NormSums& sums, int64_t kind, int64_t n, const Tensor& out) {
  C* const to = out.mutable_data_ptr<C>();
  for (int64_t c = 0; c < sums.channels(); ++c) {
    if (out.dim() == 2) {
      for (int64_t i = 0; i < n; ++i) to[i * sums.channels() + c] = static_cast<C>(sums.at(kind, i, c));
      continue;
    }
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += sums.at(kind, i, c);
    to[c] = static_cast<C>(sum);
  }
}

// Uninitialised gradients of a parameter and of an image t, without elements where they are not wanted.
Tensor empty_parameter_grad(const Tensor& x, const OptionalTensor& t, bool wanted) {
  const auto dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return wanted ? torch::stable::new_empty(*t, t->sizes()) : torch::stable::new_empty(x, {0}, dtype);
}
Tensor empty_image_grad(const Tensor& t, bool channels_last, bool wanted) {
  return wanted ? empty_image(t, t.scalar_type(), channels_last) : torch::stable::new_empty(t, {0});
}
template <typename T>
T* data_if(const Tensor& t, bool wanted) {
  return wanted ? t.mutable_data_ptr<T>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> norm_act(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                            const OptionalTensor& mean, const OptionalTensor& var, bool batch,
                                            double eps, std::string act, double alpha, double gain) {
  const char* const op = "norm_act";
  const NormSettings settings{batch, mean.has_value(), eps, parse_act(op, act), alpha, gain};
  const bool channels_last = is_channels_last(x);
  const Tensor source = in_layout(x, channels_last);
  Tensor y = empty_image(x, x.scalar_type(), channels_last);
  const auto statistic = [&] {
    if (settings.fixed) return torch::stable::new_empty(x, {0}, ScalarType::Double);
    if (batch) return torch::stable::new_zeros(x, {x.size(1)}, ScalarType::Double);
    return torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Double);
  };
  Tensor new_mean = statistic(), new_var = statistic();
  if (x.numel() == 0) return {y, new_mean, new_var};
  dispatch_dtype(op, x.scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    const auto problem = make_problem<C>(x, settings, weight, bias, std::nullopt, std::nullopt,
                                         mean.value_or(new_mean).const_data_ptr<double>(),
                                         var.value_or(new_var).const_data_ptr<double>());
    const T* const from = source.const_data_ptr<T>();
    T* const to = y.mutable_data_ptr<T>();
    double *const of_mean = new_mean.mutable_data_ptr<double>(), *const of_var = new_var.mutable_data_ptr<double>();
    if (as_rows(x, channels_last)) {
      rows_forward<T, C>(problem, from, to, of_mean, of_var);
    } else {
      planes_forward<T, C>(problem, from, to, of_mean, of_var);
    }
  });
  return {y, new_mean, new_var};
}

// Instance norm of grouped images: each group is an image in NHWC, and stays in the caches from its moments to its
// results.
void grouped_forward(const NormProblem<float>& p, const float* x, float* y, double* mean, double* var,
                     const NormResidual<float>* residual) {
  const int64_t groups = p.c / kGroup, all = p.n * groups;
  const auto run = [&](int64_t i) {
    NormProblem<float> of_group = p;
    of_group.n = 1;
    of_group.c = kGroup;
    for (NormParameter<float>* const parameter : {&of_group.weight, &of_group.bias}) {
      if (parameter->data) parameter->data += i / groups * parameter->stride_n + i % groups * kGroup;
    }
    of_group.mean += i * kGroup;
    of_group.var += i * kGroup;
    const int64_t at = i * kGroup * p.pixels;
    NormResidual<float> added{};
    if (residual) added = {residual->data + at, residual->gain};
    rows_forward<float>(of_group, x + at, y + at, mean + i * kGroup, var + i * kGroup, residual ? &added : nullptr);
  };
  // Where there are fewer groups than threads, these share each of them.
  if (all < torch::stable::get_num_threads()) {
    for (int64_t i = 0; i < all; ++i) run(i);
    return;
  }
  torch::stable::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  });
}

// Instance norm and activation of a float32 image in NCHW and residual_gain times an image, into `out`; all of them
// grouped, or none.
void norm_act_into(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& residual, double eps, std::string act, double alpha, double gain,
                   double residual_gain, const Tensor& out, bool x_grouped, bool y_grouped) {
  const NormSettings settings{false, false, eps, parse_act("norm_act", act), alpha, gain};
  const Tensor source = in_layout(x, false);
  std::vector<double> mean(x.size(0) * x.size(1)), var(mean.size());
  const auto problem =
      make_problem<float>(x, settings, weight, bias, std::nullopt, std::nullopt, mean.data(), var.data());
  const float* const from = source.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  const Tensor added = residual ? in_layout(*residual, false) : x;
  const NormResidual<float> of_residual{added.const_data_ptr<float>(), static_cast<float>(residual_gain)};
  STD_TORCH_CHECK(x_grouped == y_grouped && (!x_grouped || x.size(1) % kGroup == 0),
                  "_norm_act_into: all images are grouped, or none is");
  const auto run = x_grouped ? grouped_forward : as_rows(x, false) ? rows_forward<float> : planes_forward<float>;
  run(problem, from, to, mean.data(), var.data(), residual ? &of_residual : nullptr);
}

std::tuple<Tensor, Tensor, Tensor> norm_act_grad(const Tensor& gy, const Tensor& x, const OptionalTensor& weight,
                                                 const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                                                 bool batch, bool fixed, double eps, std::string act, double alpha,
                                                 double gain, bool need_x, bool need_weight, bool need_bias) {
  const char* const op = "norm_act_grad";
  const NormSettings settings{batch, fixed, eps, parse_act(op, act), alpha, gain};
  const bool channels_last = is_channels_last(x);
  const Tensor dense_gy = in_layout(gy, channels_last), dense_x = in_layout(x, channels_last);
  Tensor grad_x = empty_image_grad(x, channels_last, need_x),
         grad_weight = empty_parameter_grad(x, weight, need_weight),
         grad_bias = empty_parameter_grad(x, bias, need_bias);
  dispatch_dtype(op, x.scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    NormSums sums(kFirstSums, x.size(0), x.size(1));
    if (x.numel() != 0) {
      const auto problem = make_problem<C>(x, settings, weight, bias, std::nullopt, std::nullopt,
                                           mean.const_data_ptr<double>(), var.const_data_ptr<double>());
      const auto run = as_rows(x, channels_last) ? rows_backward<T, C> : planes_backward<T, C>;
      run(problem, dense_gy.const_data_ptr<T>(), dense_x.const_data_ptr<T>(), data_if<T>(grad_x, need_x),
          !fixed || need_weight || need_bias, sums);
    }
    if (need_weight) write_parameter_grad<C>(sums, kSumGU, x.size(0), grad_weight);
    if (need_bias) write_parameter_grad<C>(sums, kSumG, x.size(0), grad_bias);
  });
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_grad_grad(const OptionalTensor& h, const OptionalTensor& h_weight,
                                                              const OptionalTensor& h_bias, const Tensor& gy,
                                                              const Tensor& x, const OptionalTensor& weight,
                                                              const OptionalTensor& bias, const Tensor& mean,
                                                              const Tensor& var, bool batch, bool fixed, double eps,
                                                              std::string act, double alpha, double gain, bool need_gy,
                                                              bool need_x, bool need_weight, bool need_bias) {
  const char* const op = "norm_act_grad_grad";
  const NormSettings settings{batch, fixed, eps, parse_act(op, act), alpha, gain};
  const bool channels_last = is_channels_last(x);
  const Tensor dense_gy = in_layout(gy, channels_last), dense_x = in_layout(x, channels_last);
  const OptionalTensor dense_h = h ? OptionalTensor(in_layout(*h, channels_last)) : std::nullopt;
  Tensor grad_gy = empty_image_grad(x, channels_last, need_gy), grad_x = empty_image_grad(x, channels_last, need_x),
         grad_weight = empty_parameter_grad(x, weight, need_weight),
         grad_bias = empty_parameter_grad(x, bias, need_bias);
  dispatch_dtype(op, x.scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    NormSums sums(kSecondSums, x.size(0), x.size(1)), weight_sums(1, x.size(0), x.size(1));
    if (x.numel() != 0) {
      const auto problem = make_problem<C>(x, settings, weight, bias, h_weight, h_bias, mean.const_data_ptr<double>(),
                                           var.const_data_ptr<double>());
      const auto run = as_rows(x, channels_last) ? rows_second<T, C> : planes_second<T, C>;
      run(problem, dense_h ? dense_h->const_data_ptr<T>() : nullptr, dense_gy.const_data_ptr<T>(),
          dense_x.const_data_ptr<T>(), data_if<T>(grad_gy, need_gy), data_if<T>(grad_x, need_x), sums, weight_sums);
    }
    if (need_weight) write_parameter_grad<C>(weight_sums, 0, x.size(0), grad_weight);
    if (need_bias) write_parameter_grad<C>(sums, kSumE, x.size(0), grad_bias);
  });
  return {grad_gy, grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("_norm_act_into", TORCH_BOX(&Recordable<&norm_act_into>::call));
  m.impl("norm_act_grad", TORCH_BOX(&norm_act_grad));
  m.impl("norm_act_grad_grad", TORCH_BOX(&norm_act_grad_grad));
}

}  // namespace fastgan
