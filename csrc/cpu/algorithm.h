// Which algorithm served each convolution, counted: the choice is made in here, and who measures or tests it has to
// see it.
#pragma once

#include <cstdint>

namespace fastgan {

enum class Algorithm {
  kFewPixels,
  kUnfolded,
  kWinograd,
  kDirect,
  kTorch,
  kUnfoldedWeightGrad,
  kDenseWeightGrad,
  kDirectWeightGrad,
  kTorchWeightGrad,
};

// One more call, in whichever thread.
void count_call(Algorithm algorithm);

// One more call of kWinograd that ran with F(m x m, r x r).
void count_winograd(int64_t m, int64_t r);

}  // namespace fastgan
