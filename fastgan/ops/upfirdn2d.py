"""Upsample, filter, downsample: the resampling primitive of StyleGAN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops import _check
from fastgan.ops._epilogue import (
    Activated,
    check_epilogue,
    contiguous,
    dense,
    epilogue_grads,
    epilogue_tensors,
    is_channels_last,
)
from fastgan.ops._library import define
from fastgan.ops._plans import epilogue_parts, find_plan
from fastgan.reference import upfirdn2d as reference
from fastgan.reference.activation import resolve
from fastgan.reference.epilogue import Epilogue

_NOTHING = Epilogue()


# Below these the CUDA kernels' positions in a tile fit into an int.
_MOST_PIXELS, _MOST_FACTOR = 2**30, 2**24


def _unless_trained(can_run):
    """``can_run`` of a backend whose op has no gradient for the filter."""

    def predicate(device: torch.device, dtype: torch.dtype, *, trained: bool, **facts: bool) -> str | None:
        if trained:
            return "f requires a gradient, which the reference alone computes"
        return can_run(device, dtype, **facts)

    return predicate


def _cuda_can_run(device: torch.device, dtype: torch.dtype, *, large: bool) -> str | None:
    if large:
        return "it takes sides, taps and paddings below 2^30 and factors below 2^24"
    return backends.cuda_can_run(device, dtype)


_BACKENDS = {
    "cuda": _unless_trained(_cuda_can_run),
    "triton": _unless_trained(backends.triton_can_run),
    "cpp": _unless_trained(backends.cpp_can_run),
    "reference": backends.always,
}


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    *,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    epilogue: Epilogue | None = None,
    backend: str | None = None,
) -> Tensor:
    """Insert zeros, pad, filter each channel, keep every ``down``-th pixel; then an optional epilogue.

        out = (in · up + p0 + p1 − taps + down) // down        along each axis

    Half types are computed in float32 and rounded once; autocast leaves ``x`` as it is. Filter and epilogue are one
    pass over the image. The result is contiguous or, if ``x`` is, channels_last; an ``x`` that is neither is copied
    once.

    Args:
        x: [N, C, H, W], floating point; N may be 0.
        f: [fh, fw], or [taps] for a separable filter that runs along both axes; any floating dtype, float32 as a rule.
            None is the filter of one tap of 1. StyleGAN does not train it; for those who do, the reference has its
            gradient, and runs if ``f`` requires one.
        up, down: factors ≥ 1: an int, or (x, y).
        padding: pixels of the upsampled image: an int, (x, y) or (x0, x1, y0, y1) = left, right, top, bottom. A
            negative number crops.
        flip_filter: False convolves (the filter is turned around), True correlates.
        gain: factor on the result. (On the filter, that is gain^(f.ndim / 2).)
        epilogue: what follows, at the output's size: noise, bias [C], activation, clamp, residual; see
            :class:`Epilogue`.
        backend: see :func:`fastgan.backend`. "cuda" takes float32, float16 and bfloat16, runs only where it is named,
            and keeps the gradients of ``x`` of every order; those of the activation are activation_grad's.

    Returns:
        [N, C, out_h, out_w], ``x``'s dtype.

    Raises:
        ValueError: wrong shapes or factors, an output without pixels, a backend that cannot run.
        TypeError: an argument that must be a tensor is not.

    Gradients: 1st and 2nd order for ``x`` and the epilogue's tensors (any order if the epilogue is linear); the
    reference differentiates without end, for ``f`` too. The gradient of ``x`` is upfirdn2d itself, with up and down
    exchanged and the filter turned around. Saved for backward: the result, or ``x`` where a residual hides the
    activation or it cannot be inverted; nothing but sizes for a linear epilogue.

    Source: Karras et al., "Alias-Free Generative Adversarial Networks", 2021, section 3.1; multirate filtering:
    insert zeros, filter, decimate.
    """
    epilogue = _NOTHING if epilogue is None else epilogue
    tensors, settings = epilogue_parts(epilogue)
    trained = isinstance(f, Tensor) and f.requires_grad and torch.is_grad_enabled()
    options = (up, down, padding, flip_filter, gain, *settings, trained, backend)
    plan = find_plan("upfirdn2d", _make_plan, (x, f, *tensors), options)
    if plan.op is None:
        factors_up, factors_down, sides, flip, factor = plan.fir
        y = reference.upfirdn2d(
            x,
            f,
            up=factors_up,
            down=factors_down,
            padding=sides,
            flip_filter=flip,
            gain=factor,
            epilogue=epilogue,
        )
    else:
        f = None if f is None else contiguous(f, plan.wide)
        tensors = epilogue_tensors(epilogue, x.dtype)
        y = plan.op(dense(x), f, *tensors, *plan.fir, *plan.act, plan.residual_gain)
    if _check.DEBUG:
        _check.no_nan("upfirdn2d", y)
    return y


class _Plan(NamedTuple):
    """What follows from a call's signature."""

    op: Callable[..., Tensor] | None  # None: the reference
    fir: tuple  # up, down, padding, flip_filter, gain
    act: Activated
    residual_gain: float
    wide: torch.dtype  # of the filter


