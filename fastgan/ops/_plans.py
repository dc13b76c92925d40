"""What follows from a call's signature alone, worked out once: checking a call costs as much as a small layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgan import backends
from fastgan.reference.epilogue import Epilogue

Plan = TypeVar("Plan")

# A network makes the same few calls in every step. Cleared when shapes that keep changing have filled it.
_found: dict[tuple, Any] = {}
_MOST = 8192


def find_plan(op: str, make: Callable[..., Plan], tensors: Sequence[Any], options: tuple) -> Plan:
    """``make(*tensors, *options)``, or what it returned for an earlier call of the same signature.

    Args:
        op: the op's name.
        make: checks the call and chooses its backend, from the tensors' shapes, dtypes and devices and the options'
            values alone; raises for a call that is wrong. Of an argument that may be a tensor or something else, like a
            noise strength that is a number, it may look at the type only.
        tensors: the arguments that are tensors, or None.
        options: the others.
    """
    if torch.compiler.is_compiling():
        return make(*tensors, *options)
    signature = (
        op,
        options,
        backends.override(),
        *[(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else type(t) for t in tensors],
    )
    try:
        plan = _found.get(signature)
    except TypeError:  # an option that cannot be hashed, a list of paddings say
        return make(*tensors, *options)
    if plan is None:
        plan = make(*tensors, *options)
        if len(_found) >= _MOST:
            _found.clear()
        _found[signature] = plan
    return plan


def forget_plans() -> None:
    """For who watches what a call asks for: the next call of every signature is checked again."""
    _found.clear()


def epilogue_parts(epilogue: Epilogue) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """An epilogue as :func:`find_plan` takes it: (noise, noise_strength, bias, residual), and the options."""
    e = epilogue
    return (e.noise, e.noise_strength, e.bias, e.residual), (e.act, e.alpha, e.gain, e.clamp, e.residual_gain)
