// Calls of kernels that are recorded once and then run one behind the other. Between two of them an interpreter and a
// dispatcher would find the caches full of images, and take as long as a small layer.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <tuple>
#include <typeinfo>
#include <utility>

#include "common.h"

namespace fastgan {

// What a call has worked out from the sizes of its tensors and from arguments that never change, for its next run.
class CallPlans {
 public:
  // The number of threads, and up to four sizes of two tensors.
  using Key = std::array<int64_t, 9>;

  template <typename T, typename Make>
  std::shared_ptr<const T> get(const Key& key, Make&& make) {
    for (Plan& known : plans_) {
      if (*known.type != typeid(T)) continue;
      if (known.key != key) known = {&typeid(T), key, std::make_shared<const T>(make())};
      return std::static_pointer_cast<const T>(known.plan);
    }
    plans_.push_back({&typeid(T), key, std::make_shared<const T>(make())});
    return std::static_pointer_cast<const T>(plans_.back().plan);
  }

 private:
  struct Plan {
    const std::type_info* type;
    Key key;
    std::shared_ptr<const void> plan;
  };
  std::vector<Plan> plans_;
};

// Those of the recorded call that this thread runs; null while it runs none.
CallPlans*& plans_of_thread();

// make(), which depends on x's and the weight's sizes and on nothing that changes between two runs of a recorded call;
// there, it is called once for every T.
template <typename T, typename Make>
std::shared_ptr<const T> planned(const Tensor& x, const Tensor& weight, Make&& make) {
  CallPlans* const plans = plans_of_thread();
  if (!plans) return std::make_shared<const T>(make());
  CallPlans::Key key{torch::stable::get_num_threads()};
  const auto of_x = x.sizes(), of_weight = weight.sizes();
  std::copy_n(of_x.begin(), std::min<size_t>(of_x.size(), 4), key.begin() + 1);
  std::copy_n(of_weight.begin(), std::min<size_t>(of_weight.size(), 4), key.begin() + 5);
  return plans->get<T>(key, make);
}

class RecordedCall {
 public:
  virtual ~RecordedCall() = default;
  virtual void run() = 0;
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

  void run() override {
    const Planning planning(plans_);
    std::apply(function_, args_);
  }

  bool swap(size_t place, Tensor& tensor) override {
    return std::apply(
        [&](auto&... args) {
          size_t at = 0;
          return ((at++ == place && swap_with(args, tensor)) || ...);
        },
        args_);
  }

 private:
  // While it exists, this thread's calls find these plans.
  class Planning {
   public:
    explicit Planning(CallPlans& plans) : before_(std::exchange(plans_of_thread(), &plans)) {}
    ~Planning() { plans_of_thread() = before_; }
    Planning(const Planning&) = delete;
    Planning& operator=(const Planning&) = delete;

   private:
    CallPlans* const before_;
  };

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
  CallPlans plans_;
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