def _make_plan(
    x: Tensor,
    f: Tensor | None,
    noise: Tensor | None,
    noise_strength: float | Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    up: int | Sequence[int],
    down: int | Sequence[int],
    padding: int | Sequence[int],
    flip_filter: bool,
    gain: float,
    *options,
) -> _Plan:
    """``options``: the epilogue's act, alpha, gain, clamp, residual_gain; whether f is trained; the backend."""
    op = "upfirdn2d"
    *settings, residual_gain, trained, backend = options
    epilogue = Epilogue(noise, noise_strength, bias, *settings, residual, residual_gain)
    _check.tensor(op, "x", x, ndim=4)
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must have C, H and W of at least 1, got {list(x.shape)}")
    check_filter(op, "f", f, x)
    factors_up, factors_down = parse_factor(op, "up", up), parse_factor(op, "down", down)
    sides = parse_padding(op, padding)
    height, width = output_size(op, x, filter_size(f), factors_up, factors_down, sides)
    check_epilogue(op, epilogue, x, (x.shape[0], x.shape[1], height, width))
    extents = (height, width, *x.shape[2:], *filter_size(f), *map(abs, sides))
    large = any(v >= _MOST_PIXELS for v in extents) or max(factors_up + factors_down) >= _MOST_FACTOR
    chosen = backends.choose(op, backend, _BACKENDS, x.device, x.dtype, trained=trained, large=large)
    act = Activated(epilogue.act, *resolve(epilogue.act, epilogue.alpha, epilogue.gain), epilogue.clamp)
    fir = (factors_up, factors_down, sides, bool(flip_filter), float(gain))
    serves = {"reference": None, "cuda": _op_cuda}.get(chosen, _op)
    return _Plan(serves, fir, act, float(residual_gain), _check.accumulate_dtype(x.dtype))


def check_filter(op: str, name: str, f: Tensor | None, x: Tensor) -> None:
    """``f`` is None, [taps] or [fh, fw], not empty, on ``x``'s device."""
    if f is None:
        return
    _check.tensor(op, name, f)
    if f.ndim not in (1, 2) or f.numel() == 0:
        raise ValueError(f"{op}: {name} must be [taps] or [fh, fw] with at least one tap, got {list(f.shape)}")
    _check.same_device(op, x=x, **{name: f})


def filter_size(f: Tensor | None) -> tuple[int, int]:
    """(width, height) of a filter in taps."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def parse_factor(op: str, name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """An int or (x, y) as (x, y), each at least 1."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= 1 for v in pair):
        raise ValueError(f"{op}: {name} must be an int >= 1 or (x, y) of such, got {value}")
    return pair


def parse_padding(op: str, value: int | Sequence[int]) -> tuple[int, int, int, int]:
    """An int, (x, y) or (x0, x1, y0, y1) as (x0, x1, y0, y1)."""
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) == 2:
        sides = (sides[0], sides[0], sides[1], sides[1])
    if len(sides) != 4 or not all(isinstance(v, int) for v in sides):
        raise ValueError(f"{op}: padding must be an int, (x, y) or (x0, x1, y0, y1), got {value}")
    return sides


def output_size(
    op: str,
    x: Tensor,
    taps: tuple[int, int],
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
) -> tuple[int, int]:
    """(height, width) of the result, at least one pixel each; ``taps``, ``up`` and ``down`` are (x, y)."""
    x0, x1, y0, y1 = padding
    width = (x.shape[3] * up[0] + x0 + x1 - taps[0] + down[0]) // down[0]
    height = (x.shape[2] * up[1] + y0 + y1 - taps[1] + down[1]) // down[1]
    if width < 1 or height < 1:
        raise ValueError(
            f"{op}: x {list(x.shape)}, upsampled by {list(up)} and padded by {list(padding)}, must be at least as "
            f"large as the filter = [{taps[1]}, {taps[0]}], got "
            f"[{x.shape[2] * up[1] + y0 + y1}, {x.shape[3] * up[0] + x0 + x1}]"
        )
    return height, width


