#include "large_buffer.h"

#include <tuple>

namespace fastgan {
namespace {

constexpr size_t kMostWaiting = size_t{128} << 20;

// For the sanitizers exactly what was asked for, and nothing waits: they see what reaches further or comes later.
#if defined(FASTGAN_SANITIZE)
constexpr bool kExact = true;
#else
constexpr bool kExact = false;
#endif

// Whole pages from the system itself, the first at a multiple of `alignment`; null where there are none.
float* map_pages(size_t bytes, size_t alignment) {
#if defined(__linux__)
  void* const mapped = mmap(nullptr, bytes + alignment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(mapped), first = (begin + alignment - 1) / alignment * alignment;
  if (first > begin) munmap(mapped, first - begin);
  munmap(reinterpret_cast<void*>(first + bytes), begin + alignment - first);
  return reinterpret_cast<float*>(first);
#else
  return nullptr;
#endif
}

void unmap_pages(float* from, size_t bytes) {
#if defined(__linux__)
  munmap(from, bytes);
#endif
}

struct Waiting {
  std::mutex mutex;
  LargeBuffer buffer;
};

// Never destroyed: buffers may outlive this file's statics.
Waiting& waiting() {
  static auto* const one = new Waiting;
  return *one;
}
Waiting& waiting_for_call() {
  static auto* const one = new Waiting;
  return *one;
}

// A block of malloc's, and in it `bytes` from a multiple of `alignment` on. malloc is not asked to align it: it would
// find no room for the next block where this one was.
std::pair<void*, float*> allocate(size_t bytes, size_t alignment) {
  void* block = nullptr;
  if (kExact) {
    if (posix_memalign(&block, alignment, bytes) != 0) throw std::bad_alloc();
    return {block, static_cast<float*>(block)};
  }
  block = std::malloc(bytes + alignment);
  if (!block) throw std::bad_alloc();
  const auto first = (reinterpret_cast<uintptr_t>(block) + alignment - 1) / alignment * alignment;
  return {block, reinterpret_cast<float*>(first)};
}

}  // namespace

LargeBuffer::LargeBuffer(int64_t count, bool lasting) {
  constexpr size_t kLine = 64, kSmallPage = 4096, kLargePage = size_t{2} << 20, kFewBytes = size_t{64} << 10;
  bytes_ = static_cast<size_t>(count) * sizeof(float);
  const size_t least = lasting ? kLargeLastingBytes : kLargeBytes;
  const bool large = bytes_ >= least, own_pages = lasting && bytes_ >= kFewBytes && !kExact;
  const size_t unit = bytes_ >= kLargeBytes ? kLargePage : own_pages ? kSmallPage : kLine;
  if (!kExact) bytes_ = (bytes_ + unit - 1) / unit * unit;
  if (own_pages) {
    data_ = map_pages(bytes_, large ? kLargePage : kSmallPage);
  } else if (bytes_ >= kLargeBytes && !kExact) {
    const std::lock_guard lock(waiting().mutex);
    LargeBuffer& buffer = waiting().buffer;
    // Not one twice as large as wanted: what is kept would be the larger for it.
    if (buffer.bytes_ >= bytes_ && buffer.bytes_ / 2 <= bytes_) {
      bytes_ = 0;
      swap(buffer);
      return;
    }
  }
  if (!data_) std::tie(block_, data_) = allocate(bytes_, large ? kLargePage : kLine);
  advise_large_pages(data_, bytes_, least);
}

LargeBuffer::~LargeBuffer() {
  if (block_ && bytes_ >= kLargeBytes && bytes_ <= kMostWaiting && !kExact) {
    const std::lock_guard lock(waiting().mutex);
    swap(waiting().buffer);
  }
  if (data_ && !block_) unmap_pages(data_, bytes_);
  std::free(block_);
}

CallBuffer::CallBuffer(int64_t count) {
  {
    const std::lock_guard lock(waiting_for_call().mutex);
    buffer_ = std::move(waiting_for_call().buffer);
  }
  if (buffer_.bytes() < count * static_cast<int64_t>(sizeof(float)) || kExact) buffer_ = LargeBuffer(count, true);
}

CallBuffer::~CallBuffer() {
  const std::lock_guard lock(waiting_for_call().mutex);
  LargeBuffer& waiting = waiting_for_call().buffer;
  if (buffer_.bytes() > waiting.bytes() && !kExact) std::swap(buffer_, waiting);
}

}  // namespace fastgan
