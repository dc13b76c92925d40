// feature_matching_loss on the GPU: torch's tensors for the kernels of feature_matching_loss.cuh.
//
// Addresses and shapes travel as the kernels' parameter, so a CUDA graph may be captured at any call, on any stream.

#include "feature_matching_loss.cuh"

#include <string>
#include <tuple>
#include <vector>

#include "map_launch.h"

namespace fastgan {
namespace {

using Maps = std::vector<Tensor>;

FeatureCall make_call(const Maps& fake, const Maps& real, const Maps& masks, const std::string& kind) {
  STD_TORCH_CHECK(kind == "l1" || kind == "l2", "feature_matching_loss: kind must be l1 or l2, got ", kind);
  STD_TORCH_CHECK(fake.size() == real.size() && (masks.empty() || masks.size() == fake.size()),
                  "feature_matching_loss: ", fake.size(), " maps, ", real.size(), " real ones, ", masks.size(),
                  " masks");
  FeatureCall call{};
  call.square = kind == "l2";
  for (size_t i = 0; i < fake.size(); ++i) {
    const Tensor& x = fake[i];
    check_dense("feature_matching_loss", x);
    STD_TORCH_CHECK(same_order(x, real[i]) && x.numel() == real[i].numel(),
                    "feature_matching_loss: both sides of a map must have one shape and memory order");
    STD_TORCH_CHECK(x.numel() / std::max<int64_t>(1, x.size(0)) < int64_t{1} << 31,
                    "feature_matching_loss: every map must have less than 2^31 elements per sample");
    const float* mask = masks.empty() ? nullptr : masks[i].const_data_ptr<float>();
    call.pairs.push_back(
        {x.const_data_ptr(), real[i].const_data_ptr(), mask, x.numel(), x.size(0), x.size(1), !x.is_contiguous()});
  }
  return call;
}

std::tuple<Tensor, Tensor, Tensor> feature_matching_loss(const Maps& fake, const Maps& real, const Maps& masks,
                                                         const std::vector<double>& weight, const std::string& kind,
                                                         bool keep_signs) {
  const Tensor& first = fake[0];
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  const FeatureCall call = make_call(fake, real, masks, kind);
  STD_TORCH_CHECK(weight.size() == fake.size(), "feature_matching_loss: ", weight.size(), " weights for ", fake.size(),
                  " maps");
  keep_signs = keep_signs && !call.square;
  Tensor loss = empty_floats(first, {});
  Tensor signs = torch::stable::new_empty(first, {keep_signs ? feature_signs(call) : 0}, ScalarType::Int);
  Tensor factors = empty_floats(first, {static_cast<int64_t>(fake.size())});
  unsigned* words = keep_signs ? reinterpret_cast<unsigned*>(signs.mutable_data_ptr<int32_t>()) : nullptr;
  std::vector<FeatureMap> maps = feature_maps(call, weight.data(), words, factors.mutable_data_ptr<float>(), true);
  const MapWorkspace needed = divide_feature_maps(maps);
  FeatureBatch batch{};
  batch.square = call.square;
  batch.sums.result = loss.mutable_data_ptr<float>();
  dispatch_dtype("feature_matching_loss", first, [&](auto element) {
    using T = decltype(element);
    launch_maps<kFeatureMaps>("feature_matching_loss", matching_kernel<T>, maps, needed, true, first, batch);
  });
  return {loss, signs, factors};
}

// The maps with what the forward pass left, which no kernel writes then, and their gradients.
std::vector<FeatureMap> wanting_maps(const FeatureCall& call, const Tensor& signs, const Tensor& factors,
                                     Maps& gradients) {
  unsigned* words = nullptr;
  if (!call.square) {
    STD_TORCH_CHECK(signs.numel() == feature_signs(call), "feature_matching_loss: signs must have ",
                    feature_signs(call), " words, got ", signs.numel());
    words = reinterpret_cast<unsigned*>(const_cast<int32_t*>(signs.const_data_ptr<int32_t>()));
  }
  float* factor = const_cast<float*>(factors.const_data_ptr<float>());
  std::vector<FeatureMap> maps = feature_maps(call, nullptr, words, factor, call.square);
  set_feature_sides(call, output_addresses(gradients), &FeatureMap::fake_out, &FeatureMap::real_out, maps);
  return maps;
}

Maps feature_matching_loss_bwd(const Tensor& grad_loss, const Tensor& signs, const Tensor& factors, const Maps& fake,
                               const Maps& real, const Maps& masks, const std::string& kind, bool want_fake,
                               bool want_real) {
  const Tensor& first = fake[0];
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  FeatureCall call = make_call(fake, real, masks, kind);
  call.want_fake = want_fake, call.want_real = want_real;
  Maps gradients = empty_gradients(fake, want_fake, real, want_real);
  std::vector<FeatureMap> maps = wanting_maps(call, signs, factors, gradients);
  const MapWorkspace needed = divide_feature_maps(maps);
  FeatureBatch batch{};
  batch.square = call.square, batch.grad_loss = grad_loss.const_data_ptr<float>();
  dispatch_dtype("feature_matching_loss_bwd", first, [&](auto element) {
    using T = decltype(element);
    launch_maps<kFeatureMaps>("feature_matching_loss_bwd", matching_bwd_kernel<T>, maps, needed, false, first, batch);
  });
  return gradients;
}

// The gradient of grad_loss, then those of the wanted maps, for cotangents of feature_matching_loss_bwd's results.
Maps feature_matching_loss_bwd_bwd(const Maps& cotangents, const Tensor& grad_loss, const Tensor& signs,
                                   const Tensor& factors, const Maps& fake, const Maps& real, const Maps& masks,
                                   const std::string& kind, bool want_fake, bool want_real) {
  const Tensor& first = fake[0];
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  FeatureCall call = make_call(fake, real, masks, kind);
  call.want_fake = want_fake, call.want_real = want_real;
  Maps gradients = empty_gradients(fake, want_fake, real, want_real);
  std::vector<FeatureMap> maps = wanting_maps(call, signs, factors, gradients);
  Maps ordered;
  for (size_t i = 0; i < gradients.size(); ++i) {
    ordered.push_back(in_order_of(cotangents[i], gradients[i]));
  }
  set_feature_sides(call, input_addresses(ordered), &FeatureMap::fake_in, &FeatureMap::real_in, maps);
  const MapWorkspace needed = divide_feature_maps(maps);
  Tensor grad_grad_loss = torch::stable::empty_like(grad_loss);
  FeatureBatch batch{};
  batch.square = call.square, batch.grad_loss = grad_loss.const_data_ptr<float>();
  batch.sums.result = grad_grad_loss.mutable_data_ptr<float>();
  dispatch_dtype("feature_matching_loss_bwd_bwd", first, [&](auto element) {
    using T = decltype(element);
    launch_maps<kFeatureMaps>("feature_matching_loss_bwd_bwd", matching_bwd_bwd_kernel<T>, maps, needed, true, first,
                              batch);
  });
  gradients.insert(gradients.begin(), grad_grad_loss);
  return gradients;
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, m) {
  m.impl("feature_matching_loss_cuda", TORCH_BOX(&fastgan::feature_matching_loss));
  m.impl("feature_matching_loss_bwd_cuda", TORCH_BOX(&fastgan::feature_matching_loss_bwd));
  m.impl("feature_matching_loss_bwd_bwd_cuda", TORCH_BOX(&fastgan::feature_matching_loss_bwd_bwd));
}
