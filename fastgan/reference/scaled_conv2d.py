"""The oracle of scaled_conv2d: plain torch, any dtype and device, differentiable without end."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastgan.reference._precision import compute_dtype, full_precision
from fastgan.reference.epilogue import Epilogue, apply_epilogue


def pad_input(x: Tensor, padding: tuple[int, int, int, int], mode: str) -> Tensor:
    """Pad ``x`` [N, C, H, W] by (left, right, top, bottom) pixels; mode zeros, reflect or replicate."""
    if not any(padding):
        return x
    return F.pad(x, padding) if mode == "zeros" else F.pad(x, padding, mode=mode)


def scaled_conv2d(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    output_padding: tuple[int, int],
    dilation: tuple[int, int],
    padding_mode: str,
    transposed: bool,
    groups: int,
    epilogue: Epilogue,
) -> Tensor:
    """y = epilogue(out_scale ⊙ conv(in_scale ⊙ x, weight)); scales are [N or 1, C or 1].

    Half types are computed in float32 and rounded once, at the end. A transposed convolution takes (left, right, top,
    bottom) with left = right and top = bottom.
    """
    compute = compute_dtype(x)
    c, w = x.to(compute), weight.to(compute)
    if in_scale is not None:
        c = c * in_scale.to(compute)[:, :, None, None]
    with full_precision(x):
        if transposed:
            c = F.conv_transpose2d(c, w, None, stride, (padding[2], padding[0]), output_padding, groups, dilation)
        else:
            c = F.conv2d(pad_input(c, padding, padding_mode), w, None, stride, 0, dilation, groups)
    if out_scale is not None:
        c = c * out_scale.to(compute)[:, :, None, None]
    return apply_epilogue(c, epilogue).to(x.dtype)
