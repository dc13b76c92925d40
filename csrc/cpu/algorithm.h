// Which algorithm serves each convolution: counted, and told with its reasons. The choice is made in here, and who
// measures, tests or asks for it has to see it.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace fastgan {

enum class Algorithm {
  kPackedDirect,
  kFewPixels,
  kUnfolded,
  kWinograd,
  kDirect,
  kTorch,
  kQuantizedWinograd,
  kQuantizedDirect,
  kUnfoldedWeightGrad,
  kDenseWeightGrad,
  kDirectWeightGrad,
  kWinogradWeightGrad,
  kTorchWeightGrad,
};

std::string_view algorithm_name(Algorithm algorithm);

// One more call, in whichever thread.
void count_call(Algorithm algorithm);

// One more call of kWinograd that ran with F(m x m, r x r).
void count_winograd(int64_t m, int64_t r);

// Why an algorithm does not take a call; false where it does. Each # of the text stands for the next of the numbers, so
// that a call that nobody asks about writes no text.
struct Refusal {
  const char* text = nullptr;
  int64_t first = 0, second = 0;

  explicit operator bool() const { return text != nullptr; }
};

// An algorithm that was thought of for a call.
struct Candidate {
  Algorithm algorithm;
  int64_t m = 0, r = 0;     // of Winograd's F(m x m, r x r)
  double predicted_ms = 0;  // by the cost model; 0 where it has none
  Refusal refusal = {};
};
using Candidates = std::vector<Candidate>;

}  // namespace fastgan
