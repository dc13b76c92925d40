// bias_act: y = clamp(gain * act(x + b)), elementwise with the bias along one dimension, in one pass.

#include <limits>

#include "epilogue.h"

namespace fastgan {
namespace {

// x as an image [outer, C, inner] in the memory order that it has.
ImageBlocks as_image(const Tensor& x, bool channels_last, bool has_bias, int64_t dim) {
  const int64_t total = x.numel();
  if (total == 0) return {0, 1, 1, true};
  if (!has_bias) return {1, 1, total, true};
  const int64_t channels = x.size(dim);
  if (channels_last) return {1, channels, total / channels, false};
  int64_t inner = 1;
  for (int64_t i = dim + 1; i < x.dim(); ++i) inner *= x.size(i);
  if (inner == 1) return {1, channels, total / channels, false};
  return {total / (channels * inner), channels, inner, true};
}

Tensor bias_act(const Tensor& x, const std::optional<Tensor>& b, int64_t dim, std::string act, double alpha,
                double gain, std::optional<double> clamp) {
  const char* const op = "bias_act";
  const bool channels_last = is_channels_last(x);
  const Tensor source = in_layout(x, channels_last);
  Tensor y = empty_image(x, x.scalar_type(), channels_last);
  const ImageBlocks blocks = as_image(x, channels_last, b.has_value(), dim);
  const std::optional<Tensor> none;
  const double bound = clamp.value_or(std::numeric_limits<double>::infinity());
  const EpilogueArgs args{none, none, none, b, none, parse_act(op, act), alpha, gain, bound, 0.0};
  dispatch_dtype(op, x.scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    const T* const from = source.const_data_ptr<T>();
    torch::stable::parallel_for(0, blocks.count(), blocks.grain(), [&](int64_t begin, int64_t end) {
      BlockEpilogue<T> epilogue(blocks, args, y);
      std::vector<C> buffer(sizeof(T) == 2 ? std::max(kBlock, blocks.c) : 0);
      for (int64_t i = begin; i < end; ++i) {
        const auto block = blocks.at(i);
        epilogue(as_compute(from + block.offset, block.size, buffer.data()), block);
      }
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) { m.impl("bias_act", TORCH_BOX(&bias_act)); }

}  // namespace fastgan
