"""``fastgan::pixel_dot``: Σ over pixels of a ⊙ b, [N, C, H, W] twice -> [N, C]: what the gradient of a scale is made
of."""

from __future__ import annotations

from torch import Tensor

from fastgan.ops._check import accumulate_dtype
from fastgan.ops._library import define


def _fallback(a: Tensor, b: Tensor) -> Tensor:
    wide = accumulate_dtype(a.dtype)
    return (a.to(wide) * b.to(wide)).sum((2, 3))


def _fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[:2], dtype=accumulate_dtype(a.dtype))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    a, b = ctx.saved_tensors
    per_pixel = grad[:, :, None, None]
    grad_a = (b * per_pixel).to(a.dtype) if ctx.needs_input_grad[0] else None
    grad_b = (a * per_pixel).to(b.dtype) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b


pixel_dot = define(
    "pixel_dot",
    "(Tensor a, Tensor b) -> Tensor",
    fallback=_fallback,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="pixel_dot.pixel_dot",
)
