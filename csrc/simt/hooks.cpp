// What g++ calls from the code of kernels: -fsanitize=thread for every load and store, -fsanitize=alignment,bounds for
// what no address shows. None of the sanitizers' own libraries is linked; these definitions take their place.

#include <cstdint>
#include <cstring>
#include <string>

#include "machine.h"

namespace {

inline __attribute__((always_inline)) void access(const void* address, size_t bytes, simt::Access kind,
                                                  const void* code) {
  simt::Machine& machine = simt::machine();
  if (simt::Thread* thread = machine.current()) {
    machine.memory.access(*thread, reinterpret_cast<uintptr_t>(address), bytes, kind, code);
  }
}

}  // namespace

extern "C" {

#define SIMT_HOOKS(size)                                                                                             \
  void __tsan_read##size(void* p) { access(p, size, simt::Access::kRead, __builtin_return_address(0)); }             \
  void __tsan_write##size(void* p) { access(p, size, simt::Access::kWrite, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##size(void* p) { access(p, size, simt::Access::kRead, __builtin_return_address(0)); }   \
  void __tsan_unaligned_write##size(void* p) { access(p, size, simt::Access::kWrite, __builtin_return_address(0)); } \
  void __tsan_volatile_read##size(void* p) { access(p, size, simt::Access::kRead, __builtin_return_address(0)); }    \
  void __tsan_volatile_write##size(void* p) { access(p, size, simt::Access::kWrite, __builtin_return_address(0)); }
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
#undef SIMT_HOOKS

void __tsan_read_range(void* p, unsigned long size) {
  access(p, size, simt::Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* p, unsigned long size) {
  access(p, size, simt::Access::kWrite, __builtin_return_address(0));
}
// Of the host's functions in the same file.
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// The layout of what UBSan passes is part of GCC's ABI.
struct UbsanLocation {
  const char* file;
  uint32_t line, column;
};
struct UbsanType {
  uint16_t kind, info;
  char name[1];
};
struct UbsanMismatch {
  UbsanLocation location;
  const UbsanType* type;
  unsigned char log_alignment, kind;
};
struct UbsanBounds {
  UbsanLocation location;
  const UbsanType *array, *index;
};

void __ubsan_handle_type_mismatch_v1(UbsanMismatch* data, uintptr_t address) {
  const uintptr_t alignment = uintptr_t{1} << data->log_alignment;
  if (address % alignment == 0) {
    return;  // a null pointer, which the access itself reports
  }
  simt::fail("misaligned access to a " + std::string(data->type->name) + ": the address is " +
             std::to_string(address % alignment) + " bytes past a multiple of " + std::to_string(alignment) + " [" +
             simt::Site{data->location.file, data->location.line}.text() + "]");
}

void __ubsan_handle_out_of_bounds(UbsanBounds* data, uintptr_t index) {
  simt::fail("index " + std::to_string(static_cast<intptr_t>(index)) + " is out of bounds of a " +
             std::string(data->array->name) + " [" + simt::Site{data->location.file, data->location.line}.text() + "]");
}

}  // extern "C"
