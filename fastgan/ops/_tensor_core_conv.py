"""What the convolution kernel of csrc/cuda/modulated_conv2d.cuh takes, for the ops that offer it as backend "cuda"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastgan import backends

_ACTIVATIONS = ("linear", "relu", "lrelu")


class ConvFacts(NamedTuple):
    """A convolution as the predicate of the backend "cuda" looks at it.

    Attributes:
        weight: sizes of the weight, [C_out, C_in, k_h, k_w].
        plain: without resampling, stride, dilation, transposition or groups.
        padding: (left, right, top, bottom), zeros.
        act: the epilogue's activation.
        residual: whether the epilogue has one.
    """

    weight: Sequence[int]
    plain: bool
    padding: Sequence[int]
    act: str
    residual: bool


def tensor_core_can_run(device: torch.device, dtype: torch.dtype, *, conv: ConvFacts) -> str | None:
    """None, or why the kernel cannot compute this convolution: it knows 3×3 ones of half types that keep the image's
    size, on GPUs with cp.async."""
    c_out, c_in, *kernel = conv.weight
    common = backends.cuda_can_run(device, dtype)
    if common is not None:
        return common
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, got {dtype}"
    if kernel != [3, 3]:
        return f"it takes a kernel of 3x3, got {kernel[0]}x{kernel[1]}"
    if not conv.plain:
        return "it takes a convolution without resampling, stride, dilation, transposition or groups"
    if tuple(conv.padding) != (1, 1, 1, 1):
        return f"it takes a padding of 1 with zeros, got {tuple(conv.padding)}"
    if c_in % 8 or c_out % 8:
        return f"it takes multiples of 8 channels, got C_in = {c_in} and C_out = {c_out}"
    if conv.act not in _ACTIVATIONS:
        return f"its activation is one of {', '.join(_ACTIVATIONS)}, got {conv.act}"
    if conv.residual:
        return "it has no residual"
    # Without a GPU there are fake tensors only, which are those of any.
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    return None
