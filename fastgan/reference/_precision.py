"""In which dtype the oracles compute."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for every other dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """No autocast on ``x``'s device inside the ``with`` block: torch would round a convolution's operands."""
    if x.device.type == "meta":  # knows no autocast, and asking about it raises
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
