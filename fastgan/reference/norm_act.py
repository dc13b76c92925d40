"""The oracle of norm_act: plain torch, any dtype and device, differentiable without end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.reference._precision import compute_dtype
from fastgan.reference.activation import activate


def norm_act(
    x: Tensor,
    *,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float] | None,
    eps: float,
    act: str,
    alpha: float | None,
    gain: float | None,
) -> Tensor:
    """y = gain · act(weight · (x − mean) / √(var + eps) + bias); half types are computed in float32, rounded once."""
    y = x.to(compute_dtype(x))
    weight = None if weight is None else weight.to(y.dtype)
    bias = None if bias is None else bias.to(y.dtype)
    # torch's own second order of a bias without a weight raises: applied apart, as what is adaptive has to be.
    apart = any(t is not None and t.ndim == 2 for t in (weight, bias)) or weight is None
    affine = (None, None) if apart else (weight, bias)
    if x.shape[0] == 0:
        # No sample has statistics to offer, so running ones stay as they are; the sum keeps (zero) gradients for the
        # affine pair.
        y = F.batch_norm(y, y.new_zeros(y.shape[1]), y.new_ones(y.shape[1]), *affine, training=False, eps=eps)
    elif kind == "instance":
        y = F.instance_norm(y, None, None, *affine, eps=eps)
    else:
        y = batch_norm(y, *affine, running=running, eps=eps)
    if apart and weight is not None:
        y = y * weight.reshape(-1, y.shape[1], 1, 1)
    if apart and bias is not None:
        y = y + bias.reshape(-1, y.shape[1], 1, 1)
    return activate(y, act, alpha, gain, None).to(x.dtype)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    running: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float] | None,
    eps: float,
) -> Tensor:
    """Batch normalisation; running statistics of another dtype than ``x``'s are read and written back with a cast."""
    if running is None:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    statistics = [t.to(x.dtype) for t in running[:2]]
    training = len(running) == 3
    momentum = running[2] if training else 0.0
    y = F.batch_norm(x, *statistics, weight, bias, training=training, momentum=momentum, eps=eps)
    if training:
        with torch.no_grad():
            for kept, advanced in zip(running[:2], statistics, strict=True):
                if kept is not advanced:
                    kept.copy_(advanced)
    return y
