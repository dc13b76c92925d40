"""``fastgan::activation_grad``: the backward of the epilogue's activation, itself differentiable once more.

    order 1:  g ⊙ d clamp(gain · act(z), ±clamp) / dz
    order 2:  g ⊙ the derivative of that factor along ``ref``

``ref`` is the activation's result y (``from_output``) where act' follows from it, else z. The derivative along y
instead of z is what
autograd needs: it continues through y's own graph, and nothing is divided by act'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops._library import define
from fastgan.reference.activation import ACTIVATIONS

_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def _slope(act: str, t: Tensor, x: Tensor, alpha: float) -> Tensor:
    """act'(x) from t = act(x)."""
    one = torch.ones_like(t)
    match act:
        case "relu":
            return (t > 0).to(t.dtype)
        case "lrelu":
            return torch.where(t > 0, one, alpha)
        case "tanh":
            return 1 - t * t
        case "sigmoid":
            return t * (1 - t)
        case "elu":
            return torch.where(t > 0, one, t + 1)
        case "selu":
            return torch.where(t > 0, _SELU_SCALE * one, t + _SELU_SCALE * _SELU_ALPHA)
        case "softplus":
            return -torch.expm1(-t)
        case "swish":
            s = torch.sigmoid(x)
            return s + x * s * (1 - s)
    return one


def _bend(act: str, t: Tensor, x: Tensor) -> Tensor:
    """d act'/dt; for swish act''(x)."""
    match act:
        case "tanh":
            return -2 * t
        case "sigmoid":
            return 1 - 2 * t
        case "elu" | "selu":
            return (t <= 0).to(t.dtype)
        case "softplus":
            return torch.exp(-t)
        case "swish":
            s = torch.sigmoid(x)
            return s * (1 - s) * (2 + x * (1 - 2 * s))
    return torch.zeros_like(t)


def _fallback(
    g: Tensor, ref: Tensor, act: str, alpha: float, gain: float, clamp: float | None, from_output: bool, order: int
) -> Tensor:
    wide = ref.to(torch.float64 if ref.dtype == torch.float64 else torch.float32)
    t = wide / gain if from_output else ACTIVATIONS[act].function(wide, alpha)
    slope = _slope(act, t, wide, alpha)
    if order == 1:
        factor = gain * slope
    elif from_output:
        factor = _bend(act, t, wide)
    else:
        factor = gain * _bend(act, t, wide) * (1 if act == "swish" else slope)
    result = g.to(wide.dtype) * factor
    if clamp is not None:
        result = torch.where((t * gain).abs() >= clamp, torch.zeros_like(result), result)
    return torch.empty_like(ref, dtype=g.dtype).copy_(result)


def _fake(
    g: Tensor, ref: Tensor, act: str, alpha: float, gain: float, clamp: float | None, from_output: bool, order: int
) -> Tensor:
    return torch.empty_like(ref, dtype=g.dtype)


def _setup_context(ctx, inputs, output) -> None:
    g, ref, *ctx.settings, ctx.order = inputs
    ctx.save_for_backward(g, ref)


def _backward(ctx, grad: Tensor):
    g, ref = ctx.saved_tensors
    act = ctx.settings[0]
    grad_g = activation_grad(grad, ref, *ctx.settings, ctx.order) if ctx.needs_input_grad[0] else None
    grad_ref = None
    if ctx.needs_input_grad[1] and ACTIVATIONS[act].curved:
        if ctx.order == 2:
            raise NotImplementedError(
                f"activation_grad: the third derivative of {act} has no kernel; "
                "backend='reference' differentiates without end"
            )
        grad_ref = activation_grad(grad * g, ref, *ctx.settings, 2).to(ref.dtype)
    return grad_g, grad_ref, None, None, None, None, None, None


activation_grad = define(
    "activation_grad",
    "(Tensor g, Tensor ref, str act, float alpha, float gain, float? clamp, bool from_output, int order) -> Tensor",
    fallback=_fallback,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="activation_grad.activation_grad",
)
