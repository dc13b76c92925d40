"""``fastgan::filtered_lrelu_cuda`` and ``fastgan::filtered_lrelu_replay_cuda``: the op, and every derivative of it.

Both upsample, do something to each pixel and downsample. Along each axis, of an image of ``in`` pixels and on a grid
of ``mid`` upsampled ones,

    z[q] = fir_gain · Σ_k fu[k] · u[q + k − pad]        u[j · up] = x[j] + b, zero elsewhere
    y[o] = Σ_k fd[k] · a[o · down + offset + k]         a zero outside 0 … mid − 1

The op has a = clamp(gain · lrelu(z), ±clamp), and notes for each z which slope that is. It is piecewise linear, so the
derivative is the replay: a = z · that slope, with up and down, fu and fd exchanged. That is linear in the cotangent,
and its own derivative is another replay, in the first direction. The slopes are constants; nothing else is kept for
backward, neither x nor anything of the size of z but two bits per pixel.

Signs: int32 [N, C, ⌈mid_h / 16⌉, mid_w]. Bits 2i and 2i + 1 of word (r, column) are of the upsampled pixel
(16r + i, column): z was not above 0; clamp was active. What of z reaches no output has no signs, or
any, between pixels that do.

The fallback is plain torch on any device and dtype, so that the formulas can be checked in float64; the kernels are
csrc/cuda/filtered_lrelu*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan.ops._epilogue import contiguous
from fastgan.ops._library import define
from fastgan.ops.upfirdn2d import filter_size
from fastgan.reference._precision import compute_dtype
from fastgan.reference.upfirdn2d import upfirdn2d

_SIGN_ROWS = 16
_SHARED_BYTES = 48 * 1024
_MOST_TAPS = 512
_MOST_PIXELS = 1 << 30


class _Axis(NamedTuple):
    """The map along one axis: see the module's docstring. In this order in the schema of the replay."""

    pad: int
    offset: int
    mid: int
    out: int

    def transposed(self, size: int, up_taps: int, down_taps: int) -> _Axis:
        """Of the transpose, from ``out`` values to ``size``.

        da[q] = Σ_o dy[o] · fd[q − offset − o · down] and dx[j] = Σ_k fu[k] · dz[j · up + pad − k]: with k turned
        around, the two sums of the module's docstring.
        """
        return _Axis(down_taps - 1 + self.offset, self.pad - (up_taps - 1), self.mid, size)


def _axes(
    x: Tensor, fu: Tensor | None, fd: Tensor | None, up: int, down: int, padding: Sequence[int]
) -> tuple[_Axis, _Axis]:
    """(along x, along y) of the op itself; ``padding`` is (x0, x1, y0, y1)."""
    axes = []
    for i, (up_taps, down_taps) in enumerate(zip(filter_size(fu), filter_size(fd), strict=True)):
        before, after = padding[2 * i : 2 * i + 2]
        out = (x.shape[3 - i] * up + before + after - (up_taps - 1) - down_taps) // down + 1
        axes.append(_Axis(before, 0, (out - 1) * down + down_taps, out))
    return axes[0], axes[1]


def _smallest_tile(fu: Tensor | None, fd: Tensor | None, up: int, down: int) -> int:
    """Bytes of shared memory that a block needs at least; flrelu_smallest_tile in csrc/cuda/filtered_lrelu_plan.h."""
    height = _SIGN_ROWS // _power_of_two_in(down)
    up_x, up_y = filter_size(fu)
    down_x, down_y = filter_size(fd)
    mid_x, mid_y = down_x, (height - 1) * down + down_y
    in_x, in_y = (mid_x + up_x - 2) // up + 1, (mid_y + up_y - 2) // up + 1
    up_separable, down_separable = (f is None or f.ndim == 1 for f in (fu, fd))
    upsampled = in_x * in_y + (in_y * mid_x if up_separable else 0)
    downsampled = height * mid_x if down_separable else 0
    filters = sum(1 if f is None else f.numel() for f in (fu, fd))
    return 4 * (filters + max(upsampled, downsampled) + mid_x * mid_y)


def _power_of_two_in(value: int) -> int:
    """The largest power of two, 16 at most, that divides ``value``."""
    return min(value & -value, _SIGN_ROWS)


