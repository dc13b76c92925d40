// cp.async on the machine; cuda/ptx.h says what the functions do. A copy happens as late as it may: when it is waited
// for.
#pragma once

#include <cstdint>

namespace simt {

void copy_async(void* shared, const void* global, unsigned bytes, unsigned copied, const void* code);
void commit_copies();
void wait_copies(unsigned pending);

}  // namespace simt

namespace fastgan {

// Not inlined, so that the caller is known.
template <int kBytes>
__attribute__((noinline)) void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  simt::copy_async(shared, global, kBytes, kBytes, __builtin_return_address(0));
}

template <int kBytes>
__attribute__((noinline)) void copy_async_or_zero(void* shared, const void* global, bool there) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  simt::copy_async(shared, global, kBytes, there ? kBytes : 0, __builtin_return_address(0));
}

inline void commit_copies() { simt::commit_copies(); }

template <int kPending>
void wait_copies() {
  simt::wait_copies(kPending);
}

}  // namespace fastgan
