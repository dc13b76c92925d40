// csrc/cuda/feature_matching_loss.cuh for test_simt_feature_matching_loss.py: what the ops' launchers do with torch's
// tensors, with NumPy's arrays.

#include "cuda/feature_matching_loss.cuh"

#include "simt/export.h"

namespace {

using fastgan::FeatureBatch;
using fastgan::FeatureCall;
using fastgan::FeatureMap;
using fastgan::MapWorkspace;

// geometry: of each map its samples, its channels, and whether it is channels_last. masks: none, or one per map.
template <typename T>
FeatureCall make_call(const std::vector<simt::Buffer<const T>>& fake, const std::vector<simt::Buffer<const T>>& real,
                      const std::vector<simt::Buffer<const float>>& masks, const std::vector<int64_t>& geometry,
                      bool square) {
  FeatureCall call{};
  call.square = square;
  for (size_t i = 0; i < fake.size(); ++i) {
    call.pairs.push_back({fake[i].data, real[i].data, masks.empty() ? nullptr : masks[i].data, fake[i].size,
                          geometry[3 * i], geometry[3 * i + 1], geometry[3 * i + 2] != 0});
  }
  return call;
}

template <typename Pointer, typename T>
std::vector<Pointer> pointers(const std::vector<simt::Buffer<T>>& buffers) {
  std::vector<Pointer> found;
  for (const auto& buffer : buffers) {
    found.push_back(buffer.data);
  }
  return found;
}

void launch_all(void (*kernel)(FeatureBatch), std::vector<FeatureMap>& maps, FeatureBatch& batch) {
  const MapWorkspace needed = fastgan::divide_feature_maps(maps);
  batch.span = needed.span;
  batch.sums.partial = simt::workspace<float>(needed.floats, "workspace");
  batch.sums.contributions = batch.sums.partial + needed.partial;
  batch.sums.counters = simt::workspace<unsigned>(needed.counters, "counters", true);
  for (size_t begin = 0; begin < maps.size(); begin += fastgan::kFeatureMaps) {
    const int blocks = fastgan::batch_maps<fastgan::kFeatureMaps>(maps, begin, batch);
    simt::launch(blocks, fastgan::kMapThreads, 0, kernel, batch);
    fastgan::advance_sums(batch.sums, blocks, batch.count);
  }
}

template <typename T>
void forward(std::vector<simt::Buffer<const T>> fake, std::vector<simt::Buffer<const T>> real,
             std::vector<simt::Buffer<const float>> masks, std::vector<int64_t> geometry,
             simt::Buffer<const double> weights, bool square, bool keep_signs, simt::Buffer<float> loss,
             simt::Buffer<int> signs, simt::Buffer<float> factors) {
  const FeatureCall call = make_call(fake, real, masks, geometry, square);
  unsigned* words = keep_signs ? reinterpret_cast<unsigned*>(signs.data) : nullptr;
  std::vector<FeatureMap> maps = fastgan::feature_maps(call, weights.data, words, factors.data, true);
  FeatureBatch batch{};
  batch.square = square;
  batch.sums.result = loss.data;
  launch_all(fastgan::matching_kernel<T>, maps, batch);
}

// The maps with what the forward pass left, which no kernel writes then, and their gradients.
template <typename T>
std::vector<FeatureMap> wanting_maps(const FeatureCall& call, simt::Buffer<const int> signs,
                                     simt::Buffer<const float> factors, const std::vector<simt::Buffer<T>>& gradients) {
  unsigned* words = call.square ? nullptr : reinterpret_cast<unsigned*>(const_cast<int*>(signs.data));
  std::vector<FeatureMap> maps =
      fastgan::feature_maps(call, nullptr, words, const_cast<float*>(factors.data), call.square);
  fastgan::set_feature_sides(call, pointers<void*>(gradients), &FeatureMap::fake_out, &FeatureMap::real_out, maps);
  return maps;
}

template <typename T>
void backward(simt::Buffer<const float> grad_loss, simt::Buffer<const int> signs, simt::Buffer<const float> factors,
              std::vector<simt::Buffer<const T>> fake, std::vector<simt::Buffer<const T>> real,
              std::vector<simt::Buffer<const float>> masks, std::vector<int64_t> geometry, bool square, bool want_fake,
              bool want_real, std::vector<simt::Buffer<T>> gradients) {
  FeatureCall call = make_call(fake, real, masks, geometry, square);
  call.want_fake = want_fake, call.want_real = want_real;
  std::vector<FeatureMap> maps = wanting_maps(call, signs, factors, gradients);
  FeatureBatch batch{};
  batch.square = square, batch.grad_loss = grad_loss.data;
  launch_all(fastgan::matching_bwd_kernel<T>, maps, batch);
}

template <typename T>
void second(std::vector<simt::Buffer<const T>> cotangents, simt::Buffer<const float> grad_loss,
            simt::Buffer<const int> signs, simt::Buffer<const float> factors, std::vector<simt::Buffer<const T>> fake,
            std::vector<simt::Buffer<const T>> real, std::vector<simt::Buffer<const float>> masks,
            std::vector<int64_t> geometry, bool square, bool want_fake, bool want_real,
            simt::Buffer<float> grad_grad_loss, std::vector<simt::Buffer<T>> gradients) {
  FeatureCall call = make_call(fake, real, masks, geometry, square);
  call.want_fake = want_fake, call.want_real = want_real;
  std::vector<FeatureMap> maps = wanting_maps(call, signs, factors, gradients);
  const auto seen = pointers<const void*>(cotangents);
  fastgan::set_feature_sides(call, seen, &FeatureMap::fake_in, &FeatureMap::real_in, maps);
  FeatureBatch batch{};
  batch.square = square, batch.grad_loss = grad_loss.data;
  batch.sums.result = grad_grad_loss.data;
  launch_all(fastgan::matching_bwd_bwd_kernel<T>, maps, batch);
}

SIMT_EXPORT("forward_float32", forward<float>);
SIMT_EXPORT("forward_float16", forward<__half>);
SIMT_EXPORT("forward_bfloat16", forward<__nv_bfloat16>);
SIMT_EXPORT("backward_float32", backward<float>);
SIMT_EXPORT("backward_float16", backward<__half>);
SIMT_EXPORT("backward_bfloat16", backward<__nv_bfloat16>);
SIMT_EXPORT("second_float32", second<float>);
SIMT_EXPORT("second_float16", second<__half>);
SIMT_EXPORT("second_bfloat16", second<__nv_bfloat16>);

}  // namespace
