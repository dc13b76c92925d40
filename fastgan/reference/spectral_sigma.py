"""The oracle of spectral_sigma: plain torch, any dtype and device, differentiable without end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def weight_matrix(weight: Tensor, dim: int) -> Tensor:
    """The matrix [rows, columns] of ``weight``: axis ``dim`` gives the rows, the others, in order, the columns."""
    if weight.ndim == 1:
        return weight[:, None]
    return weight.movedim(dim, 0).flatten(1)


def spectral_sigma(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_iter: int,
    order: str,
    eps: float,
    dims: Sequence[int],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """σ = uᵀ W v per layer after ``n_iter`` power iterations; returns (σ [layers], new us, new vs), changes nothing.

    Half weights are computed in float32. u and v are constants: the gradient of σ with respect to W is u vᵀ.
    """
    sigmas, new_us, new_vs = [], [], []
    for weight, u, v, dim in zip(weights, us, vs, dims, strict=True):
        matrix = weight_matrix(weight, dim).to(u.dtype)
        with torch.no_grad():
            for _ in range(n_iter):
                if order == "hook":
                    v = F.normalize(matrix.mT @ u, dim=0, eps=eps)
                    u = F.normalize(matrix @ v, dim=0, eps=eps)
                else:
                    u = F.normalize(matrix @ v, dim=0, eps=eps)
                    v = F.normalize(matrix.mT @ u, dim=0, eps=eps)
            # A copy even when nothing was iterated: the caller's vectors change in place at its next step, and backward
            # needs these.
            u, v = u.clone(), v.clone()
        sigmas.append(torch.dot(u, matrix @ v))
        new_us.append(u)
        new_vs.append(v)
    return torch.stack(sigmas), new_us, new_vs
