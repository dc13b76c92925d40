// The activations by name: plain C++, for launches and kernels.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>

namespace fastgan {

// In the order of fastgan.reference.activation.
enum class Act : int { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish };

constexpr bool is_curved(Act act) { return act >= Act::kTanh; }

inline std::optional<Act> find_act(std::string_view name) {
  constexpr std::array<std::string_view, 9> kNames{"linear", "relu", "lrelu",    "tanh", "sigmoid",
                                                   "elu",    "selu", "softplus", "swish"};
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  return found == kNames.end() ? std::nullopt : std::optional(static_cast<Act>(found - kNames.begin()));
}

}  // namespace fastgan
