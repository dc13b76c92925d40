"""Leaky ReLU between an upsampling and a downsampling filter: StyleGAN3's alias-free nonlinearity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops import _check, _filtered_lrelu
from fastgan.ops.upfirdn2d import check_filter, filter_size, parse_padding
from fastgan.reference import filtered_lrelu as reference


def _cuda_can_run(device: torch.device, dtype: torch.dtype, *, filters: Sequence[Tensor | None], sizes: tuple):
    """``sizes``: the arguments of why_no_kernel, which is asked only here: CUDA serves where it is named."""
    if torch.is_grad_enabled() and any(f is not None and f.requires_grad for f in filters):
        return "fu or fd requires a gradient, which the reference alone computes"
    return backends.cuda_can_run(device, dtype) or _filtered_lrelu.why_no_kernel(*sizes)


_CAN_RUN = {"cuda": _cuda_can_run, "reference": backends.always}


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    b: Tensor | None = None,
    *,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = 2.0**0.5,
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Bias, upsample, leaky ReLU, downsample.

        y = ↓down(fd * clamp(gain · lrelu(up² · fu * pad(↑up(x + b))), ±clamp))
        out = (in · up + p0 + p1 − (fu − 1) − (fd − 1) + down − 1) // down        along each axis

    Half types are computed in float32 and rounded once; autocast leaves ``x`` as it is. The CUDA backend, chosen only
    by name, is one pass over the image, whose result is contiguous; an ``x`` that is not is copied once. It takes any
    filters whose tiles fit a block's shared memory, unless they require a gradient, and is made for StyleGAN3's
    separable ones of six taps per factor: up 2 or 4, down 2. It keeps for backward two bits per upsampled pixel,
    neither ``x`` nor the result.

    Args:
        x: [N, C, H, W], floating point; N may be 0.
        fu, fd: filters before and after the nonlinearity, [fh, fw] or separable [taps]; None is one tap of 1.
        b: [C], any floating dtype; None for none. Added before the padding, so the padding stays zero.
        up, down: factors ≥ 1.
        padding: pixels of the upsampled image: an int, (x, y) or (x0, x1, y0, y1); a negative number crops.
        gain: factor on the activation.
        slope: slope of the leaky ReLU below zero.
        clamp: bound on the activation's magnitude after gain, > 0; None for none.
        flip_filter: False convolves with both filters, True correlates.
        backend: see :func:`fastgan.backend`.

    Returns:
        [N, C, out_h, out_w], ``x``'s dtype.

    Raises:
        ValueError: wrong shapes or factors, an output without pixels, a backend that cannot run.
        TypeError: an argument that must be a tensor is not.

    Gradients: any order, for ``x``, ``b`` and the filters.

    Source: Karras et al., "Alias-Free Generative Adversarial Networks", 2021, section 3.2 and figure 4b.
    """
    op = "filtered_lrelu"
    _check.tensor(op, "x", x, ndim=4)
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must have C, H and W of at least 1, got {list(x.shape)}")
    check_filter(op, "fu", fu, x)
    check_filter(op, "fd", fd, x)
    if b is not None:
        _check.tensor(op, "b", b)
        if list(b.shape) != [x.shape[1]]:
            raise ValueError(f"{op}: b must be [C] = [{x.shape[1]}], got {list(b.shape)}")
        _check.same_device(op, x=x, b=b)
    for name, factor in (("up", up), ("down", down)):
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"{op}: {name} must be an int >= 1, got {factor}")
    if clamp is not None and not clamp > 0:
        raise ValueError(f"{op}: clamp must be above 0 or None, got {clamp}")
    sides = parse_padding(op, padding)
    _check_output_size(op, x, fu, fd, up, down, sides)
    sizes = (x, fu, fd, up, down, sides)
    chosen = backends.choose(op, backend, _CAN_RUN, device=x.device, dtype=x.dtype, filters=(fu, fd), sizes=sizes)
    compute = _filtered_lrelu.filtered_lrelu if chosen == "cuda" else reference.filtered_lrelu
    y = compute(
        x,
        fu,
        fd,
        b,
        up=up,
        down=down,
        padding=sides,
        gain=float(gain),
        slope=float(slope),
        clamp=clamp,
        flip_filter=flip_filter,
    )
    _check.no_nan(op, y)
    return y


def _check_output_size(
    op: str, x: Tensor, fu: Tensor | None, fd: Tensor | None, up: int, down: int, padding: tuple[int, int, int, int]
) -> None:
    """The image, upsampled and padded, is no smaller than what the two filters, one after the other, reach over."""
    reach_x, reach_y = (a + b - 1 for a, b in zip(filter_size(fu), filter_size(fd), strict=True))
    width = x.shape[3] * up + padding[0] + padding[1]
    height = x.shape[2] * up + padding[2] + padding[3]
    if width < reach_x or height < reach_y:
        raise ValueError(
            f"{op}: x {list(x.shape)}, upsampled by {up} and padded by {list(padding)}, must be at least as large as "
            f"fu and fd one after the other = [{reach_y}, {reach_x}], got [{height}, {width}]"
        )
