#include "memory.h"

#include <link.h>

#include <algorithm>
#include <cstring>
#include <sstream>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace simt {
namespace {

// Around each shared array, so that what runs over its end meets nobody else's: more than a row of any tile.
constexpr size_t kRedZone = 4096;
// The limit on what a block may have, with the zones around as many arrays as a kernel could declare.
constexpr size_t kArenaBytes = Memory::kMostShared + 64 * 2 * kRedZone;
constexpr size_t kSharedAlignment = 128;

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

const char* verb(Access kind) {
  return kind == Access::kRead ? "reads" : kind == Access::kWrite ? "writes" : "updates atomically";
}

const char* past(Access kind) {
  return kind == Access::kRead ? "read" : kind == Access::kWrite ? "wrote" : "updated atomically";
}

struct Image {
  uintptr_t inside, begin, end;
};

int find_image(dl_phdr_info* info, size_t, void* data) {
  Image& image = *static_cast<Image*>(data);
  uintptr_t begin = UINTPTR_MAX, end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    if (header.p_type == PT_LOAD) {
      begin = std::min<uintptr_t>(begin, info->dlpi_addr + header.p_vaddr);
      end = std::max<uintptr_t>(end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
    }
  }
  if (image.inside < begin || image.inside >= end) {
    return 0;
  }
  image.begin = begin, image.end = end;
  return 1;
}

}  // namespace

std::string Region::text(uintptr_t address) const {
  std::ostringstream text;
  const char* what = kind == Kind::kShared   ? "shared memory"
                     : kind == Kind::kGlobal ? "global memory"
                                             : "the arguments";
  text << what;
  if (!name.empty()) {
    text << " `" << name << "`";
  }
  if (address < begin) {
    text << ", " << begin - address << " bytes before its begin";
  } else if (address >= end()) {
    text << ", " << address - end() << " bytes past its end";
  } else {
    text << " at byte " << address - begin;
  }
  text << " (it has " << size << " bytes)";
  return text.str();
}

void Known::add(const Release& release) {
  std::vector<Release>& releases = blocks_[release.block];
  for (Release& known : releases) {
    if (known.thread == release.thread) {
      if (std::pair(known.epoch, known.clock) < std::pair(release.epoch, release.clock)) {
        known = release;
      }
      return;
    }
  }
  releases.push_back(release);
}

void Known::add(const Known& other) {
  for (const auto& [block, releases] : other.blocks_) {
    for (const Release& release : releases) {
      add(release);
    }
  }
}

bool Known::covers(const Touch& touch) const {
  const auto found = blocks_.find(touch.block);
  if (found == blocks_.end()) {
    return false;
  }
  return std::any_of(found->second.begin(), found->second.end(), [&](const Release& release) {
    return touch.epoch < release.epoch ||
           (touch.epoch == release.epoch && touch.thread == release.thread && touch.clock <= release.clock);
  });
}

Memory::Memory() : arena_(new char[kArenaBytes + kSharedAlignment]) {
  Image image{reinterpret_cast<uintptr_t>(&machine), 0, 0};
  dl_iterate_phdr(find_image, &image);
  image_begin_ = image.begin, image_end_ = image.end;
  arguments_.kind = Region::Kind::kArgument;
  arguments_.writable = false;
  ASAN_POISON_MEMORY_REGION(arena_.get(), kArenaBytes + kSharedAlignment);
}

Region& Memory::add_buffer(const void* data, size_t bytes, unsigned granule, bool writable, std::string name) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  for (const auto& other : buffers_) {
    if (begin < other->end() && other->begin < begin + bytes) {
      throw Error("simt: " + name + " overlaps " + other->name);
    }
  }
  auto region = std::make_unique<Region>();
  region->begin = begin;
  region->size = bytes;
  region->granule = granule;
  region->writable = writable;
  region->name = std::move(name);
  if (writable) {
    region->cells.reset(new Cell[round_up(bytes, granule) / granule]());
  }
  regions_[region->begin] = region.get();
  buffers_.push_back(std::move(region));
  return *buffers_.back();
}

void* Memory::workspace(size_t bytes, unsigned granule, std::string name, bool zeros) {
  workspaces_.emplace_back(new char[bytes]);
  char* data = workspaces_.back().get();
  std::memset(data, zeros ? 0 : 0xff, bytes);
  add_buffer(data, bytes, granule, true, std::move(name)).fresh = !zeros;
  return data;
}

void Memory::clear_buffers() {
  buffers_.clear();
  workspaces_.clear();
  regions_.clear();
  last_ = nullptr;
}

void Memory::begin_launch(const void* arguments, size_t bytes, size_t dynamic_bytes, uint32_t first_epoch) {
  if (dynamic_bytes > kMostShared) {
    simt::fail("a launch with " + std::to_string(dynamic_bytes) + " bytes of dynamic shared memory, at most " +
               std::to_string(kMostShared));
  }
  ASAN_POISON_MEMORY_REGION(arena_.get(), kArenaBytes + kSharedAlignment);
  shared_.clear();
  dynamic_.reset();
  released.clear();
  last_ = nullptr;
  regions_.clear();
  for (const auto& buffer : buffers_) {
    regions_[buffer->begin] = buffer.get();
  }
  arguments_.begin = reinterpret_cast<uintptr_t>(arguments);
  arguments_.size = bytes;
  regions_[arguments_.begin] = &arguments_;
  launch_epoch_ = first_epoch;
  arena_used_ = static_bytes_ = 0;
  dynamic_bytes_ = dynamic_bytes;
}

