"""Pixelwise normalisation: each feature vector to a mean square of 1."""

from __future__ import annotations

from torch import Tensor

from fastgan.ops import _check
from fastgan.reference import pixel_norm as reference


def pixel_norm(x: Tensor, *, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """y = x · rsqrt(mean over ``dim`` of x² + eps).

    Args:
        x: any shape, floating point; not empty along ``dim``.
        dim: the dimension of the features; may be negative.
        eps: > 0.

    Returns:
        ``x``'s shape and dtype; half types are computed in float32 and rounded once.

    Raises:
        ValueError: a dimension that ``x`` does not have, or that is empty; eps not above 0.
        TypeError: ``x`` is not a tensor.

    Gradients: any order.

    Source: Karras et al., "Progressive Growing of GANs", 2018, section 4.2.
    """
    op = "pixel_norm"
    _check.tensor(op, "x", x)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{op}: dim must be within {-x.ndim} .. {x.ndim - 1} for x {list(x.shape)}, got {dim}")
    if x.shape[dim] == 0:
        raise ValueError(f"{op}: x must not be empty along dim {dim}, got {list(x.shape)}")
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    return reference.pixel_norm(x, dim=dim, eps=eps)
