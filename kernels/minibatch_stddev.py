"""``fastgan::minibatch_stddev`` and its gradient on Triton, one launch each.

    s = √(variance over the group + eps),  statistic = mean of s over a share of the channels and all pixels
    gradient: gx = gy + w · (x − mean over the group) / s,  w = Σ of the statistic's cotangent / (members · values)

One program computes one statistic whole: the layer stands where an image has 4×4 pixels, so that even a large batch is
a few hundred kilobytes, and a second launch, or programs that wait for each other, would cost more than they save.
Sums are in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch
from ._tiles import needs_wide, traffic

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST = 2048  # values at a time


@triton.jit
def group_deviation(x_ptr, at, mask, members, member_stride, eps):
    """Mean and √(variance + eps) over the group of the values ``at``."""
    mean = tl.zeros(at.shape, tl.float32)
    for member in range(members):
        mean += tl.load(x_ptr + member * member_stride + at, mask=mask, other=0.0).to(tl.float32)
    mean /= members
    variance = tl.zeros(at.shape, tl.float32)
    for member in range(members):
        off = tl.load(x_ptr + member * member_stride + at, mask=mask, other=0.0).to(tl.float32) - mean
        variance += off * off
    return mean, tl.sqrt(variance / members + eps)


@triton.jit
def value_of(e, pixels, share, NHWC: tl.constexpr):
    """(channel, pixel) of value ``e`` of a share, in memory order."""
    if NHWC:
        return e % share, e // share
    return e // pixels, e % pixels


@triton.jit
def minibatch_stddev_kernel(
    x_ptr,  # [members, groups, C, pixels]
    y_ptr,  # [members, groups, C + shares, pixels]
    groups,
    channels,
    shares,
    pixels,
    members,
    x_stride_n,
    x_stride_c,
    x_stride_p,
    y_stride_n,
    y_stride_c,
    y_stride_p,
    eps,
    NHWC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one statistic of one group, and the copies of the values that it is made of."""
    pid = tl.program_id(0)
    group, number = (pid // shares).to(tl.int64), pid % shares
    share = channels // shares
    member_x, member_y = groups.to(tl.int64) * x_stride_n, groups.to(tl.int64) * y_stride_n
    offset = tl.arange(0, BLOCK).to(tl.int64) if WIDE else tl.arange(0, BLOCK)
    x_group, y_group = x_ptr + group * x_stride_n, y_ptr + group * y_stride_n
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, share * pixels, BLOCK):
        mask = first + offset < share * pixels
        channel, pixel = value_of(first + offset, pixels, share, NHWC)
        channel += number * share
        at = channel * x_stride_c + pixel * x_stride_p
        _, deviation = group_deviation(x_group, at, mask, members, member_x, eps)
        total += tl.where(mask, deviation, 0.0)
        to = channel * y_stride_c + pixel * y_stride_p
        for member in range(members):
            x = tl.load(x_group + member * member_x + at, mask=mask)
            tl.store(y_group + member * member_y + to, x, mask=mask)
    statistic = (tl.sum(total, axis=0) / (share * pixels)).to(y_ptr.dtype.element_ty)
    for first in range(0, pixels, BLOCK):
        to = (channels + number) * y_stride_c + (first + offset) * y_stride_p
        for member in range(members):
            tl.store(y_group + member * member_y + to, statistic, mask=first + offset < pixels)


