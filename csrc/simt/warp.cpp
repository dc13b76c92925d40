#include "warp.h"

#include <algorithm>
#include <bit>

#include "machine.h"

namespace simt {
namespace {

// What a lane brings to an operation and takes away from it.
struct Lane {
  uint64_t value;
  int argument = 0, width = 0;
  Shuffle kind = Shuffle::kIndex;
  Reduce reduce = Reduce::kAdd;
  uint64_t result = 0;
};

Lane& lane(const WarpOperation& operation, unsigned i) { return *static_cast<Lane*>(operation.lane[i]); }

template <typename F>
void for_lanes(uint32_t mask, F&& f) {
  for (; mask; mask &= mask - 1) {
    f(static_cast<unsigned>(std::countr_zero(mask)));
  }
}

// The lane that lane `i` reads; itself where the source is outside of its segment of `width` lanes.
int source_lane(int i, const Lane& self) {
  const int segment = i & ~(self.width - 1), last = segment + self.width - 1;
  switch (self.kind) {
    case Shuffle::kIndex:
      return segment + (self.argument & (self.width - 1));
    case Shuffle::kUp:
      return i - self.argument < segment ? i : i - self.argument;
    case Shuffle::kDown:
      return i + self.argument > last ? i : i + self.argument;
    case Shuffle::kXor:
      // CUDA lets it read a lower segment, not a higher one.
      return (i ^ self.argument) > last ? i : i ^ self.argument;
  }
  __builtin_unreachable();
}

void finish_shuffle(const WarpOperation& operation) {
  for_lanes(operation.mask, [&](unsigned i) {
    Lane& self = lane(operation, i);
    const int source = source_lane(static_cast<int>(i), self);
    if (!(operation.mask >> source & 1)) {
      Machine& m = machine();
      m.fail(m.warp_thread(i), std::string(operation.name) + " [" + operation.site.text() + "] reads lane " +
                                   std::to_string(source) + ", which its mask does not name");
    }
    self.result = lane(operation, static_cast<unsigned>(source)).value;
  });
}

void finish_vote(const WarpOperation& operation) {
  uint64_t yes = 0;
  for_lanes(operation.mask, [&](unsigned i) { yes |= uint64_t{lane(operation, i).value != 0} << i; });
  for_lanes(operation.mask, [&](unsigned i) { lane(operation, i).result = yes; });
}

void finish_match(const WarpOperation& operation) {
  for_lanes(operation.mask, [&](unsigned i) {
    for_lanes(operation.mask, [&](unsigned j) {
      lane(operation, i).result |= uint64_t{lane(operation, i).value == lane(operation, j).value} << j;
    });
  });
}

uint32_t combine(Reduce kind, uint32_t a, uint32_t b) {
  const auto sa = static_cast<int32_t>(a), sb = static_cast<int32_t>(b);
  switch (kind) {
    case Reduce::kAdd:
    case Reduce::kAddSigned:
      return a + b;
    case Reduce::kMin:
      return std::min(a, b);
    case Reduce::kMinSigned:
      return static_cast<uint32_t>(std::min(sa, sb));
    case Reduce::kMax:
      return std::max(a, b);
    case Reduce::kMaxSigned:
      return static_cast<uint32_t>(std::max(sa, sb));
    case Reduce::kAnd:
      return a & b;
    case Reduce::kOr:
      return a | b;
    case Reduce::kXor:
      return a ^ b;
  }
  __builtin_unreachable();
}

void finish_reduce(const WarpOperation& operation) {
  const unsigned first = static_cast<unsigned>(std::countr_zero(operation.mask));
  auto total = static_cast<uint32_t>(lane(operation, first).value);
  for_lanes(operation.mask & (operation.mask - 1), [&](unsigned i) {
    total = combine(lane(operation, first).reduce, total, static_cast<uint32_t>(lane(operation, i).value));
  });
  for_lanes(operation.mask, [&](unsigned i) { lane(operation, i).result = total; });
}

void finish_sync(const WarpOperation& operation) {
  Machine& m = machine();
  Past past;
  for_lanes(operation.mask, [&](unsigned i) { m.tell(m.warp_thread(i), past); });
  for_lanes(operation.mask, [&](unsigned i) { m.learn(m.warp_thread(i), past); });
}

}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width, Site site) {
  constexpr const char* names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  const char* name = names[static_cast<int>(kind)];
  if (width < 1 || width > 32 || (width & (width - 1)) ||
      (kind != Shuffle::kIndex && (argument < 0 || argument > 31))) {
    fail(std::string(name) + " [" + site.text() + "] with width " + std::to_string(width) + " and " +
         std::to_string(argument) + ": the width is a power of two up to 32, a distance is 0 ... 31");
  }
  Lane self{value, argument, width, kind};
  machine().meet(name, mask, &self, finish_shuffle, site);
  return self.result;
}

uint32_t vote(const char* name, uint32_t mask, bool predicate, Site site) {
  Lane self{predicate};
  machine().meet(name, mask, &self, finish_vote, site);
  return static_cast<uint32_t>(self.result);
}

uint32_t match(uint32_t mask, uint64_t value, Site site) {
  Lane self{value};
  machine().meet("__match_any_sync", mask, &self, finish_match, site);
  return static_cast<uint32_t>(self.result);
}

uint32_t reduce(Reduce kind, uint32_t mask, uint32_t value, Site site) {
  constexpr const char* names[] = {"__reduce_add_sync", "__reduce_add_sync", "__reduce_min_sync",
                                   "__reduce_min_sync", "__reduce_max_sync", "__reduce_max_sync",
                                   "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync"};
  Lane self{value};
  self.reduce = kind;
  machine().meet(names[static_cast<int>(kind)], mask, &self, finish_reduce, site);
  return static_cast<uint32_t>(self.result);
}

void sync_warp(uint32_t mask, Site site) { machine().meet("__syncwarp", mask, nullptr, finish_sync, site); }

}  // namespace simt
