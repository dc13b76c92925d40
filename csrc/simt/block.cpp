#include "block.h"

#include "machine.h"

namespace simt {

int block_barrier(unsigned id, unsigned count, bool predicate, const char* name, bool waits, Site site) {
  return machine().barrier(id, count, predicate, name, waits, site);
}

void memory_fence() { machine().fence(); }

void* shared_array(const void* function, Site site, const char* name, size_t bytes, size_t alignment,
                   unsigned granule) {
  machine().here("a shared variable");
  return machine().memory.shared(function, site, name, bytes, alignment, granule);
}

void* dynamic_shared_array(size_t alignment, unsigned granule) {
  machine().here("dynamic shared memory");
  return machine().memory.dynamic_shared(alignment, granule);
}

}  // namespace simt
