// patch_loss on the GPU: torch's tensors for the kernels of patch_loss.cuh.
//
// Addresses and shapes travel as the kernels' parameter, so a CUDA graph may be captured at any call, on any stream.

#include "patch_loss.cuh"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "map_launch.h"

namespace fastgan {
namespace {

using Maps = std::vector<Tensor>;

PatchForm parse_form(const std::string& name) {
  const std::string names[] = {"bce", "square", "linear", "hinge"};
  const auto* found = std::find(std::begin(names), std::end(names), name);
  STD_TORCH_CHECK(found != std::end(names), "patch_loss: form must be bce, square, linear or hinge, got ", name);
  return static_cast<PatchForm>(found - std::begin(names));
}

PatchCall make_call(const Maps& real, const Maps& fake, const std::vector<double>& scale, bool paired, bool real_slopes,
                    bool fake_slopes) {
  PatchCall call{};
  call.scale = scale;
  call.paired = paired, call.real_slopes = real_slopes, call.fake_slopes = fake_slopes;
  for (const auto& [maps, side] : {std::pair{&real, &call.real}, {&fake, &call.fake}}) {
    STD_TORCH_CHECK(maps->empty() || maps->size() == scale.size(), "patch_loss: ", scale.size(), " map scales for ",
                    maps->size(), " maps");
    for (const Tensor& x : *maps) {
      check_dense("patch_loss", x);
      side->push_back({x.const_data_ptr(), x.numel(), x.size(0)});
      STD_TORCH_CHECK(x.numel() / std::max<int64_t>(1, x.size(0)) < int64_t{1} << 31,
                      "patch_loss: every map must have less than 2^31 elements per sample");
    }
  }
  for (size_t i = 0; paired && i < real.size(); ++i) {
    STD_TORCH_CHECK(same_order(real[i], fake[i]), "patch_loss: paired maps must have one memory order");
  }
  return call;
}

const float* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> patch_loss(const Maps& real, const Maps& fake,
                                                      const std::optional<Tensor>& sample_weight,
                                                      const std::vector<double>& scale, const std::string& form,
                                                      double real_anchor, double fake_anchor, double cut, bool paired,
                                                      bool real_slopes, bool fake_slopes) {
  const Tensor& first = real.empty() ? fake[0] : real[0];
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  PatchCall call = make_call(real, fake, scale, paired, real_slopes, fake_slopes);
  call.real_anchor = static_cast<float>(real_anchor), call.fake_anchor = static_cast<float>(fake_anchor);
  Tensor loss = empty_floats(first, {});
  Tensor real_accuracy = empty_floats(first, {static_cast<int64_t>(real.size())});
  Tensor fake_accuracy = empty_floats(first, {static_cast<int64_t>(fake.size())});
  Tensor slopes = empty_floats(first, {patch_slopes(call)});
  std::vector<PatchMap> maps = patch_maps(call, slopes.mutable_data_ptr<float>(), false);
  set_patch_accuracies(call, real_accuracy.mutable_data_ptr<float>(), fake_accuracy.mutable_data_ptr<float>(), maps);
  PatchBatch batch{};
  batch.sample_weight = data_or_null(sample_weight);
  batch.cut = static_cast<float>(cut), batch.form = parse_form(form);
  batch.sums.result = loss.mutable_data_ptr<float>();
  dispatch_dtype("patch_loss", first, [&](auto element) {
    using T = decltype(element);
    const MapWorkspace needed = divide_patch_maps(maps, sizeof(T));
    launch_maps<kPatchMaps>("patch_loss", patch_loss_kernel<T>, maps, needed, true, first, batch);
  });
  return {loss, real_accuracy, fake_accuracy, slopes};
}

// The maps that want gradients, with their slopes, which no kernel writes then, and the gradients.
std::vector<PatchMap> wanting_maps(const PatchCall& call, const Tensor& slopes, Maps& gradients) {
  STD_TORCH_CHECK(slopes.numel() == patch_slopes(call), "patch_loss: slopes must have ", patch_slopes(call),
                  " elements, got ", slopes.numel());
  std::vector<PatchMap> maps = patch_maps(call, const_cast<float*>(slopes.const_data_ptr<float>()), true);
  set_patch_sides(call, output_addresses(gradients), &PatchMap::plus, &PatchMap::minus, maps);
  return maps;
}

Maps patch_loss_bwd(const Tensor& grad_loss, const Tensor& slopes, const Maps& real, const Maps& fake,
                    const std::optional<Tensor>& sample_weight, const std::vector<double>& scale, const std::string&,
                    bool paired, bool real_slopes, bool fake_slopes) {
  const Tensor& first = real.empty() ? fake[0] : real[0];
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  const PatchCall call = make_call(real, fake, scale, paired, real_slopes, fake_slopes);
  Maps gradients = empty_gradients(real, real_slopes, fake, fake_slopes);
  std::vector<PatchMap> maps = wanting_maps(call, slopes, gradients);
  PatchBatch batch{};
  batch.sample_weight = data_or_null(sample_weight);
  batch.grad_loss = grad_loss.const_data_ptr<float>();
  dispatch_dtype("patch_loss", first, [&](auto element) {
    using T = decltype(element);
    const MapWorkspace needed = divide_patch_maps(maps, sizeof(T));
    launch_maps<kPatchMaps>("patch_loss_bwd", patch_loss_bwd_kernel<T>, maps, needed, false, first, batch);
  });
  return gradients;
}

// The gradient of grad_loss, then those of the wanted maps, for cotangents of patch_loss_bwd's results.
Maps patch_loss_bwd_bwd(const Maps& cotangents, const Tensor& grad_loss, const Tensor& slopes, const Maps& real,
                        const Maps& fake, const std::optional<Tensor>& sample_weight, const std::vector<double>& scale,
                        const std::string& form, bool paired, bool real_slopes, bool fake_slopes) {
  const Tensor& first = real.empty() ? fake[0] : real[0];
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  const PatchCall call = make_call(real, fake, scale, paired, real_slopes, fake_slopes);
  Maps gradients = empty_gradients(real, real_slopes, fake, fake_slopes);
  std::vector<PatchMap> maps = wanting_maps(call, slopes, gradients);
  Maps ordered;
  for (size_t i = 0; i < gradients.size(); ++i) {
    ordered.push_back(in_order_of(cotangents[i], gradients[i]));
  }
  set_patch_sides(call, input_addresses(ordered), &PatchMap::plus_in, &PatchMap::minus_in, maps);
  Tensor grad_grad_loss = torch::stable::empty_like(grad_loss);
  PatchBatch batch{};
  batch.sample_weight = data_or_null(sample_weight);
  batch.grad_loss = grad_loss.const_data_ptr<float>(), batch.form = parse_form(form);
  batch.sums.result = grad_grad_loss.mutable_data_ptr<float>();
  dispatch_dtype("patch_loss", first, [&](auto element) {
    using T = decltype(element);
    const MapWorkspace needed = divide_patch_maps(maps, sizeof(T));
    launch_maps<kPatchMaps>("patch_loss_bwd_bwd", patch_loss_bwd_bwd_kernel<T>, maps, needed, true, first, batch);
  });
  gradients.insert(gradients.begin(), grad_grad_loss);
  return gradients;
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, m) {
  m.impl("patch_loss_cuda", TORCH_BOX(&fastgan::patch_loss));
  m.impl("patch_loss_bwd_cuda", TORCH_BOX(&fastgan::patch_loss_bwd));
  m.impl("patch_loss_bwd_bwd_cuda", TORCH_BOX(&fastgan::patch_loss_bwd_bwd));
}
