// Barriers, fences and shared variables of a block.
#pragma once

#include <type_traits>

#include "error.h"

namespace simt {

int block_barrier(unsigned id, unsigned count, bool predicate, const char* name, bool waits, Site site);
void memory_fence();
void* shared_array(const void* function, Site site, const char* name, size_t bytes, size_t alignment, unsigned granule);
void* dynamic_shared_array(size_t alignment, unsigned granule);

// The smallest pieces that threads write separately: elements, or 4 bytes of larger ones.
template <typename T>
constexpr unsigned granule() {
  constexpr size_t bytes = sizeof(std::remove_all_extents_t<T>);
  return bytes % 4 == 0 ? 4 : bytes % 2 == 0 ? 2 : 1;
}

template <typename T>
T& shared(const void* function, const char* name, Site site = Site::here()) {
  return *static_cast<T*>(shared_array(function, site, name, sizeof(T), alignof(T), granule<T>()));
}

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared_array(alignof(T), granule<T>()));
}

}  // namespace simt

// What the two macros of cuda/device.h stand for. A variable belongs to one instantiation of its function.
#define SIMT_SHARED(type, name, ...) \
  std::type_identity_t<type __VA_ARGS__>& name = ::simt::shared<type __VA_ARGS__>(__PRETTY_FUNCTION__, #name)
#define SIMT_DYNAMIC_SHARED(type, name) type* const name = ::simt::dynamic_shared<type>()

inline void __syncthreads(simt::Site site = simt::Site::here()) {
  simt::block_barrier(0, 0, false, "__syncthreads", true, site);
}
inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::here()) {
  return simt::block_barrier(0, 0, predicate != 0, "__syncthreads_count", true, site);
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::here()) {
  return simt::block_barrier(0, 0, predicate != 0, "__syncthreads_or", true, site) != 0;
}
inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::here()) {
  return simt::block_barrier(0, 0, predicate == 0, "__syncthreads_and", true, site) == 0;
}
inline void __threadfence() { simt::memory_fence(); }
