// csrc/cuda/filtered_lrelu.cuh for test_simt_filtered_lrelu.py: what the two ops' launchers do with torch's tensors,
// with NumPy's arrays.

#include "cuda/filtered_lrelu.cuh"

#include "simt/export.h"

namespace {

using fastgan::FlreluCall;
using fastgan::FlreluFilter;
using fastgan::FlreluMode;
using fastgan::FlreluPlan;
using Filter = simt::Buffer<const float>;
using Sizes = std::vector<int64_t>;

// shape: none is [], as in torch.
FlreluFilter filter(const Filter& taps, const Sizes& shape) {
  return shape.empty() ? FlreluFilter{} : FlreluFilter{taps.data, shape.back(), shape.front(), shape.size() == 1};
}

template <typename T>
void launch(const FlreluCall& call, int64_t blocks) {
  if (fastgan::flrelu_smallest_tile(call) > fastgan::kFlreluSharedBytes) {
    throw simt::Error("filtered_lrelu: no tile fits");
  }
  const FlreluPlan plan = fastgan::plan_flrelu(call, sizeof(T), blocks);
  // In two launches, as what has more blocks than one may have.
  const int64_t half = (plan.blocks + 1) / 2;
  for (int64_t first = 0; first < plan.blocks; first += half) {
    simt::launch(static_cast<unsigned>(std::min(half, plan.blocks - first)), static_cast<unsigned>(plan.threads),
                 static_cast<size_t>(plan.shared_bytes), fastgan::flrelu_function<T>(plan.kernel, call.mode), call,
                 plan, first);
  }
}

// shape: x's. clamp: infinite for none. signs: empty unless they are wanted. blocks: that strips are shortened for.
template <typename T>
void filtered_lrelu(simt::Buffer<const T> x, Sizes shape, Filter fu, Sizes fu_shape, Filter fd, Sizes fd_shape,
                    simt::Buffer<const float> bias, int up, int down, Sizes padding, bool flip, double gain,
                    double slope, double clamp, simt::Buffer<T> y, simt::Buffer<uint32_t> signs, int64_t blocks) {
  FlreluCall call = fastgan::describe_flrelu(shape[0] * shape[1], shape[1], filter(fu, fu_shape), filter(fd, fd_shape),
                                             up, down, flip, gain, slope);
  fastgan::set_flrelu_axis(call.along, shape[3], padding[0], padding[1]);
  fastgan::set_flrelu_axis(call.across, shape[2], padding[2], padding[3]);
  call.fir_gain = static_cast<float>(up * up), call.clamp = static_cast<float>(clamp), call.clamps = clamp < INFINITY;
  call.x = x.data, call.y = y.data, call.bias = bias.size > 0 ? bias.data : nullptr;
  call.mode = signs.size > 0 ? FlreluMode::kRecord : FlreluMode::kActivate, call.signs = signs.data;
  launch<T>(call, blocks);
}

// along, across: pad, offset, the extents of z and of the result.
template <typename T>
void replay(simt::Buffer<const T> x, Sizes shape, Filter fu, Sizes fu_shape, Filter fd, Sizes fd_shape,
            simt::Buffer<const uint32_t> signs, int up, int down, Sizes along, Sizes across, bool flip, double fir_gain,
            double gain, double slope, simt::Buffer<T> y, int64_t blocks) {
  FlreluCall call = fastgan::describe_flrelu(shape[0] * shape[1], shape[1], filter(fu, fu_shape), filter(fd, fd_shape),
                                             up, down, flip, gain, slope);
  fastgan::set_flrelu_replay(call.along, shape[3], along[0], along[1], along[2], along[3]);
  fastgan::set_flrelu_replay(call.across, shape[2], across[0], across[1], across[2], across[3]);
  call.fir_gain = static_cast<float>(fir_gain);
  call.x = x.data, call.y = y.data, call.signs = const_cast<uint32_t*>(signs.data), call.mode = FlreluMode::kReplay;
  launch<T>(call, blocks);
}

// The op's kernel, its bytes of shared memory, and those of the smallest tile.
void plan(Sizes shape, Sizes fu_shape, Sizes fd_shape, int up, int down, Sizes padding, simt::Buffer<int64_t> result) {
  FlreluCall call = fastgan::describe_flrelu(shape[0] * shape[1], shape[1], filter({}, fu_shape), filter({}, fd_shape),
                                             up, down, false, 1, 1);
  fastgan::set_flrelu_axis(call.along, shape[3], padding[0], padding[1]);
  fastgan::set_flrelu_axis(call.across, shape[2], padding[2], padding[3]);
  const int64_t smallest = fastgan::flrelu_smallest_tile(call);
  const FlreluPlan plan = smallest > fastgan::kFlreluSharedBytes ? FlreluPlan{} : fastgan::plan_flrelu(call, 4);
  const Sizes values{static_cast<int>(plan.kernel), plan.shared_bytes, smallest};
  std::copy(values.begin(), values.end(), result.data);
}

SIMT_EXPORT("forward_float32", filtered_lrelu<float>);
SIMT_EXPORT("forward_float16", filtered_lrelu<__half>);
SIMT_EXPORT("forward_bfloat16", filtered_lrelu<__nv_bfloat16>);
SIMT_EXPORT("replay_float32", replay<float>);
SIMT_EXPORT("replay_float16", replay<__half>);
SIMT_EXPORT("replay_bfloat16", replay<__nv_bfloat16>);
SIMT_EXPORT("plan", plan);

}  // namespace
