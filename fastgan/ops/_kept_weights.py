"""Tells the CPU kernels which weights to keep what they make of: the parameters of networks that only infer."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastgan import _native


@dataclass
class _Known:
    """What the C++ side was told of one parameter."""

    owner: weakref.ref[Tensor]
    address: int  # of the parameter's values
    weights: set[int] = field(default_factory=set)  # addresses of it, or of views of it


# id of a parameter -> what is known of it. Parameters may die, and be collected, in the midst of anything: the lock is
# one that its own thread may take again.
_kept: dict[int, _Known] = {}
_lock = threading.RLock()


def _enabled() -> bool:
    value = os.environ.get("FASTGAN_KEEP_WEIGHTS", "1")
    if value not in ("0", "1"):
        raise ValueError(f"FASTGAN_KEEP_WEIGHTS must be 0 or 1, got {value!r}")
    return value == "1"


_library = _native.cpu_library() if _enabled() else None


def keep(weight: Tensor) -> None:
    """Have what the CPU convolutions make of ``weight`` kept from one call to the next, if it is a float32 parameter
    (or a view of one) and no gradient is recorded: Winograd's transform of a weight takes up to a third of a layer's
    time and 2 to 6 times the weight's memory. It is freed with the parameter. A weight that was written to, in whatever
    way, is transformed anew: the kernels compare a hash of all its values.

    Environment: FASTGAN_KEEP_WEIGHTS=0 keeps nothing.
    """
    if _library is None or weight.dtype != torch.float32 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    owner = weight if weight._base is None else weight._base
    if type(owner) is not nn.Parameter:
        return
    address, pointer = owner.data_ptr(), weight.data_ptr()
    with _lock:
        known = _kept.get(id(owner))
        if known is None or known.owner() is not owner or known.address != address:
            _forget(id(owner))
            known = _kept[id(owner)] = _Known(weakref.ref(owner, _when_gone(id(owner))), address)
        known.weights.add(pointer)
        # Even if it is known: the kernels forget a weight that was written to.
        _library.fastgan_keep_weight(pointer)


def kept_bytes() -> int:
    """Memory of everything that is kept."""
    return 0 if _library is None else _library.fastgan_kept_bytes()


def _when_gone(key: int):
    def forget(owner: weakref.ref[Tensor]) -> None:
        with _lock:
            if key in _kept and _kept[key].owner is owner:
                _forget(key)

    return forget


def _forget(key: int) -> None:
    known = _kept.pop(key, None)
    for pointer in known.weights if known is not None else ():
        _library.fastgan_forget_weight(pointer)
