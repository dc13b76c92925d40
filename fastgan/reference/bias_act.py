"""The oracle of bias_act: plain torch, any dtype and device, differentiable without end."""

from __future__ import annotations

from torch import Tensor

from fastgan.reference._precision import compute_dtype
from fastgan.reference.activation import activate


def bias_act(
    x: Tensor, b: Tensor | None, *, dim: int, act: str, alpha: float | None, gain: float | None, clamp: float | None
) -> Tensor:
    """y = clamp(gain · act(x + b), ±clamp), ``b`` along ``dim``; half types are computed in float32, rounded once."""
    y = x.to(compute_dtype(x))
    if b is not None:
        y = y + b.to(y.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    return activate(y, act, alpha, gain, clamp).to(x.dtype)
