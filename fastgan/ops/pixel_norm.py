"""Pixelwise normalisation: each feature vector to a mean square of 1."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops import _check
from fastgan.ops._epilogue import dense
from fastgan.ops._library import define
from fastgan.ops._plans import find_plan
from fastgan.reference import pixel_norm as reference

_BACKENDS = {"triton": backends.triton_can_run, "cpp": backends.cpp_can_run, "reference": backends.always}


def pixel_norm(x: Tensor, *, dim: int = 1, eps: float = 1e-8, backend: str | None = None) -> Tensor:
    """y = x · rsqrt(mean over ``dim`` of x² + eps).

    Half types are computed in float32 and rounded once; autocast leaves ``x`` as it is. The result is contiguous or, if
    ``x`` is, channels_last; an ``x`` that is neither is copied once, and so is a channels_last one unless ``dim`` is 1.

    Args:
        x: any shape, floating point; not empty along ``dim``.
        dim: the dimension of the features; may be negative.
        eps: > 0.
        backend: see :func:`fastgan.backend`.

    Returns:
        ``x``'s shape and dtype.

    Raises:
        ValueError: a dimension that ``x`` does not have, or that is empty; eps not above 0; a backend that cannot run.
        TypeError: ``x`` is not a tensor.

    Gradients: any order; the first order is one kernel, the second runs in torch's own. Saved for backward: ``x``.

    Source: Karras et al., "Progressive Growing of GANs", 2018, section 4.2.
    """
    chosen, dim, eps = find_plan("pixel_norm", _make_plan, (x,), (dim, eps, backend))
    if chosen == "reference":
        y = reference.pixel_norm(x, dim=dim, eps=eps)
    else:
        y = _op(dense(x) if dim == 1 else x.contiguous(), dim, eps)
    if _check.DEBUG:
        _check.no_nan("pixel_norm", y)
    return y


def _make_plan(x: Tensor, dim: int, eps: float, backend: str | None) -> tuple[str, int, float]:
    """(backend, dim from 0 on, eps)."""
    op = "pixel_norm"
    _check.tensor(op, "x", x)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{op}: dim must be within {-x.ndim} .. {x.ndim - 1} for x {list(x.shape)}, got {dim}")
    if x.shape[dim] == 0:
        raise ValueError(f"{op}: x must not be empty along dim {dim}, got {list(x.shape)}")
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    return backends.choose(op, backend, _BACKENDS, x.device, x.dtype), dim % x.ndim, float(eps)


def _fallback(x: Tensor, dim: int, eps: float) -> Tensor:
    return torch.empty_like(x).copy_(reference.pixel_norm(x, dim=dim, eps=eps))


def _fake(x: Tensor, dim: int, eps: float) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.dim, ctx.eps = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad_y: Tensor):
    (x,) = ctx.saved_tensors
    return _grad_op(grad_y, x, ctx.dim, ctx.eps), None, None


_op = define(
    "pixel_norm",
    "(Tensor x, int dim, float eps) -> Tensor",
    fallback=_fallback,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="pixel_norm.pixel_norm",
)


# ----------------------------------------------------------------------------------------------------------------------
# fastgan::pixel_norm_grad: r · g − x · r³ · mean(g · x) with r = rsqrt(mean(x²) + eps), symmetric as a map of g.


def _grad_fallback(g: Tensor, x: Tensor, dim: int, eps: float) -> Tensor:
    wide = _check.accumulate_dtype(x.dtype)
    wide_g, wide_x = g.to(wide), x.to(wide)
    r = (wide_x.square().mean(dim, keepdim=True) + eps).rsqrt()
    along = (wide_g * wide_x).mean(dim, keepdim=True)
    return torch.empty_like(x).copy_(r * wide_g - wide_x * (r.pow(3) * along))


def _grad_fake(g: Tensor, x: Tensor, dim: int, eps: float) -> Tensor:
    return torch.empty_like(x)


def _grad_setup(ctx, inputs, output) -> None:
    g, x, ctx.dim, ctx.eps = inputs
    ctx.save_for_backward(g, x)


def _grad_backward(ctx, h: Tensor):
    """⟨h, r·g − x·r³·mean(g·x)⟩ by g and by x; with C values along the dimension, dr/dx = −r³ · x / C."""
    g, x = ctx.saved_tensors
    need_g, need_x = ctx.needs_input_grad[:2]
    grad_g = _grad_op(h, x, ctx.dim, ctx.eps) if need_g else None
    grad_x = None
    if need_x:
        wide = _check.accumulate_dtype(x.dtype)
        g, x, h = g.to(wide), x.to(wide), h.to(wide)

        def along(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).mean(ctx.dim, keepdim=True)

        r = (along(x, x) + ctx.eps).rsqrt()
        gx, hx, cube = along(g, x), along(h, x), r.pow(3)
        grad_x = cube * (3 * r * r * gx * hx * x - along(g, h) * x - gx * h - hx * g)
        grad_x = grad_x.to(ctx.saved_tensors[1].dtype)
    return grad_g, grad_x, None, None


_grad_op = define(
    "pixel_norm_grad",
    "(Tensor g, Tensor x, int dim, float eps) -> Tensor",
    fallback=_grad_fallback,
    fake=_grad_fake,
    setup_context=_grad_setup,
    backward=_grad_backward,
    triton="pixel_norm.pixel_norm_grad",
)
