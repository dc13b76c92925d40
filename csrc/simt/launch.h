// simt::launch, what <<<...>>> is to nvcc.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "error.h"
#include "types.h"

namespace simt {

// A kernel with its arguments, which it reads from there.
struct Job {
  const void* kernel;
  void (*call)(const void* bound);
  const void* bound;
  size_t bytes;
};

void run(dim3 grid, dim3 block, size_t shared_bytes, const Job& job);

// Runs kernel<<<grid, block, shared_bytes>>>(arguments...) to its end, under the schedule in force; throws Error.
template <typename... Parameters, typename... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Bound {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Bound bound{kernel, {std::forward<Arguments>(arguments)...}};
  const auto call = [](const void* data) {
    const Bound& self = *static_cast<const Bound*>(data);
    std::apply(self.kernel, self.arguments);
  };
  run(grid, block, shared_bytes, {reinterpret_cast<const void*>(kernel), call, &bound, sizeof bound});
}

}  // namespace simt
