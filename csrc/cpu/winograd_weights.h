// Weights of Winograd's products: transformed, stored as it is asked for, and kept with the weight (kept_weights.h). Of
// many floats, up to four times the weight, only the kernels are kept, laid out for it, and transformed anew in every
// call: that takes about as long as reading so much more from memory.
#pragma once

#include <algorithm>
#include <memory>

#include "bf16.h"
#include "conv_plan.h"
#include "large_buffer.h"
#include "winograd_plan.h"

namespace fastgan {

// Output channels side by side in the products, of a convolution with so many: as few registers as hold them all.
int64_t slab_size(int64_t c_out, Storage storage);

// Input channels that are multiplied in one step: a word of a matrix is a float, or a pair of integers.
inline int64_t channels_per_word(Storage storage) {
  return storage == Storage::kInt16 || storage == Storage::kInt8 ? 2 : 1;
}

// When weights are transformed: once, for all calls; in each call, before it; or in each call by the threads, which
// divide them, each a chunk of one slab at a time that stays in its second-level cache.
enum class Transforming { kOnce, kInCalls, kByThreads };
Transforming transforming_of(const WinogradPlan& plan, const Tensor& weight, Storage storage, bool threads_may);

// In the order in which they are read: [slabs / together, chunk of words, matrix of a phase, together, depth of the
// chunk, slab], and a line of cache behind each matrix.
class WinogradWeights {
 public:
  // Of a float weight, or for storage in integers of one in int8, dense, contiguous. Threads take slabs one by one.
  WinogradWeights(const ConvPlan& conv, const WinogradPlan& plan, Transforming transforming, int64_t together,
                  const Tensor& weight, const ConvGeometry& g, Storage storage);

  Storage storage() const { return storage_; }
  int64_t depth() const { return depth_; }  // of the products, in words
  int64_t step() const { return step_; }    // words of a chunk
  int64_t word_bytes() const {
    return per_word_ * (storage_ == Storage::kFloat ? 4 : storage_ == Storage::kInt8 ? 1 : 2);
  }

  // Words from one matrix to the next, of a chunk of `count` words.
  int64_t matrix_size(int64_t count) const { return count * together_ * slab_ + kCacheLine; }

  // Of the chunk of `count` words from `first` on; `own` is what the thread transformed of it, if threads do.
  const char* at(int64_t matrix, int64_t first, int64_t count, int64_t slab, const LargeBuffer& own) const {
    const LargeBuffer& from = data_ ? *data_ : own;
    const int64_t place =
        (data_ ? chunk(first, slab) : 0) + matrix * matrix_size(count) + slab % together_ * count * slab_;
    return reinterpret_cast<const char*>(from.get()) + word_bytes() * place;
  }

  // For threads that transform: memory for a chunk, what fills it, and the kernels that it is made of.
  LargeBuffer own() const { return LargeBuffer(data_ ? 0 : plan_.weights * matrix_size(std::min(step_, depth_))); }
  void transform_own(int64_t first, int64_t count, int64_t slab, const LargeBuffer& own) const;
  const float* kernel_at(int64_t slab, int64_t channel) const {
    return kernels_->get() + (slab * plan_.part_depth + channel) * kernel_size();
  }
  int64_t kernel_bytes() const { return kernel_size() * static_cast<int64_t>(sizeof(float)); }

 private:
  // Words before that of the slab that begins with word `first`.
  int64_t chunk(int64_t first, int64_t slab) const {
    const int64_t before = slab / together_ * depth_ + first;
    const int64_t matrices = slab / together_ * ceil_div(depth_, step_) + first / step_;
    return plan_.weights * (before * together_ * slab_ + matrices * kCacheLine);
  }
  int64_t words() const { return chunk(0, round_up(slabs_, together_)); }
  // Of [slab, input channel, taps + 1, slab]: the last tap is 0.
  int64_t kernel_size() const { return (conv_.taps + 1) * slab_; }

  // `lasting`: to be read in other calls as well.
  LargeBuffer laid_out(const Tensor& weight, const ConvGeometry& g, bool lasting) const;
  // The kernel of one input channel and a slab's output channels, of a weight [output * row + input * channel].
  void lay_out(const float* weight, int64_t row, int64_t channel, int64_t slab, int64_t input, float* to) const;

  // Where one input channel's values go in the first of a phase's matrices, `size` words each, and which half of them.
  struct Row {
    int64_t size, word, half;
  };

  void transform(const LargeBuffer& to) const;
  // Those of input channels [first, first + count) of a part, and a slab; `to` begins with word `origin`.
  void transform_part(size_t part, int64_t slab, int64_t first, int64_t count, const LargeBuffer& to,
                      int64_t origin) const;
  // Those of one phase.
  void transform_channel(const WinogradPlan::Form& form, const float* kernel, const int64_t* positions, const Row& row,
                         const LargeBuffer& to) const;
  // `matrices` of them, [matrix, kGroup], to their place in each matrix.
  void store_bf16(const float* values, int64_t matrices, int64_t place, BFloat16* to, int64_t size) const;
  template <typename T>
  void store_whole(const float* values, int64_t matrices, T* to, int64_t size) const;

  const ConvPlan& conv_;
  const WinogradPlan& plan_;
  const Storage storage_;
  const int64_t per_word_, depth_, step_, slab_, slabs_, together_;
  std::shared_ptr<const LargeBuffer> kernels_, data_;  // data_: null where threads transform
};

}  // namespace fastgan
