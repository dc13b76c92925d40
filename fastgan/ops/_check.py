"""Checks that the public ops share. Each raises ``ValueError: op: argument must be ..., got ...`` (or
``TypeError``)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

DEBUG = os.environ.get("FASTGAN_DEBUG", "0") not in ("", "0")


def tensor(op: str, name: str, value: object, *, ndim: int | None = None) -> Tensor:
    """``value`` is a real floating-point tensor, with ``ndim`` dimensions if given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating point, got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimensions, got {list(value.shape)}")
    return value


def same_device(op: str, **tensors: Tensor | None) -> None:
    """All given tensors are on the device of the first one."""
    (first_name, first), *rest = [(name, value) for name, value in tensors.items() if value is not None]
    for name, value in rest:
        if value.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} like {first_name}, got {value.device}")


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """All given tensors have the dtype of the first one."""
    (first_name, first), *rest = [(name, value) for name, value in tensors.items() if value is not None]
    for name, value in rest:
        if value.dtype != first.dtype:
            raise ValueError(f"{op}: {name} must be {first.dtype} like {first_name}, got {value.dtype}")


def one_of(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of ``dtype`` are summed: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the active autocast dtype of the first tensor's device, if autocast is on; float64 stays."""
    device_type = tensors[0].device.type
    # meta knows no autocast, and asking about it raises.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def no_nan(op: str, *results: Tensor) -> None:
    """With ``FASTGAN_DEBUG=1`` a NaN in a result raises (one read of the result; a synchronisation on a GPU)."""
    if DEBUG and not torch.compiler.is_compiling():
        for i, result in enumerate(results):
            if bool(torch.isnan(result).any()):
                raise FloatingPointError(f"{op}: result {i} {list(result.shape)} contains NaN (FASTGAN_DEBUG=1)")
