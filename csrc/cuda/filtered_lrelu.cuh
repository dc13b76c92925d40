// Device code of filtered_lrelu, its gradient and the gradient of that: filtered_lrelu_plan.h has the map that all
// three are, the two kernels' files how they compute it.
#pragma once

#include "filtered_lrelu_strip.cuh"
#include "filtered_lrelu_tile.cuh"

namespace fastgan {

using FlreluFunction = void (*)(FlreluCall, FlreluPlan, int64_t);

template <typename T, class Strip>
FlreluFunction flrelu_strip_function(FlreluMode mode) {
  switch (mode) {
    case FlreluMode::kActivate:
      return flrelu_strip_kernel<T, Strip, FlreluMode::kActivate>;
    case FlreluMode::kRecord:
      return flrelu_strip_kernel<T, Strip, FlreluMode::kRecord>;
    default:
      return flrelu_strip_kernel<T, Strip, FlreluMode::kReplay>;
  }
}

template <typename T>
FlreluFunction flrelu_function(FlreluKernel kernel, FlreluMode mode) {
  switch (kernel) {
    case FlreluKernel::kStrip22:
      return flrelu_strip_function<T, FlreluStrip22>(mode);
    case FlreluKernel::kStrip42:
      return flrelu_strip_function<T, FlreluStrip42>(mode);
    case FlreluKernel::kStrip24:
      return flrelu_strip_kernel<T, FlreluStrip24, FlreluMode::kReplay>;
    default:
      return flrelu_tile_kernel<T>;
  }
}

}  // namespace fastgan
