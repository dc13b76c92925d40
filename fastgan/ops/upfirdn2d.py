"""Upsample, filter, downsample: the resampling primitive of StyleGAN."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastgan import backends
from fastgan.ops import _check
from fastgan.reference import upfirdn2d as reference
from fastgan.reference.activation import ACTIVATIONS
from fastgan.reference.epilogue import Epilogue

_CAN_RUN = {"reference": backends.always}


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

    Half types are computed in float32 and rounded once; autocast leaves ``x`` as it is.

    Args:
        x: [N, C, H, W], floating point; N may be 0.
        f: [fh, fw], or [taps] for a separable filter that runs along both axes; any floating dtype, float32 as a rule.
            None is the filter of one tap of 1. StyleGAN does not train it; a gradient is there for those who do.
        up, down: factors ≥ 1: an int, or (x, y).
        padding: pixels of the upsampled image: an int, (x, y) or (x0, x1, y0, y1) = left, right, top, bottom. A
            negative number crops.
        flip_filter: False convolves (the filter is turned around), True correlates.
        gain: factor on the result. (On the filter, that is gain^(f.ndim / 2).)
        epilogue: what follows, at the output's size: noise, bias [C], activation, clamp, residual; see
            :class:`Epilogue`.
        backend: see :func:`fastgan.backend`.

    Returns:
        [N, C, out_h, out_w], ``x``'s dtype.

    Raises:
        ValueError: wrong shapes or factors, an output without pixels, a backend that cannot run.
        TypeError: an argument that must be a tensor is not.

    Gradients: any order, for ``x``, ``f`` and the epilogue's tensors.

    Source: Karras et al., "Alias-Free Generative Adversarial Networks", 2021, section 3.1; multirate filtering:
    insert zeros, filter, decimate.
    """
    op = "upfirdn2d"
    _check.tensor(op, "x", x, ndim=4)
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must have C, H and W of at least 1, got {list(x.shape)}")
    check_filter(op, "f", f, x)
    factors_up, factors_down = parse_factor(op, "up", up), parse_factor(op, "down", down)
    sides = parse_padding(op, padding)
    height, width = output_size(op, x, filter_size(f), factors_up, factors_down, sides)
    if epilogue is not None:
        check_epilogue(op, epilogue, x, (x.shape[0], x.shape[1], height, width))
    backends.choose(op, backend, _CAN_RUN, device=x.device, dtype=x.dtype)
    y = reference.upfirdn2d(
        x,
        f,
        up=factors_up,
        down=factors_down,
        padding=sides,
        flip_filter=flip_filter,
        gain=float(gain),
        epilogue=epilogue,
    )
    _check.no_nan(op, y)
    return y


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


def check_epilogue(op: str, epilogue: Epilogue, x: Tensor, shape: tuple[int, int, int, int]) -> None:
    """The epilogue's tensors fit an output of ``shape`` [N, C, H, W]."""
    n, channels, height, width = shape
    _check.one_of(op, "epilogue.act", epilogue.act, list(ACTIVATIONS))
    if epilogue.clamp is not None and not epilogue.clamp > 0:
        raise ValueError(f"{op}: epilogue.clamp must be above 0 or None, got {epilogue.clamp}")
    if epilogue.noise is None and epilogue.noise_strength is not None:
        raise ValueError(f"{op}: epilogue.noise_strength must be None without noise, got {epilogue.noise_strength}")
    strength = epilogue.noise_strength if isinstance(epilogue.noise_strength, Tensor) else None
    wanted = (
        ("noise", epilogue.noise, "[H, W] or [N, 1, H, W]", [[height, width], [n, 1, height, width]]),
        ("noise_strength", strength, "a single value", [[], [1]]),
        ("bias", epilogue.bias, "[C]", [[channels]]),
        ("residual", epilogue.residual, "[N, C, H, W]", [list(shape)]),
    )
    for name, value, form, shapes in wanted:
        if value is None:
            continue
        _check.tensor(op, f"epilogue.{name}", value)
        _check.same_device(op, x=x, **{f"epilogue.{name}": value})
        if list(value.shape) not in shapes:
            choices = " or ".join(map(str, shapes))
            raise ValueError(f"{op}: epilogue.{name} must be {form} = {choices}, got {list(value.shape)}")


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
