// pixel_dot: sums over pixels of a ⊙ b, [N, C, H, W] x 2 -> [N, C]: the gradient of a scale per sample and channel.

#include "convert.h"
#include "image.h"

namespace fastgan {
namespace {

template <typename C>
FASTGAN_INLINE double dot_loop(const C* __restrict__ a, const C* __restrict__ b, int64_t n) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}
FASTGAN_MULTIVERSION double dot(const float* a, const float* b, int64_t n) { return dot_loop(a, b, n); }
double dot(const double* a, const double* b, int64_t n) { return dot_loop(a, b, n); }

template <typename C>
FASTGAN_INLINE void multiply_add_loop(const C* __restrict__ a, const C* __restrict__ b, C* __restrict__ sums,
                                      int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sums[i] += a[i] * b[i];
}
FASTGAN_MULTIVERSION void multiply_add(const float* a, const float* b, float* sums, int64_t n) {
  multiply_add_loop(a, b, sums, n);
}
void multiply_add(const double* a, const double* b, double* sums, int64_t n) { multiply_add_loop(a, b, sums, n); }

// Partial sums per block are added in double and in block order, so that the result does not depend on the number of
// threads.
template <typename A, typename B, typename C>
void run(const ImageBlocks& blocks, const A* a, const B* b, C* out) {
  const int64_t width = blocks.planar ? 1 : blocks.c;
  std::vector<C> partial(blocks.count() * width);
  torch::stable::parallel_for(0, blocks.count(), blocks.grain(), [&](int64_t begin, int64_t end) {
    const int64_t longest = std::max(kBlock, blocks.c);
    std::vector<C> a_buffer(longest), b_buffer(longest);
    for (int64_t i = begin; i < end; ++i) {
      const auto block = blocks.at(i);
      const C* const wide_a = as_compute(a + block.offset, block.size, a_buffer.data());
      const C* const wide_b = as_compute(b + block.offset, block.size, b_buffer.data());
      C* const sums = partial.data() + i * width;
      if (blocks.planar) {
        *sums = static_cast<C>(dot(wide_a, wide_b, block.size));
        continue;
      }
      for (int64_t p = 0; p < block.pixels; ++p) {
        multiply_add(wide_a + p * blocks.c, wide_b + p * blocks.c, sums, blocks.c);
      }
    }
  });
  const int64_t per_channel = blocks.planar ? blocks.per_sample / blocks.c : blocks.per_sample;
  for (int64_t n = 0; n < blocks.n; ++n) {
    for (int64_t c = 0; c < blocks.c; ++c) {
      const int64_t first = blocks.planar ? (n * blocks.c + c) * per_channel : n * per_channel;
      double sum = 0;
      for (int64_t i = 0; i < per_channel; ++i) sum += partial[(first + i) * width + (blocks.planar ? 0 : c)];
      out[n * blocks.c + c] = static_cast<C>(sum);
    }
  }
}

Tensor pixel_dot(const Tensor& a, const Tensor& b) {
  const bool channels_last = is_channels_last(a);
  const Tensor dense_a = in_layout(a, channels_last), dense_b = in_layout(b, channels_last);
  const ImageBlocks blocks(a, channels_last);
  const bool is_double = a.scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::new_empty(a, {a.size(0), a.size(1)}, is_double ? ScalarType::Double : ScalarType::Float);
  dispatch_dtype("pixel_dot", a.scalar_type(), [&]<typename A>() {
    dispatch_dtype("pixel_dot", b.scalar_type(), [&]<typename B>() {
      using C = accumulate_t<A>;
      if constexpr (std::is_same_v<C, accumulate_t<B>>) {
        run(blocks, dense_a.const_data_ptr<A>(), dense_b.const_data_ptr<B>(), out.mutable_data_ptr<C>());
      } else {
        STD_TORCH_CHECK(false, "pixel_dot: float64 goes with float64 only");
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) { m.impl("pixel_dot", TORCH_BOX(&pixel_dot)); }

}  // namespace fastgan
