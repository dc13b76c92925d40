"""``fastgan::bias_act`` on Triton: clamp(gain · act(x + b)), one launch, each element read and written once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import activate
from ._launch import Launch
from ._tiles import ceil_div, traffic

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Eight halves a thread in four warps: one 16-byte load each.
_BLOCK = 1024


@triton.jit
def bias_act_kernel(
    x_ptr,  # [size]
    b_ptr,  # [channels] float32, or None
    y_ptr,  # [size]
    size,
    inner,  # elements between one channel and the next
    channels,
    alpha,
    gain,
    clamp,
    ACT: tl.constexpr,
    ONE_CHANNEL: tl.constexpr,  # BLOCK divides inner: a program has one channel
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = clamp(gain · act(x + b)); one program computes BLOCK elements in memory order."""
    pid = tl.program_id(0)
    e = (pid.to(tl.int64) if WIDE else pid) * BLOCK + tl.arange(0, BLOCK)
    mask = e < size
    z = tl.load(x_ptr + e, mask=mask, other=0.0).to(tl.float32)
    if b_ptr is not None:
        if ONE_CHANNEL:
            z += tl.load(b_ptr + pid // (inner // BLOCK) % channels)
        else:
            z += tl.load(b_ptr + e // inner % channels, mask=mask, other=0.0)
    y = activate(z, ACT, alpha, gain, clamp)
    tl.store(y_ptr + e, y.to(y_ptr.dtype.element_ty), mask=mask)


def plan(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> tuple[Tensor, Launch | None]:
    """The result and the launch that fills it, None if it is empty. Works on meta tensors. ``x`` is contiguous, or
    channels_last with ``dim`` 1."""
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y, None
    inner = 1 if b is None or not x.is_contiguous() else x.stride(dim)
    arguments = {"x_ptr": x, "b_ptr": b, "y_ptr": y, "size": x.numel(), "inner": inner}
    arguments |= {"channels": 1 if b is None else b.numel(), "alpha": alpha, "gain": gain, "clamp": clamp}
    constants = {"ACT": act, "ONE_CHANNEL": inner % _BLOCK == 0, "WIDE": x.numel() + _BLOCK > 2**31 - 1}
    constants["BLOCK"] = _BLOCK
    return y, Launch(
        bias_act_kernel,
        (ceil_div(x.numel(), _BLOCK),),
        arguments,
        constants,
        bytes=traffic(x, b, y),
        flops=2 * x.numel(),
    )


def bias_act(x, b, dim, act, alpha, gain, clamp):
    """The op's arguments and result; NotImplemented for float64."""
    if x.dtype not in _DTYPES:
        return NotImplemented
    y, launch = plan(x, b, dim, act, alpha, gain, clamp)
    if launch is not None:
        launch.run()
    return y


def shipped() -> Iterator[tuple[str, list[Launch]]]:
    """(label, launches): StyleGAN2's mapping network and the first layer of its critic at 256 pixels, batch 8."""
    bias = {c: torch.empty(c, device="meta") for c in (128, 512)}
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        z = torch.empty(8, 512, dtype=dtype, device="meta")
        yield f"StyleGAN2-256 mapping {name}", [plan(z, bias[512], 1, "lrelu", 0.2, 2.0**0.5, None)[1]]
        x = torch.empty(8, 128, 256, 256, dtype=dtype, device="meta")
        for layout, image in (("NHWC", x.to(memory_format=torch.channels_last)), ("NCHW", x)):
            launch = plan(image, bias[128], 1, "lrelu", 0.2, 2.0**0.5, 256.0)[1]
            yield f"StyleGAN2-256 128 channels at 256 {name} {layout}", [launch]
