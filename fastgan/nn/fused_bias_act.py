"""Bias, activation and gain as one layer, as StyleGAN puts them after a convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgan import ops


class FusedBiasAct(nn.Module):
    """y = clamp(factor · act(x + bias), ±clamp), one call of :func:`fastgan.ops.bias_act`.

    With its defaults it is the ``FusedLeakyReLU`` of the public PyTorch ports of StyleGAN2: same arguments in the same
    order, same state dict (``bias`` [C], zeros at the start).

    Args:
        channels: size of dimension 1 of the input.
        bias: whether there is a bias.
        negative_slope: slope of lrelu below zero.
        scale: the factor where act is lrelu and gain is None.
        act: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish.
        gain: the factor; None means ``scale`` for lrelu, √2 for relu and swish, 1 for the others.
        clamp: bound on the magnitude, > 0; None for none.

    Raises:
        ValueError: fewer than one channel; in ``forward``, what :func:`fastgan.ops.bias_act` raises.

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, section 2.
    """

    def __init__(
        self,
        channels: int,
        bias: bool = True,
        negative_slope: float = 0.2,
        scale: float = 2.0**0.5,
        *,
        act: str = "lrelu",
        gain: float | None = None,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"FusedBiasAct: channels must be at least 1, got {channels}")
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if bias else None)
        self.negative_slope, self.scale = negative_slope, scale
        self.act, self.gain, self.clamp = act, gain, clamp

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> the same shape and dtype."""
        gain = self.scale if self.gain is None and self.act == "lrelu" else self.gain
        return ops.bias_act(x, self.bias, act=self.act, alpha=self.negative_slope, gain=gain, clamp=self.clamp)

    def extra_repr(self) -> str:
        channels = None if self.bias is None else len(self.bias)
        return f"bias={channels}, act={self.act}, gain={self.gain}, scale={self.scale}, clamp={self.clamp}"
