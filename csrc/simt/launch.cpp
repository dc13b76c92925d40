#include "launch.h"

#include "machine.h"

namespace simt {

void run(dim3 grid, dim3 block, size_t shared_bytes, const Job& job) { machine().run(grid, block, shared_bytes, job); }

}  // namespace simt
