// Calls of kernels that are recorded once and then run one behind the other. Between two of them an interpreter and a
// dispatcher would find the caches full of images, and take as long as a small layer.
#pragma once

#include <memory>
#include <tuple>
#include <utility>

#include "common.h"

namespace fastgan {

class RecordedCall {
 public:
  virtual ~RecordedCall() = default;
  virtual void run() const = 0;
  // Swaps its argument number `place` with another tensor; false where that is no tensor.
  virtual bool swap(size_t place, Tensor& tensor) = 0;
};

using RecordedCalls = std::vector<std::unique_ptr<RecordedCall>>;

// What this thread's calls are added to, instead of being run; or null.
RecordedCalls* recording_of_thread();

// With arguments of its own.
template <typename... Args>
class RecordedCallOf final : public RecordedCall {
 public:
  RecordedCallOf(void (*function)(Args...), const std::decay_t<Args>&... args) : function_(function), args_(args...) {}

  void run() const override { std::apply(function_, args_); }

  bool swap(size_t place, Tensor& tensor) override {
    return std::apply(
        [&](auto&... args) {
          size_t at = 0;
          return ((at++ == place && swap_with(args, tensor)) || ...);
        },
        args_);
  }

 private:
  static bool swap_with(Tensor& own, Tensor& other) {
    std::swap(own, other);
    return true;
  }
  static bool swap_with(std::optional<Tensor>& own, Tensor& other) { return own && swap_with(*own, other); }
  template <typename T>
  static bool swap_with(T&, Tensor&) {
    return false;
  }

  void (*const function_)(Args...);
  std::tuple<std::decay_t<Args>...> args_;
};

// A kernel as TORCH_BOX takes it, whose calls can be recorded.
template <auto kFunction>
struct Recordable;
template <typename... Args, void (*kFunction)(Args...)>
struct Recordable<kFunction> {
  static void call(Args... args) {
    if (RecordedCalls* const calls = recording_of_thread()) {
      calls->push_back(std::make_unique<RecordedCallOf<Args...>>(kFunction, args...));
    } else {
      kFunction(std::forward<Args>(args)...);
    }
  }
};

}  // namespace fastgan
