"""``fastgan::pixel_dot`` on Triton: Σ over pixels of a ⊙ b, [N, C, H, W] twice -> [N, C] in float32.

One launch where samples and channels alone fill a GPU, else two: pixels are split over programs, and the second adds
their parts in order, so that the result is bitwise the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch
from ._sum_parts import sum_parts
from ._tiles import ceil_div, needs_wide, splits_to_fill, traffic

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def pixel_dot_kernel(
    a_ptr,  # [N, C, H, W]
    b_ptr,  # [N, C, H, W]
    out_ptr,  # [splits, N, C] float32
    n,
    c,
    pixels,
    width,
    a_stride_n,
    a_stride_c,
    a_stride_h,
    a_stride_w,
    b_stride_n,
    b_stride_c,
    b_stride_h,
    b_stride_w,
    pixels_per_split,
    FLAT: tl.constexpr,  # rows follow each other at the distance of pixels, in a and in b
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_C channels of one sample over one split's pixels, BLOCK_P at a time."""
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(c, BLOCK_C)
    k = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // tiles_c
    sample = (pid % n).to(tl.int64)
    split = pid // n
    offset = tl.arange(0, BLOCK_P)
    if WIDE:
        k, offset = k.to(tl.int64), offset.to(tl.int64)
    a_row = a_ptr + sample * a_stride_n + (k * a_stride_c)[None, :]
    b_row = b_ptr + sample * b_stride_n + (k * b_stride_c)[None, :]
    last = tl.minimum((split + 1) * pixels_per_split, pixels)
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(split * pixels_per_split, last, BLOCK_P):
        p = first + offset
        if FLAT:
            at_a, at_b = p * a_stride_w, p * b_stride_w
        else:
            at_a = p // width * a_stride_h + p % width * a_stride_w
            at_b = p // width * b_stride_h + p % width * b_stride_w
        mask = (p < last)[:, None] & (k < c)[None, :]
        a = tl.load(a_row + at_a[:, None], mask=mask, other=0.0)
        b = tl.load(b_row + at_b[:, None], mask=mask, other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)
    tl.store(out_ptr + (split * n + sample) * c + k, tl.sum(acc, axis=0), mask=k < c)


def plan(a: Tensor, b: Tensor) -> tuple[Tensor, list[Launch]]:
    """The result and the one or two launches that fill it; none if it is empty. Works on meta tensors."""
    n, c, height, width = a.shape
    out = a.new_empty((n, c), dtype=torch.float32)
    if out.numel() == 0:
        return out, []
    pixels = height * width
    if a.stride(1) == 1 and c > 1:
        block_c = min(64, max(8, triton.next_power_of_2(c)))
        block_p = 2048 // block_c
    else:
        block_p = min(1024, max(16, triton.next_power_of_2(pixels)))
        block_c = min(2048 // block_p, triton.next_power_of_2(c))
    programs = n * ceil_div(c, block_c)
    # A split is worth its part and the second launch from some thousand products a program on.
    splits = splits_to_fill(programs, ceil_div(pixels, 4 * block_p))
    pixels_per_split = ceil_div(ceil_div(pixels, splits), block_p) * block_p
    splits = ceil_div(pixels, pixels_per_split)
    parts = out if splits == 1 else a.new_empty((splits, n, c), dtype=torch.float32)
    arguments = {"a_ptr": a, "b_ptr": b, "out_ptr": parts, "n": n, "c": c, "pixels": pixels, "width": width}
    arguments |= {"pixels_per_split": pixels_per_split}
    for name, t in (("a", a), ("b", b)):
        arguments |= {f"{name}_stride_{axis}": value for axis, value in zip("nchw", t.stride(), strict=True)}
    flat = all(t.stride(2) == width * t.stride(3) or height == 1 for t in (a, b))
    launch = Launch(
        pixel_dot_kernel,
        (programs * splits,),
        arguments,
        {"FLAT": flat, "WIDE": needs_wide(a, b), "BLOCK_P": block_p, "BLOCK_C": block_c},
        bytes=traffic(a, b, parts),
        flops=2 * a.numel(),
    )
    return out, [launch] if splits == 1 else [launch, sum_parts(parts, out, n * c)]


def pixel_dot(a: Tensor, b: Tensor) -> Tensor:
    """The op's arguments and result; NotImplemented for float64."""
    if a.dtype not in _DTYPES or b.dtype not in _DTYPES:
        return NotImplemented
    out, launches = plan(a, b)
    for launch in launches:
        launch.run()
    return out
