"""The oracle of upfirdn2d: plain torch, any dtype and device, differentiable without end."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastgan.reference._precision import compute_dtype, full_precision
from fastgan.reference.epilogue import Epilogue, apply_epilogue


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    *,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
    epilogue: Epilogue | None,
) -> Tensor:
    """Insert zeros, pad or crop by (x0, x1, y0, y1), filter, keep every ``down``-th; then the epilogue.

    up and down are (x, y). Half types are computed in float32 and rounded once, at the end.
    """
    with full_precision(x):
        y = F.pad(insert_zeros(x.to(compute_dtype(x)), up), padding)
        down_x, down_y = down
        if f is None:
            y = y[:, :, ::down_y, ::down_x] * gain
        elif f.ndim == 1:
            # √gain on both axes in other words, which would not do for a negative gain.
            taps = oriented(f.to(y.dtype), flip_filter)
            y = correlate(y, taps[None, :], stride=(1, down_x))
            y = correlate(y, (taps * gain)[:, None], stride=(down_y, 1))
        else:
            y = correlate(y, oriented(f.to(y.dtype), flip_filter) * gain, stride=(down_y, down_x))
        if epilogue is not None:
            y = apply_epilogue(y, epilogue)
        return y.to(x.dtype)


def oriented(f: Tensor, flip_filter: bool) -> Tensor:
    """The filter as correlation wants it: turned around, unless flip_filter asks for a correlation anyway."""
    return f if flip_filter else f.flip(list(range(f.ndim)))


def insert_zeros(x: Tensor, up: tuple[int, int]) -> Tensor:
    """[N, C, H, W] -> [N, C, H·up_y, W·up_x]: up − 1 zeros after each pixel and after each row."""
    up_x, up_y = up
    if up_x == up_y == 1:
        return x
    n, c, h, w = x.shape
    y = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up_x - 1, 0, 0, 0, up_y - 1))
    return y.reshape(n, c, h * up_y, w * up_x)


def correlate(x: Tensor, f: Tensor, stride: tuple[int, int]) -> Tensor:
    """Each channel of ``x`` [N, C, H, W] with the one filter ``f`` [fh, fw], no padding."""
    channels = x.shape[1]
    return F.conv2d(x, f.expand(channels, 1, *f.shape), stride=stride, groups=channels)
