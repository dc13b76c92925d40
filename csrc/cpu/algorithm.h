// Which algorithm served each convolution, counted: the choice is made in here, and who measures or tests it has to
// see it.
#pragma once

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

}  // namespace fastgan
