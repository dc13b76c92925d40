"""The one matrix product of every Triton kernel here, and which precision float32 operands are multiplied in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan._native import TRITON_INTERPRETED

from ._launch import planning

# Read inside a kernel, so it has to be a constexpr.
_INTERPRETED = tl.constexpr(TRITON_INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32: a [M, K], b [K, N] of one dtype, acc [M, N] float32.

    Half types run on tensor cores, exact products with float32 sums. float32 operands are multiplied as ``PRECISION``
    says: "ieee" exactly, on the ordinary units, "tf32" on tensor cores with 10 bits of mantissa.
    """
    if _INTERPRETED:
        # The interpreter multiplies bfloat16 as the integers of its bits: widened first, a product is what it is on
        # tensor cores. It knows no TF32 at all.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


_planned_for = (8, 0)


@contextlib.contextmanager
def planning_for(capability: tuple[int, int]) -> Iterator[None]:
    """Plan launches inside the ``with`` block for a device of ``capability``, where they are only planned."""
    global _planned_for
    before, _planned_for = _planned_for, capability
    try:
        yield
    finally:
        _planned_for = before


def has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton multiplies on tensor cores on ``device``: from sm_80 on, which is also assumed where launches
    are only planned (but see :func:`planning_for`) or interpreted."""
    asked = device.type == "cuda" and not planning()
    return (_capability(device) if asked else _planned_for) >= (8, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def convolution_precision(x: Tensor) -> str:
    """PRECISION of a convolution of ``x``: "tf32" only for float32 and where torch allows its own convolutions TF32, by
    ``torch.backends.cudnn.conv.fp32_precision`` or the older ``torch.backends.cudnn.allow_tf32``."""
    allowed = x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if allowed and has_tensor_cores(x.device) else "ieee"


def demanded_precision(setting: str) -> str | None:
    """PRECISION that an op's ``precision``, "fp32" or "high", demands of its products; None leaves it to
    :func:`convolution_precision`."""
    return "ieee" if setting == "high" else None
