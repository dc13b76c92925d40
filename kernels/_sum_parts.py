"""The second stage of a deterministic sum: partial results, each written by one program, added in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch
from ._tiles import ceil_div, traffic

_BLOCK_PARTS, _BLOCK = 16, 128


@triton.jit
def sum_parts_kernel(
    parts_ptr,  # [parts, size / inner, inner] float32
    out_ptr,  # [inner, size / inner] float32
    parts,
    size,
    inner,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[j, i] = Σ_p parts[p, i, j]; one program adds BLOCK elements, BLOCK_PARTS parts at a time, in order."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK_PARTS, BLOCK], tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = (first + tl.arange(0, BLOCK_PARTS)).to(tl.int64)
        mask = (part < parts)[:, None] & (e < size)[None, :]
        acc += tl.load(parts_ptr + part[:, None] * size + e[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + e % inner * (size // inner) + e // inner, tl.sum(acc, axis=0), mask=e < size)


def sum_parts(parts: Tensor, out: Tensor, inner: int) -> Launch:
    """The launch that adds ``parts`` [parts, size / inner, inner] over its first axis into ``out`` [inner, size /
    inner], both dense float32."""
    size = out.numel()
    return Launch(
        sum_parts_kernel,
        (ceil_div(size, _BLOCK),),
        {"parts_ptr": parts, "out_ptr": out, "parts": parts.shape[0], "size": size, "inner": inner},
        {"BLOCK_PARTS": _BLOCK_PARTS, "BLOCK": _BLOCK},
        bytes=traffic(parts, out),
        flops=parts.numel(),
    )
