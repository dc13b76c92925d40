"""What follows the linear part of a convolution, in one description that every backend fuses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastgan.reference.activation import activate


@dataclass
class Epilogue:
    """y = clamp(gain · act(c + noise · noise_strength + bias), ±clamp) + residual_gain · residual.

    Attributes:
        noise: [H, W] or [N, 1, H, W], the output's spatial size; None for none.
        noise_strength: float, or a tensor with one element; a factor on noise; None means 1.
        bias: [C_out].
        act: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish.
        alpha: slope of lrelu below zero; None means 0.2.
        gain: factor on the activation; None means the activation's default (√2 for relu, lrelu, swish; else 1). Pix2Pix
            passes 1.
        clamp: bound on the activation's magnitude after gain, > 0; None for none. The gradient is zero where it holds.
        residual: [N, C_out, H, W], the output's dtype; added after the clamp.
        residual_gain: factor on residual.
    """

    noise: Tensor | None = None
    noise_strength: float | Tensor | None = None
    bias: Tensor | None = None
    act: str = "linear"
    alpha: float | None = None
    gain: float | None = None
    clamp: float | None = None
    residual: Tensor | None = None
    residual_gain: float = 1.0


def apply_epilogue(c: Tensor, epilogue: Epilogue) -> Tensor:
    """Apply ``epilogue`` to ``c`` [N, C, H, W] in ``c``'s dtype; plain torch, differentiable without end."""
    if epilogue.noise is not None:
        noise = epilogue.noise.to(c.dtype)
        strength = 1.0 if epilogue.noise_strength is None else epilogue.noise_strength
        c = c + noise * (strength.to(c.dtype).reshape(()) if isinstance(strength, Tensor) else strength)
    if epilogue.bias is not None:
        c = c + epilogue.bias.to(c.dtype)[:, None, None]
    y = activate(c, epilogue.act, epilogue.alpha, epilogue.gain, epilogue.clamp)
    if epilogue.residual is not None:
        y = y + epilogue.residual.to(c.dtype) * epilogue.residual_gain
    return y
