// How what an algorithm makes of a weight is stored.
#pragma once

namespace fastgan {

enum class Storage {
  kFloat,
  kBfloat16,
  kInt16,  // of quantised weights: pairs of input channels side by side
  kInt8,   // the same, widened to 16 bits in the register they are loaded into
};

}  // namespace fastgan
