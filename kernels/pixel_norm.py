"""``fastgan::pixel_norm`` and its gradient on Triton, one launch each.

y = x · r,  r = rsqrt(mean(x²) + eps)          gradient: r · g − x · r³ · mean(g · x)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch
from ._tiles import ceil_div, traffic

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ELEMENTS = 4096


@triton.jit
def pixel_norm_kernel(
    x_ptr,  # [lines / inner, channels, inner]
    g_ptr,  # like x, or None
    y_ptr,  # like x
    lines,
    inner,
    channels,
    eps,
    ONE_TILE: tl.constexpr,  # BLOCK_C covers all channels: they are read once and kept
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program normalises BLOCK_P lines of ``channels`` values; without ONE_TILE it reads them twice, the second
    time from the cache."""
    pid = tl.program_id(0)
    p = (pid.to(tl.int64) if WIDE else pid) * BLOCK_P + tl.arange(0, BLOCK_P)
    line = (p // inner * inner * channels + p % inner)[:, None]
    k = tl.arange(0, BLOCK_C)[None, :]
    present = (p < lines)[:, None]
    sum_xx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if ONE_TILE:
        mask = present & (k < channels)
        x = tl.load(x_ptr + line + k * inner, mask=mask, other=0.0).to(tl.float32)
        sum_xx += x * x
        if g_ptr is not None:
            g = tl.load(g_ptr + line + k * inner, mask=mask, other=0.0).to(tl.float32)
            sum_gx += g * x
    else:
        for first in range(0, channels, BLOCK_C):
            mask = present & (first + k < channels)
            x = tl.load(x_ptr + line + (first + k) * inner, mask=mask, other=0.0).to(tl.float32)
            sum_xx += x * x
            if g_ptr is not None:
                g = tl.load(g_ptr + line + (first + k) * inner, mask=mask, other=0.0).to(tl.float32)
                sum_gx += g * x
    r = 1.0 / tl.sqrt(tl.sum(sum_xx, axis=1, keep_dims=True) / channels + eps)
    along = tl.sum(sum_gx, axis=1, keep_dims=True) / channels * r * r * r
    if ONE_TILE:
        y = r * x if g_ptr is None else r * g - x * along
        tl.store(y_ptr + line + k * inner, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        for first in range(0, channels, BLOCK_C):
            at = line + (first + k) * inner
            mask = present & (first + k < channels)
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            y = r * x
            if g_ptr is not None:
                y = r * tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32) - x * along
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def plan(x: Tensor, g: Tensor | None, dim: int, eps: float) -> tuple[Tensor, Launch | None]:
    """The result and the launch that fills it, None if it is empty. Works on meta tensors. ``x`` is contiguous, or
    channels_last with ``dim`` 1; ``g`` is laid out as ``x``."""
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y, None
    channels, lines = x.shape[dim], x.numel() // x.shape[dim]
    inner = x.stride(dim) if x.is_contiguous() else 1
    # Lines beside each other are read along a warp where their values are: at least 64 of them fill whole lines of the
    # cache. Values of one line that lie together take a tile as long as the line, up to a register budget.
    block_p = min(64, triton.next_power_of_2(lines)) if inner > 1 else 1
    block_c = min(_ELEMENTS // block_p, triton.next_power_of_2(channels))
    block_p = max(block_p, min(_ELEMENTS // block_c // 4, triton.next_power_of_2(lines)))
    arguments = {"x_ptr": x, "g_ptr": g, "y_ptr": y, "lines": lines, "inner": inner, "channels": channels, "eps": eps}
    constants = {"ONE_TILE": channels <= block_c, "WIDE": x.numel() + _ELEMENTS * inner > 2**31 - 1}
    constants |= {"BLOCK_P": block_p, "BLOCK_C": block_c}
    return y, Launch(
        pixel_norm_kernel,
        (ceil_div(lines, block_p),),
        arguments,
        constants,
        bytes=traffic(x, g, y),
        flops=(3 if g is None else 7) * x.numel(),
    )


def _run(x: Tensor, g: Tensor | None, dim: int, eps: float):
    if x.dtype not in _DTYPES:
        return NotImplemented
    y, launch = plan(x, g, dim, eps)
    if launch is not None:
        launch.run()
    return y


def pixel_norm(x, dim, eps):
    """The op's arguments and result; NotImplemented for float64."""
    return _run(x, None, dim, eps)


def pixel_norm_grad(g, x, dim, eps):
    """The op's arguments and result; NotImplemented for float64. ``g`` is copied if it is not laid out as ``x``."""
    return _run(x, torch.empty_like(x).copy_(g) if g.stride() != x.stride() else g, dim, eps)


def shipped() -> Iterator[tuple[str, list[Launch]]]:
    """(label, launches): the latents of StyleGAN2's mapping network, and a layer of Progressive GAN at 64 pixels."""
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        z = torch.empty(8, 512, dtype=dtype, device="meta")
        yield f"StyleGAN2-256 latents {name}", [plan(z, None, 1, 1e-8)[1]]
        yield f"StyleGAN2-256 latents gradient {name}", [plan(z, z, 1, 1e-8)[1]]
        x = torch.empty(8, 256, 64, 64, dtype=dtype, device="meta")
        for layout, image in (("NHWC", x.to(memory_format=torch.channels_last)), ("NCHW", x)):
            yield f"Progressive GAN 256 channels at 64 {name} {layout}", [plan(image, None, 1, 1e-8)[1]]
            yield f"Progressive GAN 256 channels at 64 gradient {name} {layout}", [plan(image, image, 1, 1e-8)[1]]
