// Uninitialised floats in large pages where the system has them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastgan {

// From 32 MB on, malloc fetches every buffer anew from the system, and a page fault per 4 KB costs more than the work
// that fills it; in pages of 2 MB it costs a tenth. Smaller buffers are kept by malloc and have their pages already.
class LargeBuffer {
 public:
  LargeBuffer() = default;
  explicit LargeBuffer(int64_t count) {
    constexpr size_t kPage = size_t{2} << 20, kLine = 64, kLarge = size_t{32} << 20;
    size_t bytes = static_cast<size_t>(count) * sizeof(float);
    const size_t alignment = bytes >= kLarge ? kPage : kLine;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    data_.reset(static_cast<float*>(std::aligned_alloc(alignment, bytes)));
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    // Advice only: where it is refused, small pages serve.
    if (alignment == kPage) madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
};

}  // namespace fastgan
