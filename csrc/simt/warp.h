// What the lanes of a warp do together: shuffles, votes, matches, reductions, __syncwarp.
//
// Stricter than hardware: a mask may name only lanes that are there, a shuffle may read only lanes that it names.
#pragma once

#include <cstdint>
#include <cstring>

#include "error.h"

namespace simt {

enum class Shuffle { kIndex, kUp, kDown, kXor };
enum class Reduce { kAddSigned, kAdd, kMinSigned, kMin, kMaxSigned, kMax, kAnd, kOr, kXor };

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width, Site site);
uint32_t vote(const char* name, uint32_t mask, bool predicate, Site site);  // the lanes that say yes
uint32_t match(uint32_t mask, uint64_t value, Site site);                   // the lanes with this value
uint32_t reduce(Reduce kind, uint32_t mask, uint32_t value, Site site);
void sync_warp(uint32_t mask, Site site);

template <typename T>
T shuffled(Shuffle kind, uint32_t mask, T value, int argument, int width, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, argument, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

#define SIMT_SHUFFLE(name, kind, Argument)                                                                  \
  template <typename T>                                                                                     \
  T name(unsigned mask, T value, Argument argument, int width = 32, simt::Site site = simt::Site::here()) { \
    return simt::shuffled(simt::Shuffle::kind, mask, value, static_cast<int>(argument), width, site);       \
  }
SIMT_SHUFFLE(__shfl_sync, kIndex, int)
SIMT_SHUFFLE(__shfl_up_sync, kUp, unsigned)
SIMT_SHUFFLE(__shfl_down_sync, kDown, unsigned)
SIMT_SHUFFLE(__shfl_xor_sync, kXor, int)
#undef SIMT_SHUFFLE

#define SIMT_REDUCE(name, kind, T)                                                                     \
  inline T name(unsigned mask, T value, simt::Site site = simt::Site::here()) {                        \
    return static_cast<T>(simt::reduce(simt::Reduce::kind, mask, static_cast<uint32_t>(value), site)); \
  }
SIMT_REDUCE(__reduce_add_sync, kAdd, unsigned)
SIMT_REDUCE(__reduce_add_sync, kAddSigned, int)
SIMT_REDUCE(__reduce_min_sync, kMin, unsigned)
SIMT_REDUCE(__reduce_min_sync, kMinSigned, int)
SIMT_REDUCE(__reduce_max_sync, kMax, unsigned)
SIMT_REDUCE(__reduce_max_sync, kMaxSigned, int)
SIMT_REDUCE(__reduce_and_sync, kAnd, unsigned)
SIMT_REDUCE(__reduce_or_sync, kOr, unsigned)
SIMT_REDUCE(__reduce_xor_sync, kXor, unsigned)
#undef SIMT_REDUCE

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::vote("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::vote("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::vote("__all_sync", mask, predicate != 0, site) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, simt::Site site = simt::Site::here()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return simt::match(mask, bits, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::here()) {
  simt::sync_warp(mask, site);
}
