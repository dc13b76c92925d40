"""``fastgan::activation_grad`` on Triton: the derivative of clamp(gain · act(z), ±clamp), and the derivative of that.

One launch, elementwise, for tensors of any strides that merge into at most four dimensions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import act, bend, slope
from ._launch import Launch
from ._tiles import ceil_div, traffic

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DIMS, _BLOCK = 4, 1024


@triton.jit
def activation_factor(ref, ACT: tl.constexpr, alpha, gain, clamp, FROM_OUTPUT: tl.constexpr, ORDER: tl.constexpr):
    """The factor on g in float32: order 1 the derivative of clamp(gain · act(z), ±clamp), order 2 the derivative of
    that factor along ``ref``, which is the result y (FROM_OUTPUT) or z itself."""
    t = ref / gain if FROM_OUTPUT else act(ref, ACT, alpha)
    if ORDER == 1:
        factor = gain * slope(t, ref, ACT, alpha)
    elif FROM_OUTPUT:
        factor = bend(t, ref, ACT)
    elif ACT == "swish":
        factor = gain * bend(t, ref, ACT)
    else:
        factor = gain * bend(t, ref, ACT) * slope(t, ref, ACT, alpha)
    if clamp is not None:
        factor = tl.where(tl.abs(t * gain) >= clamp, 0.0, factor)
    return factor


@triton.jit
def activation_grad_kernel(
    g_ptr,
    ref_ptr,
    out_ptr,
    size,
    size_1,  # of the merged dimensions; the outermost, 0, is what is left
    size_2,
    size_3,
    g_stride_0,
    g_stride_1,
    g_stride_2,
    g_stride_3,
    ref_stride_0,
    ref_stride_1,
    ref_stride_2,
    ref_stride_3,
    out_stride_0,
    out_stride_1,
    out_stride_2,
    out_stride_3,
    alpha,
    gain,
    clamp,
    ACT: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ORDER: tl.constexpr,
    DENSE: tl.constexpr,  # all three lie alike and without gaps
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = g ⊙ factor(ref); one program computes BLOCK elements in the result's memory order."""
    pid = tl.program_id(0)
    e = (pid.to(tl.int64) if WIDE else pid) * BLOCK + tl.arange(0, BLOCK)
    mask = e < size
    if DENSE:
        at_g, at_ref, at_out = e, e, e
    else:
        d3, rest = e % size_3, e // size_3
        d2, rest = rest % size_2, rest // size_2
        d1, d0 = rest % size_1, rest // size_1
        at_g = d0 * g_stride_0 + d1 * g_stride_1 + d2 * g_stride_2 + d3 * g_stride_3
        at_ref = d0 * ref_stride_0 + d1 * ref_stride_1 + d2 * ref_stride_2 + d3 * ref_stride_3
        at_out = d0 * out_stride_0 + d1 * out_stride_1 + d2 * out_stride_2 + d3 * out_stride_3
    ref = tl.load(ref_ptr + at_ref, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at_g, mask=mask, other=0.0).to(tl.float32)
    factor = activation_factor(ref, ACT, alpha, gain, clamp, FROM_OUTPUT, ORDER)
    # A gradient of infinity stays out of where the clamp holds, as it stays out of torch's.
    result = tl.where(factor == 0.0, 0.0, g * factor) if clamp is not None else g * factor
    tl.store(out_ptr + at_out, result.to(out_ptr.dtype.element_ty), mask=mask)


def merged_dims(shape: tuple[int, ...], strides: list[tuple[int, ...]]) -> tuple[list[int], list[list[int]]]:
    """Sizes and, per tensor, strides of the fewest dimensions that walk all tensors in the last one's memory order."""
    order = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -strides[-1][d])
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for d in order:
        if sizes and all(m[-1] == s[d] * shape[d] for m, s in zip(merged, strides, strict=True)):
            sizes[-1] *= shape[d]
            for m, s in zip(merged, strides, strict=True):
                m[-1] = s[d]
        else:
            sizes.append(shape[d])
            for m, s in zip(merged, strides, strict=True):
                m.append(s[d])
    return sizes or [1], [m or [1] for m in merged]


def plan(
    g: Tensor, ref: Tensor, act: str, alpha: float, gain: float, clamp: float | None, from_output: bool, order: int
) -> tuple[Tensor, Launch | None] | None:
    """The result and the launch that fills it (None if it is empty); None where the strides do not merge into four
    dimensions. Works on meta tensors."""
    out = torch.empty_like(ref, dtype=g.dtype)
    if out.numel() == 0:
        return out, None
    sizes, strides = merged_dims(tuple(ref.shape), [g.stride(), ref.stride(), out.stride()])
    if len(sizes) > _DIMS:
        return None
    dense = len(sizes) == 1 and all(s == [1] for s in strides)
    sizes = [1] * (_DIMS - len(sizes)) + sizes
    reach = max(sum((n - 1) * s for n, s in zip(sizes[-len(d) :], d, strict=True)) for d in strides)
    arguments = {"g_ptr": g, "ref_ptr": ref, "out_ptr": out, "size": ref.numel()}
    arguments |= {f"size_{d}": sizes[d] for d in range(1, _DIMS)}
    for name, values in zip(("g", "ref", "out"), strides, strict=True):
        padded = [0] * (_DIMS - len(values)) + values
        arguments |= {f"{name}_stride_{d}": value for d, value in enumerate(padded)}
    arguments |= {"alpha": alpha, "gain": gain, "clamp": clamp}
    constants = {"ACT": act, "FROM_OUTPUT": from_output, "ORDER": order, "DENSE": dense}
    constants |= {"WIDE": max(reach, ref.numel()) + _BLOCK > 2**31 - 1, "BLOCK": _BLOCK}
    grid = (ceil_div(ref.numel(), _BLOCK),)
    return out, Launch(activation_grad_kernel, grid, arguments, constants, bytes=traffic(g, ref, out))


def activation_grad(g, ref, act, alpha, gain, clamp, from_output, order):
    """The op's arguments and result; NotImplemented for float64 and for strides that need five dimensions."""
    if g.dtype not in _DTYPES or ref.dtype not in _DTYPES:
        return NotImplemented
    planned = plan(g, ref, act, alpha, gain, clamp, from_output, order)
    if planned is None:
        return NotImplemented
    out, launch = planned
    if launch is not None:
        launch.run()
    return out
