// csrc/cuda/upfirdn2d.cuh for test_simt_upfirdn2d.py: what the op's launcher does with torch's tensors, with NumPy's
// arrays.

#include "cuda/upfirdn2d.cuh"

#include "simt/export.h"

namespace {

using fastgan::FirAxis;
using fastgan::FirParams;
using fastgan::FirPlan;

// Where the caller has no such tensor, an empty array.
template <typename T>
T* data_or_null(simt::Buffer<T> buffer) {
  return buffer.size == 0 ? nullptr : buffer.data;
}

// Of the half types, whose kernels differ in loads and stores alone, those of one filter: compiling all of them takes
// longer than all tests.
template <typename T, int kStep>
fastgan::FirKernel kernel_of(int fir_case) {
  if constexpr (sizeof(T) == 4) {
    return fastgan::choose_fir_kernel<T, kStep>(fir_case);
  } else {
    if (fir_case > 0) {
      throw simt::Error("upfirdn2d: the tests have half types of 4 taps by 1 and of general calls");
    }
    return fir_case == 0 ? fastgan::fir_kernel<T, 0, kStep> : fastgan::fir_kernel_any<T, kStep>;
  }
}

// sizes: samples, channels, channels_last, noise's samples, the filter's dimensions, flip; of both axes, x first: in,
// out, up, down, taps, pad. numbers: fir_gain, slope, gain, clamp, residual_gain. What the plan was is
// written to `chosen`: the case, blocks, bytes of shared memory, loads of 16 bytes, stores of 16 bytes, two passes.
template <typename T>
void upfirdn2d(simt::Buffer<const T> x, simt::Buffer<const float> f, simt::Buffer<const float> noise,
               simt::Buffer<const float> strength, simt::Buffer<const float> bias, simt::Buffer<const T> residual,
               std::vector<int64_t> sizes, int act, double fir_gain, double slope, double gain, double clamp,
               double residual_gain, simt::Buffer<T> y, simt::Buffer<int64_t> chosen) {
  const auto axis = [&](int first) {
    const auto at = [&](int i) { return static_cast<int>(sizes[first + i]); };
    FirAxis result{};
    result.in = at(0), result.out = at(1), result.up = at(2), result.down = at(3), result.taps = at(4);
    result.pad = at(5);
    return result;
  };
  FirParams p{};
  p.x = x.data, p.y = y.data, p.residual = data_or_null(residual);
  p.f = data_or_null(f), p.noise = data_or_null(noise), p.strength = data_or_null(strength),
  p.bias = data_or_null(bias);
  p.samples = static_cast<int>(sizes[0]), p.channels = static_cast<int>(sizes[1]);
  const bool channels_last = sizes[2] != 0;
  p.across = axis(6), p.along = axis(12);
  p.noise_stride = sizes[3] > 1 ? int64_t{p.across.out} * p.along.out : 0;
  p.filter_stride = sizes[4] == 2 ? p.across.taps : 0;
  p.flip = sizes[5] != 0;
  p.act = static_cast<fastgan::Act>(act);
  p.fir_gain = static_cast<float>(fir_gain), p.slope = static_cast<float>(slope), p.gain = static_cast<float>(gain);
  p.clamp = static_cast<float>(clamp), p.residual_gain = static_cast<float>(residual_gain);
  const FirPlan plan = fastgan::plan_fir(p, channels_last, sizeof(T));
  const int64_t facts[] = {plan.fir_case,       plan.blocks,          plan.shared_bytes,
                           plan.params.wide_in, plan.params.wide_out, plan.params.two_passes};
  std::copy(std::begin(facts), std::end(facts), chosen.data);
  simt::launch(static_cast<unsigned>(plan.blocks), fastgan::kFirThreads, plan.shared_bytes,
               channels_last ? kernel_of<T, fastgan::kFirChunk>(plan.fir_case) : kernel_of<T, 1>(plan.fir_case),
               plan.params);
}

void samples_of(std::vector<int64_t> sizes, simt::Buffer<int64_t> samples) {
  *samples.data = fastgan::fir_samples(sizes[0], sizes[1], sizes[2], sizes[3]);
}

SIMT_EXPORT("samples_of", samples_of);
SIMT_EXPORT("float32", upfirdn2d<float>);
SIMT_EXPORT("float16", upfirdn2d<__half>);
SIMT_EXPORT("bfloat16", upfirdn2d<__nv_bfloat16>);

}  // namespace
