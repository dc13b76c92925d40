// Weights of Winograd's products: transformed, stored as it is asked for, and kept with the weight (kept_weights.h). Of
// many floats, up to four times the weight, only the kernels are kept, laid out for it, and transformed anew in every
// call: that takes no longer than reading so much more from memory.
#pragma once

#include <memory>

#include "bf16.h"
#include "conv_plan.h"
#include "large_buffer.h"
#include "winograd_plan.h"

namespace fastgan {

// Floats of a cache line. One lies behind each product's matrix: powers of two apart, the matrices would share one set
// of a cache.
constexpr int64_t kCacheLine = 16;

// Output channels side by side in the products, of a convolution with so many: as few registers as hold them all.
int64_t slab_size(int64_t c_out, Storage storage);

// Input channels that are multiplied in one step: a word of a matrix is a float, or a pair of integers.
inline int64_t channels_per_word(Storage storage) {
  return storage == Storage::kInt16 || storage == Storage::kInt8 ? 2 : 1;
}

// In the order in which they are read: [slabs / together, matrix of a phase, chunk of kPanelDepth words, together,
// depth of the chunk, slab].
class WinogradWeights {
 public:
  // Of a float weight, or for storage in integers of one in int8, dense, contiguous.
  WinogradWeights(const ConvPlan& conv, const WinogradPlan& plan, int64_t together, const Tensor& weight,
                  const ConvGeometry& g, Storage storage);

  Storage storage() const { return storage_; }
  int64_t depth() const { return depth_; }  // of the products, in words

  // Of the chunk of `count` words from `first` on.
  const char* at(int64_t matrix, int64_t first, int64_t count, int64_t slab) const {
    return reinterpret_cast<const char*>(data_->get()) + word_bytes() * offset(matrix, first, count, slab);
  }
  int64_t word_bytes() const {
    return per_word_ * (storage_ == Storage::kFloat ? 4 : storage_ == Storage::kInt8 ? 1 : 2);
  }

 private:
  int64_t offset(int64_t matrix, int64_t first, int64_t count, int64_t slab) const {
    return (slab / together_ * plan_.weights + matrix) * size_ + first * together_ * slab_ +
           slab % together_ * count * slab_;
  }

  int64_t words() const { return ceil_div(slabs_, together_) * plan_.weights * size_; }
  // Of [slab, input channel, taps + 1, slab]: the last tap is 0.
  int64_t kernel_size() const { return (conv_.taps + 1) * slab_; }

  // Whether to keep the kernels alone.
  bool transforms_in_calls(const Tensor& weight) const;
  // `lasting`: to be read in other calls as well.
  LargeBuffer kernels_of(const Tensor& weight, const ConvGeometry& g, bool lasting) const;
  void transform(const LargeBuffer& kernels, const LargeBuffer& to) const;

  // The kernel of one input channel and a slab's output channels, of a weight [output * row + input * channel].
  void lay_out(const float* weight, int64_t row, int64_t channel, int64_t slab, int64_t input, float* to) const;
  // Those of input channels [first, first + count) of a slab.
  void transform_slab(const float* kernels, int64_t slab, int64_t first, int64_t count, const LargeBuffer& to) const;
  // Those of one phase and one input channel.
  void transform_channel(const WinogradPlan::Form& form, const float* kernel, const int64_t* positions, int64_t at,
                         int64_t half, const LargeBuffer& to) const;
  // `matrices` of them, [matrix, kGroup], to their place in each matrix.
  void store_bf16(const float* values, int64_t matrices, int64_t place, BFloat16* to) const;
  template <typename T>
  void store_whole(const float* values, int64_t matrices, T* to) const;

  const ConvPlan& conv_;
  const WinogradPlan& plan_;
  const Storage storage_;
  const int64_t per_word_, depth_, slab_, slabs_, together_, size_;
  std::shared_ptr<const LargeBuffer> data_;
};

}  // namespace fastgan
