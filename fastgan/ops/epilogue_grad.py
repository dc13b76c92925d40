"""``fastgan::epilogue_grad``: the activation's backward together with the sums over pixels that follow from it.

    g = grad_y ⊙ d clamp(gain · act(z), ±clamp) / dz                     [N, C, H, W]
    Σ_p g ⊙ product [N, C]: out_scale's gradient;  Σ_{n, p} g [C]: bias's;  Σ g ⊙ noise []: the noise strength's

One read of the pixels instead of one for each sum. Only the Triton backend has a kernel for it, and only its backward
calls it: on the CPU the parts are ops with kernels of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan.ops._library import define
from fastgan.ops.activation_grad import activation_grad
from fastgan.ops.pixel_dot import pixel_dot
from fastgan.reference.activation import ACTIVATIONS


def _activated(grad: Tensor, ref: Tensor | None, settings: tuple) -> Tensor:
    """``grad`` times the activation's derivative; ``ref`` None for a linear one without clamp."""
    return grad * settings[2] if ref is None else activation_grad(grad, ref, *settings, 1)


def _fallback(grad_y, ref, product, noise, act, alpha, gain, clamp, from_output, want_bias):
    g = _activated(grad_y, ref, (act, alpha, gain, clamp, from_output))
    empty = g.new_empty(0, dtype=torch.float32)
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    return (
        grad_y.new_empty(0) if ref is None and gain == 1.0 else g,
        empty if product is None else pixel_dot(g, product),
        g.sum((0, 2, 3), dtype=wide) if want_bias else empty.clone(),
        empty.clone() if noise is None else (g * noise).sum(dtype=wide),
    )


def _fake(grad_y, ref, product, noise, act, alpha, gain, clamp, from_output, want_bias):
    n, c = grad_y.shape[:2]
    wide = torch.float64 if grad_y.dtype == torch.float64 else torch.float32
    like = grad_y if ref is None else ref
    return (
        grad_y.new_empty(0) if ref is None and gain == 1.0 else torch.empty_like(like, dtype=grad_y.dtype),
        grad_y.new_empty(0 if product is None else (n, c), dtype=wide),
        grad_y.new_empty(c if want_bias else 0, dtype=wide),
        grad_y.new_empty(0 if noise is None else (), dtype=wide),
    )


def _setup_context(ctx, inputs, output) -> None:
    grad_y, ref, product, noise, *settings, _ = inputs
    ctx.settings = tuple(settings)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_y, ref, product, noise)


def _backward(ctx, grad_g: Tensor | None, grad_scale: Tensor | None, grad_bias: Tensor | None, grad_strength):
    grad_y, ref, product, noise = ctx.saved_tensors
    need_y, need_ref, need_product, need_noise = ctx.needs_input_grad[:4]
    total = grad_g if grad_g is not None and grad_g.numel() else None  # the cotangent of g
    for weight, factor in (
        (None if grad_scale is None or product is None else grad_scale[:, :, None, None], product),
        (None if grad_bias is None or not grad_bias.numel() else grad_bias[:, None, None], 1.0),
        (None if grad_strength is None else grad_strength, noise),
    ):
        if weight is not None and factor is not None:
            term = weight * factor
            total = term if total is None else total + term
    grads: list[Tensor | None] = [None] * 4
    if total is not None and (need_y or need_ref):
        total = total.to(grad_y.dtype).expand(grad_y.shape)
        if need_y:
            grads[0] = _activated(total, ref, ctx.settings)
        if need_ref and ref is not None and ACTIVATIONS[ctx.settings[0]].curved:
            grads[1] = activation_grad(total * grad_y, ref, *ctx.settings, 2).to(ref.dtype)
    if need_product and grad_scale is not None:
        g = _activated(grad_y, ref, ctx.settings)
        grads[2] = (g * grad_scale[:, :, None, None]).to(product.dtype)
    if need_noise and grad_strength is not None:
        g = _activated(grad_y, ref, ctx.settings)
        grads[3] = (g.sum(1, keepdim=True, dtype=noise.dtype) * grad_strength).sum_to_size(noise.shape)
    return (*grads, *[None] * 6)


epilogue_grad = define(
    "epilogue_grad",
    "(Tensor grad_y, Tensor? ref, Tensor? product, Tensor? noise, str act, float alpha, float gain, float? clamp,"
    " bool from_output, bool want_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    fallback=_fallback,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable_results=4,
    triton="epilogue_grad.epilogue_grad",
)
