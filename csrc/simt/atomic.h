// Atomic operations on global and shared memory. Relaxed, as CUDA's are: they order nothing but between the fences
// around them.
#pragma once

#include <cstdint>

namespace simt {

// Checks the access, and lets the fences around it take effect.
void touch_atomically(const void* address, unsigned bytes, const void* code);

}  // namespace simt

// Not instrumented, for their own load and store are not the kernel's; never inlined, so that the caller is known.
#define SIMT_ATOMIC(name, T, combined)                                                  \
  __attribute__((no_sanitize("thread"), noinline)) inline T name(T* address, T value) { \
    simt::touch_atomically(address, sizeof(T), __builtin_return_address(0));            \
    const T old = *address;                                                             \
    *address = combined;                                                                \
    return old;                                                                         \
  }
#define SIMT_ATOMIC_ARITHMETIC(T)                      \
  SIMT_ATOMIC(atomicAdd, T, old + value)               \
  SIMT_ATOMIC(atomicMax, T, old < value ? value : old) \
  SIMT_ATOMIC(atomicMin, T, value < old ? value : old) \
  SIMT_ATOMIC(atomicExch, T, value)
#define SIMT_ATOMIC_BITS(T)             \
  SIMT_ATOMIC(atomicAnd, T, old& value) \
  SIMT_ATOMIC(atomicOr, T, old | value) \
  SIMT_ATOMIC(atomicXor, T, old ^ value)
#define SIMT_ATOMIC_CAS(T)                                                                              \
  __attribute__((no_sanitize("thread"), noinline)) inline T atomicCAS(T* address, T compare, T value) { \
    simt::touch_atomically(address, sizeof(T), __builtin_return_address(0));                            \
    const T old = *address;                                                                             \
    *address = old == compare ? value : old;                                                            \
    return old;                                                                                         \
  }
SIMT_ATOMIC_ARITHMETIC(int)
SIMT_ATOMIC_ARITHMETIC(unsigned)
SIMT_ATOMIC_ARITHMETIC(unsigned long long)
SIMT_ATOMIC(atomicAdd, float, old + value)
SIMT_ATOMIC(atomicAdd, double, old + value)
SIMT_ATOMIC(atomicExch, float, value)
SIMT_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
SIMT_ATOMIC_BITS(int)
SIMT_ATOMIC_BITS(unsigned)
SIMT_ATOMIC_BITS(unsigned long long)
SIMT_ATOMIC_CAS(int)
SIMT_ATOMIC_CAS(unsigned)
SIMT_ATOMIC_CAS(unsigned long long)
#undef SIMT_ATOMIC
#undef SIMT_ATOMIC_ARITHMETIC
#undef SIMT_ATOMIC_BITS
#undef SIMT_ATOMIC_CAS
