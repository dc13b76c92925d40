// The launches of norm_act in their order, the same for nvcc's side and csrc/simt's.
//
// allocate(n) gives n doubles that live as long as the launches; launch(kernel, blocks, tiles, shared_bytes, call) runs
// kernel<<<(blocks, tiles), call.plan.threads, shared_bytes>>>(call).
#pragma once

#include "norm_act.cuh"

namespace fastgan {

inline bool norm_aligned(const NormCall& call) {
  const auto of = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return of(call.x) && of(call.gy) && of(call.out);
}

// Puts the partial results of slices together, a block per channel.
template <typename Launch>
void launch_norm_merge(NormCall call, void (*kernel)(NormCall), Launch launch) {
  call.plan.threads = kNormThreads;
  launch(kernel, call.channels, 1, 0, call);
}

inline int64_t norm_partial_size(const NormCall& call) { return 2 * call.samples * call.plan.slices * call.channels; }

// y and, unless they are given, the statistics. most_shared: bytes of dynamic shared memory that a block may have.
template <typename T, typename Allocate, typename Launch>
void launch_norm_forward(NormCall call, bool last, int most_shared, Allocate allocate, Launch launch) {
  constexpr int kBytes = sizeof(T);
  const bool aligned = norm_aligned(call);
  merge_norm_samples(call);
  if (!last && !call.fixed && !call.batch) {
    call.plan = plan_norm_planes(call, aligned, kBytes);
    if (call.plan.slice_bytes <= most_shared) {
      launch(norm_plane_kernel<T>, norm_blocks(call.plan, last), 1, call.plan.slice_bytes, call);
      return;
    }
  }
  call.plan = last ? plan_norm_rows(call, aligned, kBytes) : plan_norm_slices(call, aligned, kBytes);
  const int64_t blocks = norm_blocks(call.plan, last);
  if (!call.fixed) {
    call.partial = allocate(norm_partial_size(call));
    launch(last ? norm_rows_kernel<T> : norm_plane_kernel<T>, blocks, call.plan.tiles, call.plan.slice_bytes, call);
    launch_norm_merge(call, norm_moments_kernel, launch);
  }
  launch(last ? norm_apply_kernel<T, true> : norm_apply_kernel<T, false>, blocks, call.plan.tiles, 0, call);
}

// Those of the gradients whose places are not null.
template <typename T, typename Allocate, typename Launch>
void launch_norm_backward(NormCall call, bool last, int most_shared, Allocate allocate, Launch launch) {
  constexpr int kBytes = sizeof(T);
  const bool aligned = norm_aligned(call), parameters = call.grad_weight || call.grad_bias;
  merge_norm_samples(call);
  // Whether the kernel that sums up a slice knows all that its part of grad_x depends on.
  bool at_once = !last && call.fixed;
  if (!last && !call.fixed && !call.batch) {
    call.plan = plan_norm_planes(call, aligned, kBytes);
    at_once = 2 * call.plan.slice_bytes <= most_shared;
  }
  if (!at_once || call.fixed) {
    call.plan = last ? plan_norm_rows(call, aligned, kBytes) : plan_norm_slices(call, aligned, kBytes);
  }
  const int64_t blocks = norm_blocks(call.plan, last);
  const bool means = !at_once && !call.fixed && call.out, sums = parameters || means;
  if (sums) {
    call.partial = allocate(norm_partial_size(call));
  }
  if (sums || at_once) {
    NormCall first = call;
    first.out = at_once ? call.out : nullptr;
    launch(last ? norm_rows_grad_kernel<T> : norm_plane_grad_kernel<T>, blocks, call.plan.tiles,
           2 * call.plan.slice_bytes, first);
  }
  if (means) {
    call.means = allocate(2 * (call.batch ? 1 : call.samples) * call.channels);
  }
  if (sums) {
    launch_norm_merge(call, norm_sums_kernel, launch);
  }
  if (call.out && !at_once) {
    launch(last ? norm_apply_grad_kernel<T, true> : norm_apply_grad_kernel<T, false>, blocks, call.plan.tiles, 0, call);
  }
}

}  // namespace fastgan
