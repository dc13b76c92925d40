"""The oracle of filtered_lrelu: plain torch, any dtype and device, differentiable without end."""

from __future__ import annotations

from torch import Tensor

from fastgan.reference._precision import compute_dtype
from fastgan.reference.bias_act import bias_act
from fastgan.reference.upfirdn2d import upfirdn2d


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
    """Bias, upsample with ``fu``, clamp(gain · lrelu), downsample with ``fd``; float32 inside for half types."""
    y = bias_act(x.to(compute_dtype(x)), b, dim=1, act="linear", alpha=None, gain=None, clamp=None)
    y = upfirdn2d(
        y, fu, up=(up, up), down=(1, 1), padding=padding, flip_filter=flip_filter, gain=float(up * up), epilogue=None
    )
    y = bias_act(y, None, dim=1, act="lrelu", alpha=slope, gain=gain, clamp=clamp)
    y = upfirdn2d(
        y, fd, up=(1, 1), down=(down, down), padding=(0, 0, 0, 0), flip_filter=flip_filter, gain=1.0, epilogue=None
    )
    return y.to(x.dtype)
