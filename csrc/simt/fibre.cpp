#include "fibre.h"

#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#if defined(__x86_64__)
// What the System V calling convention lets a function change, it may have changed: only the rest is kept. ucontext
// would also ask the kernel for the signal mask, twice per switch, which costs more than all that a thread does between
// two barriers.
extern "C" void simt_change(void** from, void* to);
asm(R"(
.text
.globl simt_change
.hidden simt_change
.type simt_change, @function
simt_change:
  .cfi_startproc
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .cfi_endproc
.size simt_change, .-simt_change
)");
#endif

StackPool::~StackPool() {
  if (base_) {
    munmap(base_, count_ * kStride);
  }
}

void StackPool::reserve(size_t count) {
  if (count <= count_) {
    return;
  }
  if (base_) {
    munmap(base_, count_ * kStride);
  }
  void* memory =
      mmap(nullptr, count * kStride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    base_ = nullptr, count_ = 0;
    throw std::bad_alloc();
  }
  base_ = static_cast<char*>(memory);
  count_ = count;
  for (size_t i = 0; i < count; ++i) {
    mprotect(base_ + i * kStride, kGuardBytes, PROT_NONE);
  }
}

void Fibre::prepare(char* stack, size_t bytes, Entry entry) {
  bottom_ = stack;
  bytes_ = bytes;
  fake_stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  // The frames of the fibre that was here before, which may have been left in the middle.
  ASAN_UNPOISON_MEMORY_REGION(stack, bytes);
#endif
#if defined(__x86_64__)
  // Six registers, the entry as the address to return to, and a return address of nobody, which also aligns the stack
  // as a call would.
  void** top = reinterpret_cast<void**>(stack + bytes) - 8;
  for (int i = 0; i < 6; ++i) {
    top[i] = nullptr;
  }
  top[6] = reinterpret_cast<void*>(entry);
  top[7] = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fibre::change(Fibre& from, Fibre& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.bytes_);
#endif
#if defined(__x86_64__)
  simt_change(&from.stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&from.context_, &to.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

void Fibre::arrived([[maybe_unused]] Fibre& self, [[maybe_unused]] Fibre& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack_, &from.bottom_, &from.bytes_);
#endif
}

}  // namespace simt
