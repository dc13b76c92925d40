// Uninitialised CPU tensors without a call through torch's dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>

#include "common.h"
#include "large_buffer.h"

namespace fastgan {

// torch::stable::empty looks its op up by name and boxes every argument: 2 us where this takes 0.5, and a loss over
// small maps makes ten tensors. Every dimension is dense.
inline Tensor empty_cpu(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(dtype),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  Tensor result(handle);
  size_t bytes = aoti_torch_dtype_element_size(static_cast<int32_t>(dtype));
  for (int64_t dim = 0; dim < dims; ++dim) bytes *= sizes[dim];
  if (bytes >= kLargeBytes) advise_large_pages(result.mutable_data_ptr(), bytes);
  return result;
}

// Contiguous, or channels_last for four dimensions.
inline Tensor empty_dense(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, bool channels_last) {
  const int64_t dims = sizes.size();
  std::vector<int64_t> strides(dims);
  int64_t next = 1;
  const auto place = [&](int64_t dim) {
    strides[dim] = next;
    next *= std::max<int64_t>(1, sizes[dim]);
  };
  if (channels_last) place(1);
  for (int64_t dim = dims - 1; dim >= 0; --dim) {
    if (!channels_last || dim != 1) place(dim);
  }
  return empty_cpu(sizes.data(), strides.data(), dims, dtype);
}

}  // namespace fastgan
