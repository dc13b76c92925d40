// Which algorithm serves a convolution on the CPU: the one place that decides it, for the call and for who asks why.
#pragma once

#include <optional>
#include <string>

#include "algorithm.h"
#include "conv_geometry.h"

namespace fastgan {

struct ConvChoice {
  Algorithm algorithm;
  int64_t tile = 0;  // m of Winograd's F(m x m, r x r)
};

// Whether precision asks for "high" (see fastgan/backends.py) and not for "fp32"; raises for another.
bool asks_for_high(const char* op, const std::string& precision);

// The choice for a call whose half types are widened to float32 first, x and the weight being what they became: that
// `widened` holds then, and only what torch's convolution may be replaced by is left. `bias` is one that rides along in
// torch's convolution. What was thought of goes to `told`, if any, up to the one that was taken.
ConvChoice choose_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                              const ConvGeometry& g, bool widened, bool high, Candidates* told);

// The algorithm of this name (algorithm_name), for a float32 call that it can serve; raises for another.
ConvChoice chosen_convolution(const Tensor& x, const Tensor& weight, const ConvGeometry& g,
                              const std::string& algorithm, int64_t tile);

// The algorithms that can serve a float32 call, one line each: "name<TAB>tile<TAB>predicted ms", the chosen one first.
std::string tell_candidates(const Tensor& x, const Tensor& weight, const ConvGeometry& g, bool high);

// A refusal's text with its numbers.
std::string text_of(const Refusal& refusal);

// The choice and the fate of each algorithm, one line each: the chosen one's name; then "name<TAB>why", for each.
std::string tell(const ConvChoice& choice, const Candidates& told);

}  // namespace fastgan
