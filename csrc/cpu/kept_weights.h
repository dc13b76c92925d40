// What convolutions make of weights before they multiply with them, kept between the calls of a network that only
// infers.
//
// A weight is kept from when Python says so (fastgan_keep_weight) until it says that the tensor is gone. What was made
// of it is used again only where a hash of all its values is still the same, so that no way of writing to it can go
// unseen: every step of the hash is a bijection of one value, so that one changed value always changes it, and several
// undo each other about once in 2^32 times. Reading a weight costs a tenth of transforming it.
//
// A weight that is frozen (fastgan_freeze_weight), one that an inference engine owns, is never hashed: nobody writes to
// it. Once everything is made that its calls need, its values may be dropped (fastgan_drop_weight).
#pragma once

#include <functional>
#include <memory>

#include "common.h"
#include "large_buffer.h"

namespace fastgan {

enum class Keeping { kNo, kHashed, kFrozen };

// How the weight at this address is kept.
Keeping keeping_of(const float* weight);
inline bool is_kept(const float* weight) { return keeping_of(weight) != Keeping::kNo; }

// What make(lasting) makes of a weight of `count` values, which `key` tells from everything else that is made of it;
// `lasting` is whether it is kept. A weight that is kept and has changed, as one in training does, is kept no longer.
// Raises for one whose values were dropped.
std::shared_ptr<const LargeBuffer> made_of(const float* weight, int64_t count, const std::vector<int64_t>& key,
                                           const std::function<LargeBuffer(bool)>& make);

}  // namespace fastgan
