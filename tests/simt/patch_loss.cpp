// csrc/cuda/patch_loss.cuh for test_simt_patch_loss.py: what the ops' launchers do with torch's tensors, with NumPy's
// arrays.

#include "cuda/patch_loss.cuh"

#include "simt/export.h"

namespace {

using fastgan::MapWorkspace;
using fastgan::PatchBatch;
using fastgan::PatchCall;
using fastgan::PatchForm;
using fastgan::PatchMap;

// samples: of each map, real ones first.
template <typename T>
PatchCall make_call(const std::vector<simt::Buffer<const T>>& real, const std::vector<simt::Buffer<const T>>& fake,
                    const std::vector<int64_t>& samples, simt::Buffer<const double> scale, bool paired,
                    bool real_slopes, bool fake_slopes) {
  PatchCall call{};
  call.scale.assign(scale.data, scale.data + scale.size);
  call.paired = paired, call.real_slopes = real_slopes, call.fake_slopes = fake_slopes;
  const int64_t* next = samples.data();
  for (const auto& map : real) {
    call.real.push_back({map.data, map.size, *next++});
  }
  for (const auto& map : fake) {
    call.fake.push_back({map.data, map.size, *next++});
  }
  return call;
}

const float* weights_or_null(simt::Buffer<const float> weight) { return weight.size == 0 ? nullptr : weight.data; }

template <typename Pointer, typename T>
std::vector<Pointer> pointers(const std::vector<simt::Buffer<T>>& buffers) {
  std::vector<Pointer> found;
  for (const auto& buffer : buffers) {
    found.push_back(buffer.data);
  }
  return found;
}

// The maps that want gradients, with their slopes, which no kernel writes then, and the gradients.
template <typename T>
std::vector<PatchMap> wanting_maps(const PatchCall& call, simt::Buffer<const float> slopes,
                                   const std::vector<simt::Buffer<T>>& gradients) {
  std::vector<PatchMap> maps = fastgan::patch_maps(call, const_cast<float*>(slopes.data), true);
  fastgan::set_patch_sides(call, pointers<void*>(gradients), &PatchMap::plus, &PatchMap::minus, maps);
  return maps;
}

void launch_all(void (*kernel)(PatchBatch), std::vector<PatchMap>& maps, int item_bytes, PatchBatch& batch) {
  const MapWorkspace needed = fastgan::divide_patch_maps(maps, item_bytes);
  batch.span = needed.span;
  batch.sums.partial = simt::workspace<float>(needed.floats, "workspace");
  batch.sums.contributions = batch.sums.partial + needed.partial;
  batch.sums.counters = simt::workspace<unsigned>(needed.counters, "counters", true);
  for (size_t begin = 0; begin < maps.size(); begin += fastgan::kPatchMaps) {
    const int blocks = fastgan::batch_maps<fastgan::kPatchMaps>(maps, begin, batch);
    simt::launch(blocks, fastgan::kMapThreads, 0, kernel, batch);
    fastgan::advance_sums(batch.sums, blocks, batch.count);
  }
}

template <typename T>
void forward(std::vector<simt::Buffer<const T>> real, std::vector<simt::Buffer<const T>> fake,
             std::vector<int64_t> samples, simt::Buffer<const float> weight, simt::Buffer<const double> scale,
             int64_t form, double real_anchor, double fake_anchor, double cut, bool paired, bool real_slopes,
             bool fake_slopes, simt::Buffer<float> loss, simt::Buffer<float> real_accuracy,
             simt::Buffer<float> fake_accuracy, simt::Buffer<float> slopes) {
  PatchCall call = make_call(real, fake, samples, scale, paired, real_slopes, fake_slopes);
  call.real_anchor = static_cast<float>(real_anchor), call.fake_anchor = static_cast<float>(fake_anchor);
  std::vector<PatchMap> maps = fastgan::patch_maps(call, slopes.data, false);
  fastgan::set_patch_accuracies(call, real_accuracy.data, fake_accuracy.data, maps);
  PatchBatch batch{};
  batch.sample_weight = weights_or_null(weight);
  batch.cut = static_cast<float>(cut), batch.form = static_cast<PatchForm>(form);
  batch.sums.result = loss.data;
  launch_all(fastgan::patch_loss_kernel<T>, maps, sizeof(T), batch);
}

template <typename T>
void backward(simt::Buffer<const float> grad_loss, simt::Buffer<const float> slopes,
              std::vector<simt::Buffer<const T>> real, std::vector<simt::Buffer<const T>> fake,
              std::vector<int64_t> samples, simt::Buffer<const float> weight, simt::Buffer<const double> scale,
              bool paired, bool real_slopes, bool fake_slopes, std::vector<simt::Buffer<T>> gradients) {
  const PatchCall call = make_call(real, fake, samples, scale, paired, real_slopes, fake_slopes);
  std::vector<PatchMap> maps = wanting_maps(call, slopes, gradients);
  PatchBatch batch{};
  batch.sample_weight = weights_or_null(weight);
  batch.grad_loss = grad_loss.data;
  launch_all(fastgan::patch_loss_bwd_kernel<T>, maps, sizeof(T), batch);
}

template <typename T>
void second(std::vector<simt::Buffer<const T>> cotangents, simt::Buffer<const float> grad_loss,
            simt::Buffer<const float> slopes, std::vector<simt::Buffer<const T>> real,
            std::vector<simt::Buffer<const T>> fake, std::vector<int64_t> samples, simt::Buffer<const float> weight,
            simt::Buffer<const double> scale, int64_t form, bool paired, bool real_slopes, bool fake_slopes,
            simt::Buffer<float> grad_grad_loss, std::vector<simt::Buffer<T>> gradients) {
  const PatchCall call = make_call(real, fake, samples, scale, paired, real_slopes, fake_slopes);
  std::vector<PatchMap> maps = wanting_maps(call, slopes, gradients);
  const auto seen = pointers<const void*>(cotangents);
  fastgan::set_patch_sides(call, seen, &PatchMap::plus_in, &PatchMap::minus_in, maps);
  PatchBatch batch{};
  batch.sample_weight = weights_or_null(weight);
  batch.grad_loss = grad_loss.data, batch.form = static_cast<PatchForm>(form);
  batch.sums.result = grad_grad_loss.data;
  launch_all(fastgan::patch_loss_bwd_bwd_kernel<T>, maps, sizeof(T), batch);
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
