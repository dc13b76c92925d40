"""The oracle of pixel_norm: plain torch, any dtype and device, differentiable without end."""

from __future__ import annotations

from torch import Tensor

from fastgan.reference._precision import compute_dtype


def pixel_norm(x: Tensor, *, dim: int, eps: float) -> Tensor:
    """y = x · rsqrt(mean over ``dim`` of x² + eps); half types are computed in float32 and rounded once."""
    wide = x.to(compute_dtype(x))
    return (wide * (wide.square().mean(dim, keepdim=True) + eps).rsqrt()).to(x.dtype)