void Memory::begin_block(uint32_t first_epoch) {
  block_epoch_ = first_epoch;
  const auto poison = [](const Region& region) {
    std::memset(reinterpret_cast<void*>(region.begin), 0xff, region.size);
  };
  for (const auto& [key, region] : shared_) {
    poison(*region);
  }
  if (dynamic_) {
    poison(*dynamic_);
  }
}

void* Memory::shared(const void* function, Site site, const char* name, size_t bytes, size_t alignment,
                     unsigned granule) {
  const auto place = [&](size_t at_least) {
    const uintptr_t base = round_up(reinterpret_cast<uintptr_t>(arena_.get()), kSharedAlignment);
    const uintptr_t begin = round_up(base + arena_used_ + kRedZone, std::max(alignment, kSharedAlignment));
    arena_used_ = begin + at_least - base;
    return begin;
  };
  const bool dynamic = function == nullptr;
  std::unique_ptr<Region>& region = dynamic ? dynamic_ : shared_[Key{function, site.line, name}];
  if (!region) {
    if (!dynamic) {
      static_bytes_ = round_up(static_bytes_, alignment) + bytes;
    }
    if (static_bytes_ > kStaticShared || static_bytes_ + dynamic_bytes_ > kMostShared) {
      simt::fail("declares " + std::to_string(static_bytes_) + " bytes of static shared memory beside " +
                 std::to_string(dynamic_bytes_) + " dynamic ones, at most " + std::to_string(kStaticShared) + " and " +
                 std::to_string(kMostShared) + " in all");
    }
    region = std::make_unique<Region>();
    region->kind = Region::Kind::kShared;
    region->begin = place(bytes);
    region->size = bytes;
    region->granule = granule;
    region->name = name;
    region->cells.reset(new Cell[round_up(bytes, granule) / granule]());
    ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(region->begin), bytes);
    std::memset(reinterpret_cast<void*>(region->begin), 0xff, bytes);
    regions_[region->begin] = region.get();
  }
  return reinterpret_cast<void*>(region->begin);
}

void* Memory::dynamic_shared(size_t alignment, unsigned granule) {
  if (dynamic_ && dynamic_->granule != granule) {
    simt::fail("dynamic shared memory is declared with elements of " + std::to_string(granule) + " and of " +
               std::to_string(dynamic_->granule) + " bytes");
  }
  return shared(nullptr, Site{}, "dynamic", dynamic_bytes_, alignment, granule);
}

Region* Memory::find(uintptr_t address) {
  if (last_ && address - last_->begin < last_->size) {
    return last_;
  }
  auto next = regions_.upper_bound(address);
  if (next == regions_.begin()) {
    return nullptr;
  }
  Region* region = std::prev(next)->second;
  return address - region->begin < region->size ? last_ = region : nullptr;
}

void Memory::fail_outside(Access kind, uintptr_t address, size_t bytes, const void* code) {
  std::ostringstream text;
  text << verb(kind) << " " << bytes << " bytes out of bounds";
  const Region* nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const auto& [begin, region] : regions_) {
    const uintptr_t gap = address < begin ? begin - address : address >= region->end() ? address - region->end() : 0;
    if (gap < distance) {
      nearest = region, distance = gap;
    }
  }
  if (machine().stacks().holds(address)) {
    simt::fail(std::string(verb(kind)) + " the local memory of another thread [" + source_of(code) + "]");
  }
  if (nearest && distance < (1u << 20)) {
    text << ": " << nearest->text(address);
  } else {
    text << ": address 0x" << std::hex << address << " is in no buffer that the launch was given";
  }
  text << " [" << source_of(code) << "]";
  simt::fail(text.str());
}

Region& Memory::region_of(Thread& thread, uintptr_t address, size_t bytes, Access kind, const void* code) {
  Region* region = find(address);
  if (!region || bytes > region->end() - address) {
    fail_outside(kind, address, bytes, code);
  }
  if (kind != Access::kRead && !region->writable) {
    machine().fail(thread, std::string(verb(kind)) + " what is only to be read: " + region->text(address) + " [" +
                               source_of(code) + "]");
  }
  return *region;
}

Touch Memory::touch(const Thread& thread, Access kind, const void* code) const {
  Touch touch;
  touch.epoch = machine().epoch();
  touch.clock = thread.clock;
  touch.block = machine().block_rank();
  touch.place = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(code) - image_begin_);
  touch.thread = static_cast<uint16_t>(thread.rank);
  touch.kind = kind;
  return touch;
}