# ----------------------------------------------------------------------------------------------------------------------
# fastgan::upfirdn2d, and the same op on CUDA C++: Triton's kernel has the other one's place on the GPU


def _fallback(x, f, noise, noise_strength, bias, residual, up, down, padding, flip_filter, fir_gain, *settings):
    *act, residual_gain = settings
    epilogue = Epilogue(noise, noise_strength, bias, *act, residual, residual_gain)
    y = reference.upfirdn2d(
        x,
        f,
        up=tuple(up),
        down=tuple(down),
        padding=tuple(padding),
        flip_filter=flip_filter,
        gain=fir_gain,
        epilogue=epilogue,
    )
    return _empty_result(x, y.shape).copy_(y)


def _fake(x, f, noise, noise_strength, bias, residual, up, down, padding, *settings):
    x0, x1, y0, y1 = padding
    taps_x, taps_y = filter_size(f)
    height = (x.shape[2] * up[1] + y0 + y1 - taps_y + down[1]) // down[1]
    width = (x.shape[3] * up[0] + x0 + x1 - taps_x + down[0]) // down[0]
    return _empty_result(x, (x.shape[0], x.shape[1], height, width))


def _empty_result(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised, of ``shape`` in ``x``'s dtype and layout."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _setup_context(ctx, inputs, output) -> None:
    x, f, noise, strength, bias, residual, *ctx.fir = inputs[:11]
    ctx.act, ctx.residual_gain = Activated(*inputs[11:15]), inputs[15]
    ctx.input_hw, ctx.output_hw = x.shape[2:], output.shape[2:]
    from_output = ctx.act.known_from_output(residual is not None)
    saved_y = output if from_output and not ctx.act.linear else None
    ctx.save_for_backward(f, noise, strength, bias, saved_y, None if from_output else x)


def _adjoint(fir, taps: tuple[int, int], input_hw: Sequence[int], output_hw: Sequence[int]) -> tuple:
    """The options of the upfirdn2d that maps cotangents of the result back to ``x``.

    Along each axis out[i] = Σ_k f[k] · u[i·down + k − p0] with u[j·up] = x[j], so the transpose inserts down − 1 zeros
    into the cotangent, runs over the taps the other way round and keeps every up-th value; its first padding is what
    puts tap 0 back on pixel 0, its second what makes the result x's size.
    """
    up, down, padding, flip_filter, gain = fir
    sides = []
    for axis in (0, 1):
        before = padding[2 * axis]
        size, out = input_hw[1 - axis] * up[axis], output_hw[1 - axis] * down[axis]
        sides += [taps[axis] - before - 1, size - out + before - up[axis] + 1]
    return down, up, sides, not flip_filter, gain


def _define(name: str, triton: str | None = None) -> Callable[..., Tensor]:
    """The op ``name``, whose gradients are itself."""

    def plain(x: Tensor, f: Tensor | None, noise, strength, bias, *fir) -> Tensor:
        """The filter, noise and bias without what follows."""
        return op(dense(x), f, noise, strength, bias, None, *fir, "linear", 0.0, 1.0, None, 1.0)

    def backward(ctx, grad_y: Tensor):
        f, noise, strength, bias, y, x = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if needs[1]:
            raise NotImplementedError("upfirdn2d: the gradient of f has no kernel; backend='reference' computes it")
        grads: list[Tensor | None] = [None] * 6
        g = None
        if any(needs[:5]):
            g = ctx.act.cotangent(grad_y, y, lambda: plain(x, f, noise, strength, bias, *ctx.fir))
        grads[2:6] = epilogue_grads(needs[2:6], grad_y, g, noise, strength, bias, ctx.residual_gain)
        if needs[0]:
            adjoint = _adjoint(ctx.fir, filter_size(f), ctx.input_hw, ctx.output_hw)
            grads[0] = plain(g, f, None, None, None, *adjoint)
        return (*grads, *[None] * 10)

    op = define(
        name,
        "(Tensor x, Tensor? f, Tensor? noise, Tensor? noise_strength, Tensor? bias, Tensor? residual, int[2] up,"
        " int[2] down, SymInt[4] padding, bool flip_filter, float fir_gain, str act, float alpha, float gain,"
        " float? clamp, float residual_gain) -> Tensor",
        fallback=_fallback,
        fake=_fake,
        setup_context=_setup_context,
        backward=backward,
        triton=triton,
    )
    return op


_op = _define("upfirdn2d", triton="upfirdn2d.upfirdn2d")
_op_cuda = _define("upfirdn2d_cuda")
