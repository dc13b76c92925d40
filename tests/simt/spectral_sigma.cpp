// csrc/cuda/spectral_sigma.cuh for test_simt_spectral_sigma.py: what the op's launcher does with torch's tensors, with
// NumPy's arrays.

#include "cuda/spectral_sigma.cuh"

#include "simt/export.h"

namespace {

using fastgan::SigmaBatch;
using fastgan::SigmaPlan;
using fastgan::SigmaWeight;

// shapes: per layer the number of dimensions, dim, all sizes, all strides. u and v: those of all layers behind each
// other.
template <typename T>
void spectral_sigma(std::vector<simt::Buffer<const T>> weights, std::vector<int64_t> shapes,
                    std::vector<simt::Buffer<const float>> us, std::vector<simt::Buffer<const float>> vs, int n_iter,
                    bool hook, double eps, simt::Buffer<float> sigma, simt::Buffer<float> u, simt::Buffer<float> v) {
  std::vector<SigmaWeight> layers;
  const int64_t* next = shapes.data();
  float *u_out = u.data, *v_out = v.data;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t dimensions = *next++, dim = *next++;
    const std::vector<int64_t> sizes(next, next + dimensions), strides(next + dimensions, next + 2 * dimensions);
    next += 2 * dimensions;
    layers.push_back({weights[i].data, sizes, strides, dim, us[i].data, vs[i].data, u_out, v_out, sigma.data + i});
    u_out += us[i].size, v_out += vs[i].size;
  }
  const SigmaPlan plan = fastgan::plan_sigma(layers, sizeof(T), hook, n_iter == 0);
  SigmaBatch batch{};
  batch.eps = static_cast<float>(eps);
  batch.workspace = simt::workspace<float>(plan.workspace, "workspace");
  batch.counters = simt::workspace<unsigned>(plan.counters, "counters", true);
  for (int iteration = 0; iteration < std::max(n_iter, 1); ++iteration) {
    for (size_t begin = 0; begin < layers.size(); begin += fastgan::kSigmaLayers) {
      const unsigned blocks = fastgan::sigma_batch(plan, begin, iteration > 0, batch);
      simt::launch(blocks, fastgan::kSigmaThreads, fastgan::kSigmaSharedBytes,
                   n_iter == 0 ? fastgan::sigma_kernel<T, true> : fastgan::sigma_kernel<T, false>, batch);
    }
  }
}

SIMT_EXPORT("float32", spectral_sigma<float>);
SIMT_EXPORT("float16", spectral_sigma<__half>);
SIMT_EXPORT("bfloat16", spectral_sigma<__nv_bfloat16>);

}  // namespace