bool Memory::ordered(const Thread& thread, const Touch& touch) const {
  const Machine& now = machine();
  if (touch.epoch < launch_epoch_) {
    return true;
  }
  if (touch.epoch >= block_epoch_) {
    return touch.epoch < now.epoch() || now.ordered(thread, touch.thread, touch.clock);
  }
  return now.known().covers(touch) || thread.known.covers(touch);
}

void Memory::report(const Region& region, uintptr_t address, Access kind, const void* code, const Touch& other) {
  std::ostringstream text;
  text << "race: it " << verb(kind) << " " << region.text(address) << " [" << source_of(code) << "], which ";
  if (other.epoch >= block_epoch_) {
    text << "thread " << machine().thread_text(machine().threads()[other.thread]) << " of its block "
         << past(other.kind);
  } else {
    text << "a thread (" << other.thread << ") of block " << other.block << " " << past(other.kind);
  }
  text << " [" << source_of(reinterpret_cast<const void*>(image_begin_ + other.place)) << "], and ";
  text << (other.epoch >= block_epoch_ ? "no barrier lies between" : "no fences and atomics order the two blocks");
  simt::fail(text.str());
}

void Memory::check(Thread& thread, Region& region, Cell& cell, uintptr_t address, Access kind, const void* code) {
  const bool shared = region.kind == Region::Kind::kShared;
  const bool of_before = shared ? cell.write.epoch < block_epoch_ : region.fresh && cell.write.epoch == 0;
  if (of_before && kind != Access::kWrite) {
    simt::fail(std::string(verb(kind)) + " uninitialised " + region.text(address) + " [" + source_of(code) + "]");
  }
  if (cell.write.in_flight && !of_before) {
    simt::fail(std::string(verb(kind)) + " " + region.text(address) + " [" + source_of(code) +
               "] while cp.async of thread " + machine().thread_text(machine().threads()[cell.write.thread]) + " [" +
               source_of(reinterpret_cast<const void*>(image_begin_ + cell.write.place)) +
               "] is in flight: no wait_group has completed it");
  }
  const auto conflicts = [&](const Touch& other) {
    const bool both_atomic = kind == Access::kAtomic && other.kind == Access::kAtomic;
    return other.epoch >= (shared ? block_epoch_ : launch_epoch_) && !both_atomic && !ordered(thread, other);
  };
  if (conflicts(cell.write)) {
    report(region, address, kind, code, cell.write);
  }
  if (kind != Access::kRead) {
    for (const Touch& read : cell.read) {
      if (conflicts(read)) {
        report(region, address, kind, code, read);
      }
    }
    Touch now = touch(thread, kind, code);
    const Touch& last = cell.write;
    if (last.kind == Access::kWrite && last.epoch == now.epoch && last.thread == now.thread &&
        last.clock == now.clock) {
      // An atomic operation behind a plain write of the same thread does not make the write atomic.
      now.kind = Access::kWrite;
    }
    cell.write = now;
    return;
  }
  Touch now = touch(thread, kind, code);
  Touch &newest = cell.read[0], &other = cell.read[1];
  const bool known = newest.epoch == now.epoch && newest.thread == now.thread;
  const bool keep_other = newest.epoch == now.epoch && other.epoch == now.epoch &&
                          newest.thread / kWarp == now.thread / kWarp && other.thread / kWarp != now.thread / kWarp;
  if (!known && !keep_other) {
    other = newest;
  }
  newest = now;
}

void Memory::access(Thread& thread, uintptr_t address, size_t bytes, Access kind, const void* code) {
  if (address - reinterpret_cast<uintptr_t>(thread.stack) < StackPool::kStackBytes) {
    return;
  }
  if (address >= image_begin_ && address < image_end_) {
    if (kind != Access::kRead) {
      simt::fail(std::string(verb(kind)) + " a global variable of the module [" + source_of(code) + "]");
    }
    return;
  }
  Region& region = region_of(thread, address, bytes, kind, code);
  (kind == Access::kRead ? region.read_bytes : region.written_bytes) += bytes;
  if (!region.cells) {
    return;
  }
  const size_t first = (address - region.begin) / region.granule;
  const size_t last = (address - region.begin + bytes - 1) / region.granule;
  for (size_t i = first; i <= last; ++i) {
    check(thread, region, region.cells[i], region.begin + i * region.granule, kind, code);
  }
}

void Memory::set_in_flight(Thread& thread, uintptr_t address, size_t bytes, const void* code) {
  access(thread, address, bytes, Access::kWrite, code);
  Region& region = *find(address);
  for (size_t i = 0; i < bytes; i += region.granule) {
    region.cells[(address + i - region.begin) / region.granule].write.in_flight = true;
  }
}

void Memory::land(Thread& thread, uintptr_t address, size_t bytes) {
  Region& region = *find(address);
  for (size_t i = 0; i < bytes; i += region.granule) {
    Touch& write = region.cells[(address + i - region.begin) / region.granule].write;
    write.in_flight = false;
    // From here on it is a write of this thread, which a barrier has to order before the reads of others.
    write.epoch = machine().epoch();
    write.clock = thread.clock;
  }
}

}  // namespace simt