def why_no_kernel(
    x: Tensor, fu: Tensor | None, fd: Tensor | None, up: int, down: int, padding: Sequence[int]
) -> str | None:
    """None where the CUDA kernels can compute the op and its gradient, else the reason why not, from sizes alone."""
    for name, value in (("up", up), ("down", down), ("fu", max(filter_size(fu))), ("fd", max(filter_size(fd)))):
        if value > _MOST_TAPS:
            return f"its factors and the sides of its filters are at most {_MOST_TAPS}, got {name} of {value}"
    needed = max(_smallest_tile(fu, fd, up, down), _smallest_tile(fd, fu, down, up))
    if needed > _SHARED_BYTES:
        sizes = " and ".join("one tap" if f is None else str(list(f.shape)) for f in (fu, fd))
        return (
            f"filters of {sizes} with up {up} and down {down} need {needed} bytes of a block's {_SHARED_BYTES} bytes "
            "of shared memory"
        )
    for size, before, after in ((x.shape[3], *padding[:2]), (x.shape[2], *padding[2:])):
        if size * up + max(before, 0) + max(after, 0) >= _MOST_PIXELS or min(before, after) <= -_MOST_PIXELS:
            return f"the sides of its upsampled and padded image are below {_MOST_PIXELS}, got {size} times {up}"
    return None


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    b: Tensor | None,
    *,
    up: int,
    down: int,
    padding: tuple[int, int, int, int],
    gain: float,
    slope: float,
    clamp: float | None,
    flip_filter: bool,
) -> Tensor:
    """The public op of the same name, checked, on the CUDA kernels."""
    wide = compute_dtype(x)
    fu, fd, b = (None if t is None else contiguous(t, wide) for t in (fu, fd, b))
    needed = torch.is_grad_enabled() and (x.requires_grad or (b is not None and b.requires_grad))
    y, _ = _forward_op(x.contiguous(), fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter, needed)
    return y


# ----------------------------------------------------------------------------------------------------------------------
# Plain torch


def _upsampled(
    x: Tensor, fu: Tensor | None, up: int, along: _Axis, across: _Axis, flip_filter: bool, gain: float
) -> Tensor:
    """z, [N, C, mid_h, mid_w]."""
    taps_x, taps_y = filter_size(fu)
    right = along.mid + taps_x - 1 - x.shape[3] * up - along.pad
    bottom = across.mid + taps_y - 1 - x.shape[2] * up - across.pad
    return upfirdn2d(
        x,
        fu,
        up=(up, up),
        down=(1, 1),
        padding=(along.pad, right, across.pad, bottom),
        flip_filter=flip_filter,
        gain=gain,
        epilogue=None,
    )


def _downsampled(a: Tensor, fd: Tensor | None, down: int, along: _Axis, across: _Axis, flip_filter: bool) -> Tensor:
    taps_x, taps_y = filter_size(fd)
    right = (along.out - 1) * down + taps_x + along.offset - along.mid
    bottom = (across.out - 1) * down + taps_y + across.offset - across.mid
    return upfirdn2d(
        a,
        fd,
        up=(1, 1),
        down=(down, down),
        padding=(-along.offset, right, -across.offset, bottom),
        flip_filter=flip_filter,
        gain=1.0,
        epilogue=None,
    )


