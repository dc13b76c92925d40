// csrc/cuda/norm_act.cuh for test_simt_norm_act.py: what the op's launcher does with torch's tensors, with NumPy's
// arrays. An array without elements stands for a tensor that is not there.

#include "cuda/norm_act_launch.h"

#include "simt/export.h"

namespace {

using fastgan::Act;
using fastgan::NormCall;

template <typename T>
T* data_or_null(const simt::Buffer<T>& buffer) {
  return buffer.size == 0 ? nullptr : buffer.data;
}

// sizes: samples, channels, pixels; flags: channels_last, batch, fixed, weight and bias per sample; act in Act's
// order.
template <typename T>
NormCall make_call(simt::Buffer<const T> x, simt::Buffer<const float> weight, simt::Buffer<const float> bias,
                   const std::vector<int64_t>& sizes, const std::vector<int64_t>& flags, int act, double alpha,
                   double gain, double eps) {
  NormCall call{};
  call.x = x.data;
  call.weight = data_or_null(weight), call.bias = data_or_null(bias);
  call.samples = sizes[0], call.channels = sizes[1], call.pixels = sizes[2];
  call.batch = flags[1], call.fixed = flags[2];
  call.weight_stride = flags[3] ? sizes[1] : 0, call.bias_stride = flags[4] ? sizes[1] : 0;
  call.act = static_cast<Act>(act);
  call.alpha = static_cast<float>(alpha), call.gain = static_cast<float>(gain), call.eps = static_cast<float>(eps);
  return call;
}

double* allocate(int64_t size) { return simt::workspace<double>(size, "workspace"); }

void launch(void (*kernel)(NormCall), int64_t blocks, int tiles, int shared_bytes, const NormCall& call) {
  simt::launch({static_cast<unsigned>(blocks), static_cast<unsigned>(tiles)}, call.plan.threads, shared_bytes, kernel,
               call);
}

template <typename T>
void forward(simt::Buffer<const T> x, simt::Buffer<const float> weight, simt::Buffer<const float> bias,
             std::vector<int64_t> sizes, std::vector<int64_t> flags, int act, double alpha, double gain, double eps,
             int most_shared, simt::Buffer<T> y, simt::Buffer<double> mean, simt::Buffer<double> var) {
  NormCall call = make_call(x, weight, bias, sizes, flags, act, alpha, gain, eps);
  call.out = y.data, call.mean = mean.data, call.var = var.data;
  fastgan::launch_norm_forward<T>(call, flags[0], most_shared, allocate, launch);
}

template <typename T>
void backward(simt::Buffer<const T> gy, simt::Buffer<const T> x, simt::Buffer<const float> weight,
              simt::Buffer<const float> bias, std::vector<int64_t> sizes, std::vector<int64_t> flags, int act,
              double alpha, double gain, double eps, int most_shared, simt::Buffer<double> mean,
              simt::Buffer<double> var, simt::Buffer<T> grad_x, simt::Buffer<float> grad_weight,
              simt::Buffer<float> grad_bias) {
  NormCall call = make_call(x, weight, bias, sizes, flags, act, alpha, gain, eps);
  call.gy = gy.data, call.mean = mean.data, call.var = var.data;
  call.out = data_or_null(grad_x);
  call.grad_weight = data_or_null(grad_weight), call.grad_bias = data_or_null(grad_bias);
  fastgan::launch_norm_backward<T>(call, flags[0], most_shared, allocate, launch);
}

// How a call that nobody could make here would be divided; `sliced` only for planes.
void plan(std::vector<int64_t> sizes, bool last, bool sliced, bool batch, bool aligned, int item_bytes,
          simt::Buffer<int64_t> result) {
  NormCall call{};
  call.samples = sizes[0], call.channels = sizes[1], call.pixels = sizes[2];
  call.batch = batch;
  fastgan::merge_norm_samples(call);
  const auto divide = last ? fastgan::plan_norm_rows : sliced ? fastgan::plan_norm_slices : fastgan::plan_norm_planes;
  const fastgan::NormPlan p = divide(call, aligned, item_bytes);
  const int64_t fields[] = {call.samples, call.pixels, p.wide,  p.team,  p.threads,     p.chunks,
                            p.slice,      p.slices,    p.units, p.tiles, p.slice_bytes, norm_blocks(p, last)};
  std::copy(std::begin(fields), std::end(fields), result.data);
}

SIMT_EXPORT("plan", plan);
SIMT_EXPORT("forward_float32", forward<float>);
SIMT_EXPORT("forward_float16", forward<__half>);
SIMT_EXPORT("forward_bfloat16", forward<__nv_bfloat16>);
SIMT_EXPORT("backward_float32", backward<float>);
SIMT_EXPORT("backward_float16", backward<__half>);
SIMT_EXPORT("backward_bfloat16", backward<__nv_bfloat16>);

}  // namespace
