// Large pages for large memory, where the system has them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastgan {

// From here on, malloc fetches all memory anew from the system, and a page fault per 4 KB costs more than the work that
// fills it; in pages of 2 MB it costs a tenth. Less is kept by malloc and has its pages already.
constexpr size_t kLargeBytes = size_t{32} << 20;
// Of what is made once and read in every call, less is worth large pages: reading them in order, a processor looks
// ahead to the end of a page.
constexpr size_t kLargeLastingBytes = size_t{2} << 20;

// Asks for large pages from `from` on: advice, where it is refused small pages serve. Nothing for less than `least`
// bytes.
inline void advise_large_pages(void* from, size_t bytes, size_t least = kLargeBytes) {
#if defined(__linux__)
  constexpr uintptr_t kSmall = 4096;
  const uintptr_t address = reinterpret_cast<uintptr_t>(from), begin = (address + kSmall - 1) / kSmall * kSmall;
  if (bytes >= least) madvise(reinterpret_cast<void*>(begin), bytes - (begin - address), MADV_HUGEPAGE);
#endif
}

// Gives the whole pages within the memory of values that nobody reads any more back to the system; whether it could.
inline bool give_back_pages(void* from, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kSmall = 4096;
  const uintptr_t address = reinterpret_cast<uintptr_t>(from), begin = (address + kSmall - 1) / kSmall * kSmall,
                  end = (address + bytes) / kSmall * kSmall;
  return end > begin && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED) == 0;
#else
  return false;
#endif
}

// Uninitialised floats. Of those that malloc would give back to the system, the one freed last waits for the next call.
class LargeBuffer {
 public:
  LargeBuffer() = default;
  // `lasting`: to be read for long, so it has pages of its own: between what calls need for a while, malloc would leave
  // holes.
  explicit LargeBuffer(int64_t count, bool lasting = false);
  ~LargeBuffer();
  LargeBuffer(LargeBuffer&& other) noexcept { swap(other); }
  LargeBuffer& operator=(LargeBuffer&& other) noexcept {
    swap(other);
    return *this;
  }

  float* get() const { return data_; }
  int64_t bytes() const { return static_cast<int64_t>(bytes_); }

 private:
  void swap(LargeBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(block_, other.block_);
  }

  float* data_ = nullptr;
  size_t bytes_ = 0;
  void* block_ = nullptr;  // malloc's; null: pages of its own
};

// Of what a call fills and reads, at least `count` uninitialised floats. The largest one waits for the next call, so
// that it has its pages and is near.
class CallBuffer {
 public:
  explicit CallBuffer(int64_t count);
  ~CallBuffer();
  CallBuffer(const CallBuffer&) = delete;
  CallBuffer& operator=(const CallBuffer&) = delete;

  const LargeBuffer& operator*() const { return buffer_; }

 private:
  LargeBuffer buffer_;
};

}  // namespace fastgan
