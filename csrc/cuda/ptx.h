// Instructions that CUDA C++ has no name for: asynchronous copies, barriers of part of a block, tensor cores.
#pragma once

#include "device.h"

#ifndef __CUDACC__

#include "../simt/async_copy.h"
#include "../simt/block.h"
#include "../simt/tensor_core.h"

namespace fastgan {

inline void barrier_sync(unsigned id, unsigned count, simt::Site site = simt::Site::here()) {
  simt::block_barrier(id, count, false, "bar.sync", true, site);
}
inline void barrier_arrive(unsigned id, unsigned count, simt::Site site = simt::Site::here()) {
  simt::block_barrier(id, count, false, "bar.arrive", false, site);
}

}  // namespace fastgan

#else

#include <type_traits>

namespace fastgan {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Begins to copy kBytes (4, 8 or 16; both addresses are multiples of it) from global to shared memory. Before sm_80 it
// is a plain copy, and the two functions below do nothing.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if __CUDA_ARCH__ >= 800
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)), "l"(global), "n"(kBytes)
                 : "memory");
  }
#else
  using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, unsigned> >;
  *static_cast<Word*>(shared) = *static_cast<const Word*>(global);
#endif
}

// As copy_async, or kBytes of zeros unless the source is `there`, which is then not read.
template <int kBytes>
__device__ __forceinline__ void copy_async_or_zero(void* shared, const void* global, bool there) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if __CUDA_ARCH__ >= 800
  const int copied = there ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(copied)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(copied)
                 : "memory");
  }
#else
  using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, unsigned> >;
  *static_cast<Word*>(shared) = there ? *static_cast<const Word*>(global) : Word{};
#endif
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the kPending latest groups of this thread are still on their way. Other threads see what was
// copied after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// A barrier of `count` threads (a multiple of 32) of the block, by number, 1 ... 15; barrier_arrive does not wait.
__device__ __forceinline__ void barrier_sync(unsigned id, unsigned count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned id, unsigned count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// Loads kMatrices (1, 2 or 4) 8x8 matrices of 16-bit elements from shared memory into the fragments of a warp. Lane
// 8 m + r names row r of matrix m, 16 aligned bytes; lane l receives elements 2 (l % 4) and the next of row l / 4 of
// each, or of column l / 4 if kTransposed.
template <int kMatrices, bool kTransposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&fragments)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  const unsigned address = shared_address(row);
  if constexpr (kMatrices == 4) {
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                   : "r"(address)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                   : "r"(address)
                   : "memory");
    }
  } else if constexpr (kMatrices == 2) {
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                   : "=r"(fragments[0]), "=r"(fragments[1])
                   : "r"(address)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                   : "=r"(fragments[0]), "=r"(fragments[1])
                   : "r"(address)
                   : "memory");
    }
  } else {
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                   : "=r"(fragments[0])
                   : "r"(address)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                   : "=r"(fragments[0])
                   : "r"(address)
                   : "memory");
    }
  }
}

// d [16, 8] += a [16, 16] b [16, 8] in float32, T = __half or __nv_bfloat16; all lanes of the warp. Lane l holds of a
// the columns 2 (l % 4), the next, and both + 8, of the rows l / 4 and + 8; of b those rows of column l / 4; of d the
// columns 2 (l % 4) and the next of the rows l / 4 and + 8. Before sm_80 there is no such product of __nv_bfloat16: who
// launches chooses other kernels there.
template <typename T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  if constexpr (std::is_same_v<T, __half>) {
    // Two steps of 8 in k, on the halves of the same fragments.
    for (int half = 0; half < 2; ++half) {
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
  } else {
    __trap();
  }
#endif
}

}  // namespace fastgan

#endif
