"""Bias, activation, gain and clamp in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgan import backends
from fastgan.ops import _check
from fastgan.ops._epilogue import Activated, contiguous, dense
from fastgan.ops._library import define
from fastgan.ops._plans import find_plan
from fastgan.reference import bias_act as reference
from fastgan.reference.activation import ACTIVATIONS, resolve

_BACKENDS = {"triton": backends.triton_can_run, "cpp": backends.cpp_can_run, "reference": backends.always}


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add a bias, activate, scale, clamp: y = clamp(gain · act(x + b), ±clamp).

    Half types are computed in float32 and rounded once; autocast leaves ``x`` as it is. The result is contiguous or, if
    ``x`` is, channels_last; an ``x`` that is neither is copied once, and so is a channels_last one whose bias does not
    run along dimension 1.

    Args:
        x: [..., C, ...], floating point, C at ``dim`` if there is a bias. Only dimension 0 may be empty.
        b: [C], any floating dtype; None for none.
        dim: the dimension of ``x`` that ``b`` runs along; may be negative.
        act: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish.
        alpha: slope of lrelu below zero; None means 0.2.
        gain: factor on the activation; None means √2 for relu, lrelu and swish, 1 for the others.
        clamp: bound on the magnitude after gain, > 0; None for none. The gradient is zero where it holds.
        backend: see :func:`fastgan.backend`.

    Returns:
        ``x``'s shape and dtype.

    Raises:
        ValueError: wrong shapes, an unknown activation, tensors on different devices, a backend that cannot run.
        TypeError: ``x`` or ``b`` is not a tensor.

    Gradients: 1st and 2nd order for ``x`` and ``b``; the reference differentiates without end. Saved for backward: the
    result, nothing for linear without a clamp, ``x`` and ``b`` for an activation that cannot be inverted.

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, section 2 (lrelu 0.2,
    gain √2).
    """
    plan = find_plan("bias_act", _make_plan, (x, b), (dim, act, alpha, gain, clamp, backend))
    if plan.reference:
        y = reference.bias_act(x, b, dim=plan.dim, **plan.settings._asdict())
    else:
        x = dense(x) if b is None or plan.dim == 1 else x.contiguous()
        b = None if b is None else contiguous(b, plan.wide)
        y = _op(x, b, plan.dim, *plan.settings)
    if _check.DEBUG:
        _check.no_nan("bias_act", y)
    return y


class _Plan(NamedTuple):
    """What follows from a call's signature."""

    reference: bool
    dim: int  # from 0 on if there is a bias
    settings: Activated
    wide: torch.dtype  # of the bias


def _make_plan(
    x: Tensor,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float | None,
    gain: float | None,
    clamp: float | None,
    backend: str | None,
) -> _Plan:
    op = "bias_act"
    _check.tensor(op, "x", x)
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must not be empty beyond dimension 0, got {list(x.shape)}")
    if b is not None:
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"{op}: dim must be within {-x.ndim} .. {x.ndim - 1} for x {list(x.shape)}, got {dim}")
        dim %= x.ndim
        _check.tensor(op, "b", b)
        if list(b.shape) != [x.shape[dim]]:
            raise ValueError(f"{op}: b must be [C] = [{x.shape[dim]}], got {list(b.shape)}")
        _check.same_device(op, x=x, b=b)
    _check.one_of(op, "act", act, list(ACTIVATIONS))
    if clamp is not None and not clamp > 0:
        raise ValueError(f"{op}: clamp must be above 0 or None, got {clamp}")
    settings = Activated(act, *resolve(act, alpha, gain), clamp)
    chosen = backends.choose(op, backend, _BACKENDS, x.device, x.dtype)
    return _Plan(chosen == "reference", dim, settings, _check.accumulate_dtype(x.dtype))


def _fallback(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> Tensor:
    y = reference.bias_act(x, b, dim=dim, act=act, alpha=alpha, gain=gain, clamp=clamp)
    return torch.empty_like(x).copy_(y)


def _fake(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx, inputs, output) -> None:
    x, b, ctx.dim, *settings = inputs
    ctx.act = Activated(*settings)
    ctx.bias_dtype = None if b is None else b.dtype
    if ctx.act.linear:
        return
    from_output = ctx.act.known_from_output(has_residual=False)
    ctx.save_for_backward(*((output, None, None) if from_output else (None, x, b)))


def _before_activation(ctx, x: Tensor, b: Tensor | None) -> Tensor:
    if b is None:
        return x
    return x.to(b.dtype) + b.reshape([-1 if i == ctx.dim else 1 for i in range(x.ndim)])


def _backward(ctx, grad_y: Tensor):
    y, x, b = ctx.saved_tensors or (None, None, None)
    g = ctx.act.cotangent(grad_y, y, lambda: _before_activation(ctx, x, b))
    grad_b = None
    if ctx.needs_input_grad[1]:
        others = [i for i in range(g.ndim) if i != ctx.dim]
        # Of no dimension at all, torch's sum is the sum over every one.
        grad_b = g.sum(others, dtype=ctx.bias_dtype) if others else g.to(ctx.bias_dtype)
    return g if ctx.needs_input_grad[0] else None, grad_b, None, None, None, None, None


_op = define(
    "bias_act",
    "(Tensor x, Tensor? b, int dim, str act, float alpha, float gain, float? clamp) -> Tensor",
    fallback=_fallback,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="bias_act.bias_act",
)
