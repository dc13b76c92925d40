// Weights stored in bfloat16 and widened to float in the register they are loaded into: half the memory to wait for.
//
// The values of two registers lie in one: of 2 * lanes values in a row, 32-bit word l holds value l in its lower half
// and value lanes + l in its upper one. So a load, a shift and a mask widen both, and nothing crosses lanes.
#pragma once

#include <bit>

#include "large_buffer.h"
#include "simd.h"
#include "storage.h"

namespace fastgan {

// Memory for so many values that will be read for long, two in one float's place.
inline LargeBuffer bf16_buffer(int64_t count) { return LargeBuffer(ceil_div(count, 2), true); }
inline BFloat16* bf16_of(const LargeBuffer& buffer) { return reinterpret_cast<BFloat16*>(buffer.get()); }

// Where value i lies.
inline int64_t paired(int64_t i, int64_t lanes) {
  constexpr bool kLowerFirst = std::endian::native == std::endian::little;
  const int64_t first = i / (2 * lanes) * 2 * lanes, upper = i / lanes % 2;
  return first + 2 * (i % lanes) + (kLowerFirst ? upper : 1 - upper);
}

// The two registers that start at value 0 of `from`.
template <typename V>
FASTGAN_INLINE void widen_pair(const BFloat16* from, V& lower, V& upper) {
  using Words = register_t<uint32_t, sizeof(V)>;
  const Words words = load<Words>(from);
  lower = std::bit_cast<V>(words << 16);
  upper = std::bit_cast<V>(words & 0xffff0000u);
}

}  // namespace fastgan
