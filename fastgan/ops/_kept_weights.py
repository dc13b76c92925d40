"""Tells the CPU kernels which weights to keep what they make of: the parameters of networks that only infer."""

from __future__ import annotations

import os
import weakref

import torch
from torch import Tensor, nn

from fastgan import _native

# parameter's id -> (the parameter, the address of its values): what the C++ side was told.
_kept: dict[int, tuple[weakref.ref[Tensor], int]] = {}


def _enabled() -> bool:
    value = os.environ.get("FASTGAN_KEEP_WEIGHTS", "1")
    if value not in ("0", "1"):
        raise ValueError(f"FASTGAN_KEEP_WEIGHTS must be 0 or 1, got {value!r}")
    return value == "1"


_library = _native.cpu_library() if _enabled() else None


def keep(weight: Tensor) -> None:
    """Have what the CPU convolutions make of ``weight`` kept from one call to the next, if it is a float32 parameter, or
    a view of one, and no gradient is recorded.

    Winograd's transform of a weight takes up to a third of a layer's time and 2 to 6 times the weight's memory. It is
    freed with the parameter. A weight that was written to, in whatever way, is transformed anew: the kernels compare a
    hash of all its values. Environment: FASTGAN_KEEP_WEIGHTS=0 keeps nothing.
    """
    if _library is None or weight.dtype != torch.float32 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    owner = weight if weight._base is None else weight._base
    if type(owner) is not nn.Parameter:
        return
    pointer, key = weight.data_ptr(), id(owner)
    known = _kept.get(key)
    if known is None or known[1] != pointer:
        if known is not None:
            _library.fastgan_forget_weight(known[1])
        _kept[key] = weakref.ref(owner, lambda _: _forget(key)), pointer
    _library.fastgan_keep_weight(pointer)


def kept_bytes() -> int:
    """Memory of everything that is kept."""
    return 0 if _library is None else _library.fastgan_kept_bytes()


def _forget(key: int) -> None:
    _library.fastgan_forget_weight(_kept.pop(key)[1])