def _packed(codes: Tensor) -> Tensor:
    """Two bits per pixel, [N, C, H, W], as signs."""
    n, c, h, w = codes.shape
    rows = -(-h // _SIGN_ROWS)
    codes = torch.nn.functional.pad(codes.long(), (0, 0, 0, rows * _SIGN_ROWS - h)).view(n, c, rows, _SIGN_ROWS, w)
    return (codes << _shifts(codes)).sum(3).to(torch.int32)


def _unpacked(signs: Tensor, height: int) -> Tensor:
    """Two bits per pixel, [N, C, height, W]."""
    codes = signs.long()[:, :, :, None] >> _shifts(signs) & 3
    return codes.flatten(2, 3)[:, :, :height]


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(0, 2 * _SIGN_ROWS, 2, device=like.device)[:, None]


def _forward_fallback(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter, record):
    along, across = _axes(x, fu, fd, up, down, padding)
    wide = x.to(compute_dtype(x))
    if b is not None:
        wide = wide + b[:, None, None]
    z = _upsampled(wide, fu, up, along, across, flip_filter, float(up * up))
    a = torch.where(z > 0, z, z * slope) * gain
    codes = (~(z > 0)).int()
    if clamp is not None:
        codes = codes | (~(a.abs() <= clamp)).int() << 1
        a = a.clamp(-clamp, clamp)
    y = _downsampled(a, fd, down, along, across, flip_filter)
    result = torch.empty(y.shape, dtype=x.dtype, device=x.device).copy_(y)
    return result, _packed(codes) if record else codes.new_empty(0)


def _replay_fallback(x, fu, fd, signs, up, down, along, across, flip_filter, fir_gain, gain, slope):
    along, across = _Axis(*along), _Axis(*across)
    z = _upsampled(x.to(compute_dtype(x)), fu, up, along, across, flip_filter, fir_gain)
    codes = _unpacked(signs, across.mid)
    a = torch.where(codes & 1 == 0, z * gain, z * (gain * slope)).masked_fill(codes & 2 != 0, 0.0)
    y = _downsampled(a, fd, down, along, across, flip_filter)
    return torch.empty(y.shape, dtype=x.dtype, device=x.device).copy_(y)


# ----------------------------------------------------------------------------------------------------------------------
# The ops


def _forward_fake(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter, record):
    along, across = _axes(x, fu, fd, up, down, padding)
    n, c = x.shape[:2]
    signs = (n, c, -(-across.mid // _SIGN_ROWS), along.mid) if record else (0,)
    return x.new_empty(n, c, across.out, along.out), x.new_empty(signs, dtype=torch.int32)


def _replay_fake(x, fu, fd, signs, up, down, along, across, flip_filter, fir_gain, gain, slope):
    return x.new_empty(*x.shape[:2], across[3], along[3])


def _forward_setup(ctx, inputs, output) -> None:
    x, fu, fd, b, ctx.up, ctx.down, padding, ctx.gain, ctx.slope, _, ctx.flip_filter, ctx.recorded = inputs
    ctx.axes = _axes(x, fu, fd, ctx.up, ctx.down, padding)
    ctx.fir_gain, ctx.input_hw = float(ctx.up**2), x.shape[2:]
    ctx.bias_dtype = None if b is None else b.dtype
    ctx.save_for_backward(fu, fd, output[1])


def _replay_setup(ctx, inputs, output) -> None:
    x, fu, fd, signs, ctx.up, ctx.down, along, across, ctx.flip_filter, ctx.fir_gain, ctx.gain, ctx.slope = inputs
    ctx.axes, ctx.input_hw = (_Axis(*along), _Axis(*across)), x.shape[2:]
    ctx.save_for_backward(fu, fd, signs)


def _transposed_replay(ctx, grad: Tensor) -> Tensor:
    """The gradient of x, for either op."""
    fu, fd, signs = ctx.saved_tensors
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise NotImplementedError(
            "filtered_lrelu: the gradients of fu and fd have no kernel; backend='reference' computes them"
        )
    taps = zip(filter_size(fu), filter_size(fd), strict=True)
    axes = [axis.transposed(ctx.input_hw[1 - i], *next(taps)) for i, axis in enumerate(ctx.axes)]
    flip, gains = not ctx.flip_filter, (ctx.fir_gain, ctx.gain, ctx.slope)
    return _replay_op(grad.contiguous(), fd, fu, signs, ctx.down, ctx.up, *axes, flip, *gains)


def _forward_backward(ctx, grad_y: Tensor):
    if not ctx.recorded:
        raise RuntimeError("filtered_lrelu_cuda: a gradient needs the signs that record = true keeps")
    grad_x = _transposed_replay(ctx, grad_y)
    grad_b = grad_x.sum((0, 2, 3), dtype=ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return grad_x if ctx.needs_input_grad[0] else None, None, None, grad_b, *[None] * 8


def _replay_backward(ctx, grad_y: Tensor):
    return _transposed_replay(ctx, grad_y), *[None] * 11


_forward_op = define(
    "filtered_lrelu_cuda",
    "(Tensor x, Tensor? fu, Tensor? fd, Tensor? b, int up, int down, SymInt[4] padding, float gain, float slope,"
    " float? clamp, bool flip_filter, bool record) -> (Tensor y, Tensor signs)",
    fallback=_forward_fallback,
    fake=_forward_fake,
    setup_context=_forward_setup,
    backward=_forward_backward,
)
_replay_op = define(
    "filtered_lrelu_replay_cuda",
    "(Tensor x, Tensor? fu, Tensor? fd, Tensor signs, int up, int down, SymInt[4] along, SymInt[4] across,"
    " bool flip_filter, float fir_gain, float gain, float slope) -> Tensor",
    fallback=_replay_fallback,
    fake=_replay_fake,
    setup_context=_replay_setup,
    backward=_replay_backward,
)