@triton.jit
def minibatch_stddev_grad_kernel(
    gy_ptr,  # [members, groups, C + shares, pixels]
    x_ptr,  # [members, groups, C, pixels]
    gx_ptr,  # like x
    groups,
    channels,
    shares,
    pixels,
    members,
    gy_stride_n,
    gy_stride_c,
    gy_stride_p,
    x_stride_n,
    x_stride_c,
    x_stride_p,
    eps,
    NHWC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the gradient of all values that one statistic of one group is made of."""
    pid = tl.program_id(0)
    group, number = (pid // shares).to(tl.int64), pid % shares
    share = channels // shares
    member_x, member_gy = groups.to(tl.int64) * x_stride_n, groups.to(tl.int64) * gy_stride_n
    offset = tl.arange(0, BLOCK).to(tl.int64) if WIDE else tl.arange(0, BLOCK)
    x_group, gy_group = x_ptr + group * x_stride_n, gy_ptr + group * gy_stride_n
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, pixels, BLOCK):
        at = (channels + number) * gy_stride_c + (first + offset) * gy_stride_p
        for member in range(members):
            g = tl.load(gy_group + member * member_gy + at, mask=first + offset < pixels, other=0.0)
            total += g.to(tl.float32)
    weight = tl.sum(total, axis=0) / members / (share * pixels)
    for first in range(0, share * pixels, BLOCK):
        mask = first + offset < share * pixels
        channel, pixel = value_of(first + offset, pixels, share, NHWC)
        channel += number * share
        at = channel * x_stride_c + pixel * x_stride_p
        mean, deviation = group_deviation(x_group, at, mask, members, member_x, eps)
        from_gy = channel * gy_stride_c + pixel * gy_stride_p
        for member in range(members):
            x = tl.load(x_group + member * member_x + at, mask=mask, other=0.0).to(tl.float32)
            gy = tl.load(gy_group + member * member_gy + from_gy, mask=mask, other=0.0).to(tl.float32)
            gx = gy + weight * (x - mean) / deviation
            to = gx_ptr + group * x_stride_n + member * member_x + at
            tl.store(to, gx.to(gx_ptr.dtype.element_ty), mask=mask)


def _is_nhwc(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _strides(name: str, t: Tensor) -> dict[str, int]:
    """Strides of samples, channels and pixels of a dense image, in elements."""
    return {f"{name}_stride_n": t.stride(0), f"{name}_stride_c": t.stride(1), f"{name}_stride_p": t.stride(3)}


def _common(x: Tensor, group_size: int, num_channels: int, eps: float, wide: bool) -> tuple[tuple, dict, dict]:
    """Grid, run-time numbers and constants of both kernels."""
    n, c, h, w = x.shape
    numbers = {"groups": n // group_size, "channels": c, "shares": num_channels, "pixels": h * w}
    numbers |= {"members": group_size, "eps": eps}
    block = min(_MOST, triton.next_power_of_2(c // num_channels * h * w))
    constants = {"NHWC": _is_nhwc(x), "WIDE": wide, "BLOCK": block}
    return (n // group_size * num_channels,), numbers, constants


def _threads(x: Tensor, constants: dict) -> dict[str, int]:
    """Of one program: so many that each reads 16 bytes at once, with the registers that sixteen warps may have. There
    are a handful of programs, so that no occupancy is worth a spilled register."""
    return {"num_warps": max(4, constants["BLOCK"] * x.element_size() // (32 * 16)), "max_registers": 128}


def plan(x: Tensor, group_size: int, num_channels: int, eps: float) -> tuple[Tensor, Launch | None]:
    """The result, laid out as ``x``, and the launch that fills it; None if it is empty. Works on meta tensors."""
    layout = torch.channels_last if _is_nhwc(x) else torch.contiguous_format
    shape = (x.shape[0], x.shape[1] + num_channels, *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    if y.numel() == 0:
        return y, None
    grid, numbers, constants = _common(x, group_size, num_channels, eps, needs_wide(x, y))
    arguments = {"x_ptr": x, "y_ptr": y} | numbers | _strides("x", x) | _strides("y", y)
    work = {"bytes": traffic(x, y), "flops": 5 * x.numel()}
    return y, Launch(minibatch_stddev_kernel, grid, arguments, constants, **_threads(x, constants), **work)


def plan_grad(gy: Tensor, x: Tensor, group_size: int, num_channels: int, eps: float) -> tuple[Tensor, Launch | None]:
    """Likewise for the gradient; ``gy`` is dense."""
    gx = torch.empty_like(x)
    if gx.numel() == 0:
        return gx, None
    grid, numbers, constants = _common(x, group_size, num_channels, eps, needs_wide(x, gy))
    arguments = {"gy_ptr": gy, "x_ptr": x, "gx_ptr": gx} | numbers | _strides("x", x) | _strides("gy", gy)
    work = {"bytes": traffic(x, gy, gx), "flops": 8 * x.numel()}
    return gx, Launch(minibatch_stddev_grad_kernel, grid, arguments, constants, **_threads(x, constants), **work)


def minibatch_stddev(x, group_size, num_channels, eps):
    """The op's arguments and result; NotImplemented for float64."""
    if x.dtype not in _DTYPES:
        return NotImplemented
    y, launch = plan(x, group_size, num_channels, eps)
    if launch is not None:
        launch.run()
    return y


def minibatch_stddev_grad(grad_y, x, group_size, num_channels, eps):
    """The op's arguments and result; NotImplemented for float64. ``grad_y`` is copied if its rows have gaps."""
    if x.dtype not in _DTYPES:
        return NotImplemented
    dense_rows = grad_y.stride(2) == grad_y.stride(3) * grad_y.shape[3]
    gx, launch = plan_grad(grad_y if dense_rows else grad_y.contiguous(), x, group_size, num_channels, eps)
    if launch is not None:
        launch.run()
    return gx


def shipped() -> Iterator[tuple[str, list[Launch]]]:
    """(label, launches): the layer of StyleGAN2's critic, batch 32."""
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        for layout, format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
            x, gy = (torch.empty(32, c, 4, 4, dtype=dtype, device="meta", memory_format=format) for c in (512, 513))
            yield f"StyleGAN2 critic {name} {layout}", [plan(x, 4, 1, 1e-8)[1]]
            yield f"StyleGAN2 critic gradient {name} {layout}", [plan_grad(gy, x, 4, 1, 1e-8)[1]]
