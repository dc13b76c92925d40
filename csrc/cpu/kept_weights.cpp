#include "kept_weights.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>

namespace fastgan {
namespace {

using Made = std::map<std::vector<int64_t>, std::shared_ptr<const LargeBuffer>>;

struct Kept {
  uint64_t hash = 0;
  Made made;  // of the values that have this hash
  bool frozen = false, dropped = false;
};

std::mutex mutex;
std::unordered_map<const float*, Kept> kept;

constexpr int64_t kLanes = 64, kBlock = 1 << 14;
constexpr uint32_t kStart = 2166136261u, kFactor = 2654435761u;
constexpr uint64_t kWideStart = 14695981039346656037u, kWideFactor = 11400714819323198485u;

// A product alone carries nothing downwards: a sign, its highest bit, would stay there, and a second sign undo the
// first.
FASTGAN_INLINE uint32_t mixed(uint32_t hash, uint32_t value) {
  const uint32_t product = (hash ^ value) * kFactor;
  return product ^ (product >> 15);
}
uint64_t mixed_wide(uint64_t hash, uint64_t value) {
  const uint64_t product = (hash ^ value) * kWideFactor;
  return product ^ (product >> 32);
}

FASTGAN_INLINE uint32_t bits_of(const float* value) {
  uint32_t bits;
  std::memcpy(&bits, value, sizeof bits);
  return bits;
}

// Every 64th value in one of 64 independent lanes.
FASTGAN_MULTIVERSION uint64_t hash_block(const float* values, int64_t count) {
  std::array<uint32_t, kLanes> lanes;
  lanes.fill(kStart);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = mixed(lanes[l], bits_of(values + i + l));
  }
  for (int64_t l = 0; i < count; ++i, ++l) lanes[l] = mixed(lanes[l], bits_of(values + i));
  uint64_t hash = kWideStart;
  for (const uint32_t lane : lanes) hash = mixed_wide(hash, lane);
  return hash;
}

uint64_t hash_of(const float* values, int64_t count) {
  const int64_t blocks = ceil_div(count, kBlock);
  std::vector<uint64_t> hashes(blocks);
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      hashes[b] = hash_block(values + b * kBlock, std::min(kBlock, count - b * kBlock));
    }
  });
  uint64_t hash = kWideStart;
  for (const uint64_t block : hashes) hash = mixed_wide(hash, block);
  return hash;
}

}  // namespace

Keeping keeping_of(const float* weight) {
  const std::lock_guard lock(mutex);
  const auto found = kept.find(weight);
  if (found == kept.end()) return Keeping::kNo;
  return found->second.frozen ? Keeping::kFrozen : Keeping::kHashed;
}

std::shared_ptr<const LargeBuffer> made_of(const float* weight, int64_t count, const std::vector<int64_t>& key,
                                           const std::function<LargeBuffer(bool)>& make) {
  const Keeping keeping = keeping_of(weight);
  if (keeping == Keeping::kNo) return std::make_shared<LargeBuffer>(make(false));
  const uint64_t hash = keeping == Keeping::kFrozen ? 0 : hash_of(weight, count);
  {
    const std::lock_guard lock(mutex);
    const auto found = kept.find(weight);
    if (found != kept.end()) {
      Kept& of_weight = found->second;
      if (of_weight.made.empty()) of_weight.hash = hash;
      STD_TORCH_CHECK(!of_weight.dropped || of_weight.made.contains(key),
                      "a weight's values were dropped, and this call needs them anew: its shapes, or the number of "
                      "threads, are not those that its algorithms were prepared for");
      if (of_weight.hash != hash) {
        kept.erase(found);
      } else if (const auto made = of_weight.made.find(key); made != of_weight.made.end()) {
        return made->second;
      }
    }
  }
  // Outside the lock: other threads go on, and at worst make the same.
  auto made = std::make_shared<const LargeBuffer>(make(true));
  const std::lock_guard lock(mutex);
  const auto found = kept.find(weight);
  if (found != kept.end() && found->second.hash == hash) found->second.made[key] = made;
  return made;
}

}  // namespace fastgan

extern "C" {
__attribute__((visibility("default"))) void fastgan_keep_weight(const float* weight) {
  const std::lock_guard lock(fastgan::mutex);
  fastgan::kept.try_emplace(weight);
}

__attribute__((visibility("default"))) void fastgan_freeze_weight(const float* weight) {
  const std::lock_guard lock(fastgan::mutex);
  // What was made of another weight that lay here is none of its.
  if (fastgan::Kept& of_weight = fastgan::kept[weight]; !of_weight.frozen) of_weight = {.frozen = true};
}

// Gives the memory of a frozen weight's values back to the system, but for the pages at its ends, where something was
// made of it: 1 where it did. What no algorithm made anything of is read in every call.
__attribute__((visibility("default"))) int64_t fastgan_drop_weight(const float* weight, int64_t bytes) {
  const std::lock_guard lock(fastgan::mutex);
  const auto found = fastgan::kept.find(weight);
  if (found == fastgan::kept.end() || !found->second.frozen || found->second.made.empty()) return 0;
  if (!fastgan::give_back_pages(const_cast<float*>(weight), bytes)) return 0;
  found->second.dropped = true;
  return 1;
}

__attribute__((visibility("default"))) void fastgan_forget_weight(const float* weight) {
  const std::lock_guard lock(fastgan::mutex);
  fastgan::kept.erase(weight);
}

// Of what is made of one weight.
__attribute__((visibility("default"))) int64_t fastgan_made_bytes(const float* weight) {
  const std::lock_guard lock(fastgan::mutex);
  int64_t bytes = 0;
  const auto found = fastgan::kept.find(weight);
  if (found == fastgan::kept.end()) return 0;
  for (const auto& [key, made] : found->second.made) bytes += made->bytes();
  return bytes;
}

// Of everything that is kept.
__attribute__((visibility("default"))) int64_t fastgan_kept_bytes() {
  const std::lock_guard lock(fastgan::mutex);
  int64_t bytes = 0;
  for (const auto& [weight, of_weight] : fastgan::kept) {
    for (const auto& [key, made] : of_weight.made) bytes += made->bytes();
  }
  return bytes;
}
}
