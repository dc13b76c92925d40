// activation_grad: g times the first or second derivative of clamp(gain * act(.)), elementwise, in one pass.

#include <limits>

#include "activation.h"
#include "convert.h"
#include "image.h"

namespace fastgan {
namespace {

template <typename C>
struct GradBlock {
  const C* g;
  const C* ref;
  C* out;
  int64_t n;
  Act act;
  C alpha, gain, clamp;  // clamp is infinite where there is none
  bool from_output;
  int64_t order;
};

template <Act A, bool kFromOutput, bool kSecond, typename C>
FASTGAN_INLINE void grad_loop(const GradBlock<C>& b) {
  // Copies: a store through out could otherwise change what b refers to, and every value would be loaded again.
  const C *const g = b.g, *const from = b.ref;
  C* const out = b.out;
  const C alpha = b.alpha, gain = b.gain, inverse_gain = C(1) / b.gain, clamp = b.clamp;
  const int64_t n = b.n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const C ref = from[i];
    const C t = kFromOutput ? ref * inverse_gain : act_value<A>(ref, alpha);
    const C y = kFromOutput ? ref : t * gain;
    const C slope = act_slope<A>(t, ref, alpha);
    C factor;
    if constexpr (!kSecond) {
      factor = gain * slope;
    } else if constexpr (kFromOutput) {
      factor = act_bend<A>(t, ref);  // d(gain * act')/dy: the gains cancel
    } else {
      factor = gain * act_bend<A>(t, ref) * (A == Act::kSwish ? C(1) : slope);
    }
    const C value = g[i] * factor;
    out[i] = (y >= clamp || y <= -clamp) ? C(0) : value;
  }
}

template <typename C>
FASTGAN_INLINE void grad_any(const GradBlock<C>& b) {
  dispatch_act(b.act, [&]<Act A>() FASTGAN_LAMBDA_INLINE {
    if (b.from_output) {
      b.order == 1 ? grad_loop<A, true, false>(b) : grad_loop<A, true, true>(b);
    } else {
      b.order == 1 ? grad_loop<A, false, false>(b) : grad_loop<A, false, true>(b);
    }
  });
}

FASTGAN_MULTIVERSION void grad_block(const GradBlock<float>& b) { grad_any(b); }
void grad_block(const GradBlock<double>& b) { grad_any(b); }

template <typename T, typename R>
void run_parallel(const T* g, const R* ref, T* out, int64_t n, GradBlock<accumulate_t<T>> b) {
  using C = accumulate_t<T>;
  torch::stable::parallel_for(0, n, kGrainElements, [&](int64_t begin, int64_t end) {
    C g_buffer[kBlock], ref_buffer[kBlock], out_buffer[kBlock];
    for (int64_t i = begin; i < end; i += kBlock) {
      GradBlock<C> block = b;
      block.n = std::min(kBlock, end - i);
      block.g = as_compute(g + i, block.n, g_buffer);
      block.ref = as_compute(ref + i, block.n, ref_buffer);
      block.out = result_buffer(out + i, out_buffer);
      grad_block(block);
      flush(block.out, out + i, block.n);
    }
  });
}

Tensor activation_grad(const Tensor& g, const Tensor& ref, std::string act, double alpha, double gain,
                       std::optional<double> clamp, bool from_output, int64_t order) {
  const char* const op = "activation_grad";
  const bool channels_last = is_channels_last(ref);
  const Tensor dense_g = in_layout(g, channels_last), dense_ref = in_layout(ref, channels_last);
  Tensor out = empty_image(g, g.scalar_type(), channels_last);
  const double bound = clamp.value_or(std::numeric_limits<double>::infinity());
  dispatch_dtype(op, g.scalar_type(), [&]<typename T>() {
    using C = accumulate_t<T>;
    const GradBlock<C> settings{nullptr,  nullptr, nullptr,  0,           parse_act(op, act),
                                C(alpha), C(gain), C(bound), from_output, order};
    const auto launch = [&](const auto* ref_data) {
      run_parallel(dense_g.const_data_ptr<T>(), ref_data, out.mutable_data_ptr<T>(), g.numel(), settings);
    };
    if (ref.scalar_type() == g.scalar_type()) {
      launch(dense_ref.const_data_ptr<T>());
    } else if constexpr (sizeof(T) == 2) {
      launch(dense_ref.const_data_ptr<float>());
    } else {
      STD_TORCH_CHECK(false, op, ": ref must have g's dtype, or be float32 beside a half type");
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) { m.impl("activation_grad", TORCH_BOX(&activation_grad)); }

}  // namespace fastgan
