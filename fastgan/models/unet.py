"""Pix2Pix's U-Net generator on fused layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.models._layers import (
    ConvAct,
    UpConvAct,
    conv_norm_act,
    initialise,
    initialise_norm,
    make_norm,
)

_DROPOUT = 0.5


class UNetGenerator(nn.Module):
    """An image-to-image generator: log2(size) strided convolutions down, as many up, a skip connection at each size.

    Going down: leaky ReLU 0.2, convolution 4×4 stride 2, normalisation; going up: ReLU, transposed convolution 4×4
    stride 2, normalisation, dropout in the middle; tanh at the end. Output and state dict are those of the
    ``UnetGenerator`` that the public Pix2Pix and CycleGAN code trains, so its checkpoints load with ``strict=True`` and
    the other way round.

    Each map is activated where it is made: convolution, bias and activation are one call where no normalisation stands
    between them, normalisation and activation are one call elsewhere; a batch norm that evaluates is folded into the
    call of its convolution. A map z on a skip connection is wanted twice, as lrelu(z) by the next convolution and as
    relu(z) by the transposed one; since relu(lrelu(z)) = relu(z), z itself is never kept.

    Args:
        in_channels, out_channels: channels of input and output images.
        width: channels of the outermost level; the deeper ones have 2, 4 and then 8 times as many.
        size: the smallest image side, a power of two from 4 on; there are log2(size) levels, and image sides are
            multiples of it.
        norm: "batch", or "instance" (then without parameters, and the convolutions before it have a bias).
        dropout: whether the levels of 8·width channels, but for the innermost, drop half of what they pass up in
            training.

    Raises:
        ValueError: a size that is no power of two, an unknown norm; in ``forward``, an image of the wrong shape.

    Source: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017, section 6.1
    (architecture) and 6.2 (initial weights N(0, 0.02)).
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        width: int = 64,
        size: int = 256,
        norm: str = "batch",
        *,
        dropout: bool = True,
    ) -> None:
        super().__init__()
        if size < 4 or size & (size - 1):
            raise ValueError(f"UNetGenerator: size must be a power of two from 4 on, got {size}")
        if norm not in ("batch", "instance"):
            raise ValueError(f"UNetGenerator: norm must be one of batch, instance, got {norm!r}")
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("width", width)):
            if value < 1:
                raise ValueError(f"UNetGenerator: {name} must be at least 1, got {value}")
        self.in_channels, self.size = in_channels, size
        levels = size.bit_length() - 1
        widths = [width * min(2**level, 8) for level in range(levels)]
        block = _Innermost(widths[-2], widths[-1], norm)
        for level in range(levels - 2, 0, -1):
            block = _Middle(widths[level - 1], widths[level], norm, block, dropout=dropout and level >= 4)
        self.model = _Outermost(in_channels, widths[0], out_channels, norm, block)
        for module in self.modules():
            if isinstance(module, (ConvAct, UpConvAct)):
                initialise(module.weight, module.bias)
            initialise_norm(module)

    def forward(self, x: Tensor) -> Tensor:
        """Translate images.

        Args:
            x: [N, in_channels, H, W], floating point, usually within −1 .. 1; H and W multiples of ``size``.

        Returns:
            [N, out_channels, H, W] within −1 .. 1.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"UNetGenerator: x must be [N, {self.in_channels}, H, W], got {list(x.shape)}")
        if 0 in x.shape[2:] or x.shape[2] % self.size or x.shape[3] % self.size:
            raise ValueError(f"UNetGenerator: x must have H and W in multiples of {self.size}, got {list(x.shape)}")
        return self.model(x)


class _Outermost(nn.Module):
    """Image -> convolution, lrelu -> inner levels -> transposed convolution, tanh -> image. Keys 0, 1, 3."""

    def __init__(self, in_channels: int, width: int, out_channels: int, norm: str, inner: nn.Module) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "0": ConvAct(in_channels, width, 4, 2, 1, bias=norm == "instance", act="lrelu"),
                "1": inner,
                "3": UpConvAct(2 * width, out_channels, 4, 2, 1, act="tanh"),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        return model["3"](model["1"](model["0"](x)))


class _Middle(nn.Module):
    """lrelu(z) [N, outer, H, W] -> relu of (z, what comes from below) [N, 2·outer, H, W]. Keys 1, 2, 3, 5, 6."""

    def __init__(self, outer: int, width: int, norm: str, inner: nn.Module, *, dropout: bool) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "1": ConvAct(outer, width, 4, 2, 1, bias=norm == "instance"),
                "2": make_norm(norm, width),
                "3": inner,
                "5": UpConvAct(2 * width, outer, 4, 2, 1, bias=norm == "instance"),
                "6": make_norm(norm, outer),
            }
        )
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        y = model["3"](conv_norm_act(model["1"], model["2"], x, "lrelu"))
        y = conv_norm_act(model["5"], model["6"], y, "relu")
        if self.dropout:
            # Pix2Pix drops before its ReLU: the same numbers, as dropping only multiplies by 0 or 2.
            y = F.dropout(y, _DROPOUT, self.training)
        return torch.cat([torch.relu(x), y], 1)


class _Innermost(nn.Module):
    """As :class:`_Middle`, around a bottleneck that is not normalised. Keys 1, 3, 4."""

    def __init__(self, outer: int, width: int, norm: str) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "1": ConvAct(outer, width, 4, 2, 1, bias=norm == "instance", act="relu"),
                "3": UpConvAct(width, outer, 4, 2, 1, bias=norm == "instance"),
                "4": make_norm(norm, outer),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        y = conv_norm_act(model["3"], model["4"], model["1"](x), "relu")
        return torch.cat([torch.relu(x), y], 1)
