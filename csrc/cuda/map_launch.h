// What the launchers of kernels over a list of maps do with torch's tensors.
#pragma once

#include <utility>
#include <vector>

#include "device.h"
#include "launch.h"
#include "map_list.h"

namespace fastgan {

// Also true of what lies as NCHW at the same time.
inline bool lies_as_nhwc(const Tensor& x) {
  if (x.dim() != 4) {
    return false;
  }
  int64_t stride = 1;
  for (const int64_t axis : {1, 3, 2, 0}) {
    if (x.size(axis) != 1 && x.stride(axis) != stride) {
      return false;
    }
    stride *= x.size(axis);
  }
  return true;
}

inline void check_dense(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous() || lies_as_nhwc(x), op, ": every map must be contiguous or channels_last");
}

inline bool same_order(const Tensor& x, const Tensor& y) {
  return (x.is_contiguous() && y.is_contiguous()) || (lies_as_nhwc(x) && lies_as_nhwc(y));
}

// x in the memory order of `like`, a dense tensor of the same shape.
inline Tensor in_order_of(const Tensor& x, const Tensor& like) {
  if (same_order(x, like)) {
    return x;
  }
  Tensor copy = torch::stable::empty_like(like);
  return torch::stable::copy_(copy, x);
}

inline Tensor empty_floats(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

inline std::vector<Tensor> empty_gradients(const std::vector<Tensor>& first, bool want_first,
                                           const std::vector<Tensor>& second, bool want_second) {
  std::vector<Tensor> gradients;
  for (const auto& [maps, wanted] : {std::pair{&first, want_first}, {&second, want_second}}) {
    for (size_t i = 0; wanted && i < maps->size(); ++i) {
      gradients.push_back(torch::stable::empty_like((*maps)[i]));
    }
  }
  return gradients;
}

inline std::vector<void*> output_addresses(std::vector<Tensor>& tensors) {
  std::vector<void*> pointers;
  for (Tensor& tensor : tensors) {
    pointers.push_back(tensor.mutable_data_ptr());
  }
  return pointers;
}

inline std::vector<const void*> input_addresses(const std::vector<Tensor>& tensors) {
  std::vector<const void*> pointers;
  for (const Tensor& tensor : tensors) {
    pointers.push_back(tensor.const_data_ptr());
  }
  return pointers;
}

// Calls f with an object of the element type.
template <typename F>
void dispatch_dtype(const char* op, const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(__half{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

// Memory for the sums of launches; the tensors are kept until these are queued.
inline std::vector<Tensor> reserve_sums(const MapWorkspace& needed, const Tensor& like, MapSums& sums) {
  Tensor floats = empty_floats(like, {needed.floats});
  Tensor counters = torch::stable::new_zeros(like, {needed.counters}, ScalarType::Int);
  sums.partial = floats.mutable_data_ptr<float>();
  sums.contributions = sums.partial + needed.partial;
  sums.counters = reinterpret_cast<unsigned*>(counters.mutable_data_ptr<int32_t>());
  return {floats, counters};
}

// Launches `kernel` for all maps, kMost at a time; `adds`: it leaves sums.
template <int kMost, typename Map, typename Batch>
void launch_maps(const char* op, void (*kernel)(const Batch), const std::vector<Map>& maps, const MapWorkspace& needed,
                 bool adds, const Tensor& like, Batch& batch) {
  std::vector<Tensor> kept;
  if (adds) {
    kept = reserve_sums(needed, like, batch.sums);
  }
  batch.span = needed.span;
  const cudaStream_t stream = current_stream(like);
  for (size_t begin = 0; begin < maps.size(); begin += kMost) {
    const int blocks = batch_maps<kMost>(maps, begin, batch);
    kernel<<<blocks, kMapThreads, 0, stream>>>(batch);
    check_launch(op);
    if (adds) {
      advance_sums(batch.sums, blocks, batch.count);
    }
  }
}

}  // namespace fastgan
