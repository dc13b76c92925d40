// Fibres: threads of control that give way only where they say so, each on a stack of its own.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

// As many stacks as there were ever fibres at once, a page that must not be touched below each.
class StackPool {
 public:
  static constexpr size_t kStackBytes = 128 * 1024;

  ~StackPool();
  void reserve(size_t count);
  char* stack(size_t index) const { return base_ + index * kStride + kGuardBytes; }
  bool holds(uintptr_t address) const { return address - reinterpret_cast<uintptr_t>(base_) < count_ * kStride; }

 private:
  static constexpr size_t kGuardBytes = 4096;
  static constexpr size_t kStride = kStackBytes + kGuardBytes;
  char* base_ = nullptr;
  size_t count_ = 0;
};

// One side of a switch: where it stopped, and what AddressSanitizer has to know about its stack.
class Fibre {
 public:
  using Entry = void (*)();

  // Prepares the fibre to run `entry`, which must never return, from the beginning.
  void prepare(char* stack, size_t bytes, Entry entry);
  // Leaves `from`, which is running, for `to`; returns when somebody switches back to `from`.
  static void change(Fibre& from, Fibre& to);
  // The first thing that a fibre's entry does: ends the switch that brought it here.
  static void arrived(Fibre& self, Fibre& from);

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace simt
