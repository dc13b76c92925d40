#include "large_buffer.h"

namespace fastgan {
namespace {

constexpr size_t kMostWaiting = size_t{128} << 20;

// For the sanitizers exactly what was asked for, and nothing waits: they see what reaches further or comes later.
#if defined(FASTGAN_SANITIZE)
constexpr bool kExact = true;
#else
constexpr bool kExact = false;
#endif

struct Waiting {
  std::mutex mutex;
  float* data = nullptr;
  size_t bytes = 0;
};

// Never destroyed: buffers may outlive this file's statics.
Waiting& waiting() {
  static auto* const one = new Waiting;
  return *one;
}

}  // namespace

LargeBuffer::LargeBuffer(int64_t count, bool lasting) {
  constexpr size_t kPage = size_t{2} << 20, kLine = 64;
  bytes_ = static_cast<size_t>(count) * sizeof(float);
  const size_t least = lasting ? kLargeLastingBytes : kLargeBytes, alignment = bytes_ >= least ? kPage : kLine;
  const size_t unit = bytes_ >= kLargeBytes ? kPage : kLine;
  if (!kExact) bytes_ = (bytes_ + unit - 1) / unit * unit;
  if (bytes_ >= kLargeBytes && !kExact) {
    const std::lock_guard lock(waiting().mutex);
    // Not one twice as large as wanted: what is kept would be the larger for it.
    if (waiting().bytes >= bytes_ && waiting().bytes / 2 <= bytes_) {
      data_ = std::exchange(waiting().data, nullptr);
      bytes_ = std::exchange(waiting().bytes, 0);
      return;
    }
  }
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes_) != 0) throw std::bad_alloc();
  data_ = static_cast<float*>(memory);
  advise_large_pages(data_, bytes_, least);
}

LargeBuffer::~LargeBuffer() {
  if (bytes_ >= kLargeBytes && bytes_ <= kMostWaiting && !kExact) {
    const std::lock_guard lock(waiting().mutex);
    std::swap(data_, waiting().data);
    std::swap(bytes_, waiting().bytes);
  }
  std::free(data_);
}

}  // namespace fastgan
