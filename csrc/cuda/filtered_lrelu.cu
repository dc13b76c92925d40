// filtered_lrelu on the GPU: torch's tensors for the kernels of filtered_lrelu.cuh.
//
// Filters are read where they lie and sizes travel as the kernel's parameters, so a CUDA graph may be captured at any
// call, on any stream.

#include "filtered_lrelu.cuh"

#include <optional>
#include <tuple>
#include <vector>

#include "launch.h"

namespace fastgan {
namespace {

const float* floats(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

void check_floats(const char* op, const char* name, const std::optional<Tensor>& tensor) {
  STD_TORCH_CHECK(!tensor || (tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous()), op, ": ", name,
                  " must be contiguous float32");
}

FlreluFilter filter(const char* op, const char* name, const std::optional<Tensor>& taps) {
  check_floats(op, name, taps);
  if (!taps) {
    return {};
  }
  const int64_t dimensions = taps->dim();
  const FlreluFilter filter{floats(taps), taps->size(dimensions - 1), taps->size(0), dimensions == 1};
  STD_TORCH_CHECK(filter.width <= kFlreluMostTaps && filter.height <= kFlreluMostTaps, op, ": ", name,
                  " must have sides of at most ", kFlreluMostTaps, " taps");
  return filter;
}

FlreluCall describe(const char* op, const Tensor& x, const std::optional<Tensor>& fu, const std::optional<Tensor>& fd,
                    int64_t up, int64_t down, bool flip_filter, double gain, double slope) {
  STD_TORCH_CHECK(x.is_contiguous(), op, ": x must be contiguous");
  STD_TORCH_CHECK(up <= kFlreluMostTaps && down <= kFlreluMostTaps, op, ": up and down must be at most ",
                  kFlreluMostTaps, ", got ", up, " and ", down);
  FlreluCall call = describe_flrelu(x.size(0) * x.size(1), x.size(1), filter(op, "fu", fu), filter(op, "fd", fd), up,
                                    down, flip_filter, gain, slope);
  STD_TORCH_CHECK(flrelu_smallest_tile(call) <= kFlreluSharedBytes, op, ": the filters need ",
                  flrelu_smallest_tile(call), " bytes of a block's ", kFlreluSharedBytes, " bytes of shared memory");
  call.x = x.const_data_ptr();
  return call;
}

template <typename T>
void launch(const char* op, const FlreluCall& call, cudaStream_t stream) {
  const FlreluPlan plan = plan_flrelu(call, sizeof(T));
  const FlreluFunction kernel = flrelu_function<T>(plan.kernel, call.mode);
  for (int64_t first = 0; first < plan.blocks; first += flrelu_blocks(plan, first)) {
    kernel<<<flrelu_blocks(plan, first), plan.threads, plan.shared_bytes, stream>>>(call, plan, first);
    check_launch(op);
  }
}

void launch_typed(const char* op, const FlreluCall& call, const Tensor& x) {
  // A grid of zero blocks is a launch error.
  if (call.planes == 0) {
    return;
  }
  const cudaStream_t stream = current_stream(x);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      launch<float>(op, call, stream);
      break;
    case ScalarType::Half:
      launch<__half>(op, call, stream);
      break;
    case ScalarType::BFloat16:
      launch<__nv_bfloat16>(op, call, stream);
      break;
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

std::tuple<Tensor, Tensor> filtered_lrelu(const Tensor& x, const std::optional<Tensor>& fu,
                                          const std::optional<Tensor>& fd, const std::optional<Tensor>& b, int64_t up,
                                          int64_t down, std::vector<int64_t> padding, double gain, double slope,
                                          std::optional<double> clamp, bool flip_filter, bool record) {
  constexpr const char* kOp = "filtered_lrelu";
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  FlreluCall call = describe(kOp, x, fu, fd, up, down, flip_filter, gain, slope);
  check_floats(kOp, "b", b);
  set_flrelu_axis(call.along, x.size(3), padding[0], padding[1]);
  set_flrelu_axis(call.across, x.size(2), padding[2], padding[3]);
  call.fir_gain = static_cast<float>(up * up);
  call.bias = floats(b);
  call.clamps = clamp.has_value();
  call.clamp = call.clamps ? static_cast<float>(*clamp) : call.clamp;
  call.mode = record ? FlreluMode::kRecord : FlreluMode::kActivate;
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), call.across.out, call.along.out});
  const int64_t sign_rows = (call.across.mid + kFlreluSignRows - 1) / kFlreluSignRows;
  Tensor signs = record
                     ? torch::stable::new_empty(x, {x.size(0), x.size(1), sign_rows, call.along.mid}, ScalarType::Int)
                     : torch::stable::new_empty(x, {0}, ScalarType::Int);
  call.y = y.mutable_data_ptr();
  call.signs = static_cast<uint32_t*>(signs.mutable_data_ptr());
  launch_typed(kOp, call, x);
  return std::make_tuple(y, signs);
}

// along, across: pad, offset, and the extents of z and of the result.
Tensor filtered_lrelu_replay(const Tensor& x, const std::optional<Tensor>& fu, const std::optional<Tensor>& fd,
                             const Tensor& signs, int64_t up, int64_t down, std::vector<int64_t> along,
                             std::vector<int64_t> across, bool flip_filter, double fir_gain, double gain,
                             double slope) {
  constexpr const char* kOp = "filtered_lrelu's gradient";
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  FlreluCall call = describe(kOp, x, fu, fd, up, down, flip_filter, gain, slope);
  set_flrelu_replay(call.along, x.size(3), along[0], along[1], along[2], along[3]);
  set_flrelu_replay(call.across, x.size(2), across[0], across[1], across[2], across[3]);
  const int64_t words = (across[2] + kFlreluSignRows - 1) / kFlreluSignRows * along[2];
  STD_TORCH_CHECK(
      signs.is_contiguous() && signs.scalar_type() == ScalarType::Int && signs.numel() == call.planes * words, kOp,
      ": signs must be contiguous int32 with ", call.planes * words, " words, got ", signs.numel());
  call.fir_gain = static_cast<float>(fir_gain);
  call.mode = FlreluMode::kReplay;
  // Read only, in this mode.
  call.signs = static_cast<uint32_t*>(const_cast<void*>(signs.const_data_ptr()));
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), across[3], along[3]});
  call.y = y.mutable_data_ptr();
  launch_typed(kOp, call, x);
  return y;
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, m) {
  m.impl("filtered_lrelu_cuda", TORCH_BOX(&fastgan::filtered_lrelu));
  m.impl("filtered_lrelu_replay_cuda", TORCH_BOX(&fastgan::filtered_lrelu_replay));
}
