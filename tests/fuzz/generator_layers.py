"""The layers that drawn generators are made of, by name: each a module of one or several images [N, C, H, W].

``LAYERS[name](shapes, **options)`` builds one for inputs of these shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from fastgan.nn import EqualizedConv2d, FusedBiasAct, ResidualDenseBlock
from fastgan.ops import Epilogue, norm_act, scaled_conv2d, upfirdn2d

Shapes = Sequence[Sequence[int]]
LAYERS: dict[str, Callable[..., nn.Module]] = {}
ACTIVATIONS: dict[str, Callable[[bool], nn.Module]] = {
    "relu": lambda inplace: nn.ReLU(inplace),
    "lrelu": lambda inplace: nn.LeakyReLU(0.2, inplace),
    "lrelu of slope 1.5": lambda inplace: nn.LeakyReLU(1.5, inplace),
    "lrelu of slope -0.5": lambda inplace: nn.LeakyReLU(-0.5, inplace),
    "tanh": lambda inplace: nn.Tanh(),
    "sigmoid": lambda inplace: nn.Sigmoid(),
    "elu": lambda inplace: nn.ELU(inplace=inplace),
    "elu of 0.5": lambda inplace: nn.ELU(0.5, inplace),
    "selu": lambda inplace: nn.SELU(inplace),
    "silu": lambda inplace: nn.SiLU(inplace),
    "softplus": lambda inplace: nn.Softplus(),
    "softplus of beta 2": lambda inplace: nn.Softplus(2.0),
    "softplus up to 1": lambda inplace: nn.Softplus(threshold=1.0),
    "hardtanh": lambda inplace: nn.Hardtanh(inplace=inplace),
    "relu6": lambda inplace: nn.ReLU6(inplace),
    "gelu": lambda inplace: nn.GELU(),
}


class Function(nn.Module):
    """A function of images as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *images: Tensor) -> Tensor:
        return self.function(*images)


def layer(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    LAYERS[builder.__name__] = builder
    return builder


# ----------------------------------------------------------------------------------------------------------------------
# Convolutions


@layer
def conv(shapes: Shapes, c_out: int, kernel: Any, padding: Any = 0, **options: Any) -> nn.Module:
    """``options`` are nn.Conv2d's; c_out is for each of its groups."""
    groups = options.pop("groups", 1)
    return nn.Conv2d(shapes[0][1], groups * c_out, kernel, padding=padding, groups=groups, **options)


@layer
def deconv(shapes: Shapes, c_out: int, kernel: Any, padding: Any = 0, **options: Any) -> nn.Module:
    groups = options.pop("groups", 1)
    return nn.ConvTranspose2d(shapes[0][1], groups * c_out, kernel, padding=padding, groups=groups, **options)


@layer
def spectral_conv(shapes: Shapes, c_out: int, kernel: int) -> nn.Module:
    return spectral_norm(nn.Conv2d(shapes[0][1], c_out, kernel, padding=kernel // 2))


class _Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


@layer
def equalised_conv(shapes: Shapes, c_out: int, kernel: int, ours: bool) -> nn.Module:
    """A learning rate of 1/√fan_in, as others write it or as ours."""
    c_in = shapes[0][1]
    if ours:
        return EqualizedConv2d(c_in, c_out, kernel)
    plain = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
    parametrize.register_parametrization(plain, "weight", _Scaled((c_in * kernel * kernel) ** -0.5))
    return plain


class _Styled(nn.Module):
    """``ops.scaled_conv2d`` with styles that it makes of the image, and an epilogue."""

    def __init__(self, c_in: int, c_out: int, kernel: int, act: str, residual: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c_out, c_in, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(c_out))
        self.kernel, self.act, self.residual = kernel, act, residual

    def forward(self, x: Tensor) -> Tensor:
        style = 1.0 + torch.tanh(x.mean((2, 3)))
        residual = x if self.residual and x.shape[1] == self.weight.shape[0] else None
        epilogue = Epilogue(bias=self.bias, act=self.act, residual=residual, residual_gain=0.7)
        return scaled_conv2d(x, self.weight, in_scale=style, padding=self.kernel // 2, epilogue=epilogue)


@layer
def styled_conv(shapes: Shapes, c_out: int, kernel: int, act: str, residual: bool) -> nn.Module:
    return _Styled(shapes[0][1], c_out, kernel, act, residual)


# ----------------------------------------------------------------------------------------------------------------------
# Norms, activations, factors and sums


@layer
def batch_norm(shapes: Shapes, affine: bool = True, tracked: bool = True) -> nn.Module:
    return nn.BatchNorm2d(shapes[0][1], affine=affine, track_running_stats=tracked)


@layer
def instance_norm(shapes: Shapes, affine: bool = False, tracked: bool = False) -> nn.Module:
    return nn.InstanceNorm2d(shapes[0][1], affine=affine, track_running_stats=tracked)


@layer
def fused_norm(shapes: Shapes, act: str) -> nn.Module:
    return Function(lambda x: norm_act(x, act=act, gain=0.8))


@layer
def activation(shapes: Shapes, name: str, inplace: bool = False) -> nn.Module:
    return ACTIVATIONS[name](inplace)


@layer
def prelu(shapes: Shapes, per_channel: bool) -> nn.Module:
    return nn.PReLU(shapes[0][1] if per_channel else 1)


@layer
def clamp(shapes: Shapes, low: float | None, high: float | None) -> nn.Module:
    return Function(lambda x: x.clamp(low, high))


@layer
def bias_act(shapes: Shapes, act: str) -> nn.Module:
    return FusedBiasAct(shapes[0][1], act=act)


@layer
def number(shapes: Shapes, operation: str, value: float, inplace: bool = False) -> nn.Module:
    """x · v, x / v, x + v, x − v, v − x, or the first in place."""
    if inplace:
        return Function({"mul": lambda x: x.mul_(value), "add": lambda x: x.add_(value)}[operation])
    functions = {
        "mul": lambda x: value * x,
        "div": lambda x: x / value,
        "add": lambda x: x + value,
        "sub": lambda x: x - value,
        "rsub": lambda x: value - x,
    }
    return Function(functions[operation])


class _WithBuffer(nn.Module):
    """A factor or shift that is a buffer: [1, C, 1, 1], [C, 1, 1], [1] or [], positive."""

    def __init__(self, shape: Sequence[int], operation: str) -> None:
        super().__init__()
        self.operation = operation
        self.register_buffer("values", torch.empty(tuple(shape)))

    def forward(self, x: Tensor) -> Tensor:
        if self.operation == "swapped":
            return self.values - x
        return getattr(torch, self.operation)(x, self.values)


@layer
def buffer(shapes: Shapes, form: str, operation: str) -> nn.Module:
    n, c, h, w = shapes[0]
    forms = {"1C11": (1, c, 1, 1), "C11": (c, 1, 1), "1": (1,), "": (), "1111": (1, 1, 1, 1), "HW": (h, w)}
    return _WithBuffer({**forms, "1CHW": (1, c, h, w), "NCHW": (n, c, h, w)}[form], operation)


@layer
def two(shapes: Shapes, operation: str, alpha: float = 1.0) -> nn.Module:
    """Of two images of a shape."""
    if operation == "mul":
        return Function(torch.mul)
    return Function(lambda x, y: getattr(torch, operation)(x, y, alpha=alpha))


@layer
def two_in_place(shapes: Shapes) -> nn.Module:
    return Function(lambda x, y: x.add_(y, alpha=0.5))


# ----------------------------------------------------------------------------------------------------------------------
# What moves values


@layer
def pad(shapes: Shapes, kind: str, padding: tuple[int, ...]) -> nn.Module:
    modules = {"zeros": nn.ZeroPad2d, "reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}
    if kind in modules:
        return modules[kind](padding)
    if kind == "one":
        return nn.ConstantPad2d(padding, 1.0)
    return Function(lambda x: F.pad(x, padding, mode=kind.removeprefix("F.")))


@layer
def up(shapes: Shapes, mode: str, factor: Any) -> nn.Module:
    corners = False if mode == "bilinear" else None
    return Function(lambda x: F.interpolate(x, scale_factor=factor, mode=mode, align_corners=corners))


@layer
def filtered(shapes: Shapes, up: int, down: int) -> nn.Module:
    return Function(lambda x: upfirdn2d(x, torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8, up=up, down=down, padding=2))


@layer
def shuffle(shapes: Shapes, factor: int) -> nn.Module:
    return nn.PixelShuffle(factor)


@layer
def unshuffle(shapes: Shapes, factor: int) -> nn.Module:
    return nn.PixelUnshuffle(factor)


@layer
def pool(shapes: Shapes, kind: str) -> nn.Module:
    return nn.AvgPool2d(2) if kind == "average" else nn.MaxPool2d(2)


@layer
def cat(shapes: Shapes, dim: int = 1) -> nn.Module:
    return Function(lambda *images: torch.cat(images, dim))


def _channels_shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "there and back": lambda x: x.flatten(2).view(x.shape),
    "rows": lambda x: (
        x.permute(0, 2, 3, 1)
        .contiguous()
        .view(-1, x.shape[1])
        .tanh()
        .view(x.shape[0], *x.shape[2:], x.shape[1])
        .permute(0, 3, 1, 2)
    ),
    "reshaped rows": lambda x: x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).t().reshape(x.shape),
    "transposed": lambda x: x.transpose(2, 3),
    "turned": lambda x: x.transpose(2, 3).contiguous(),
    "flipped": lambda x: x.flip(3),
    "every other column": lambda x: x[..., ::2],
    "inner rows": lambda x: x[:, :, 1:],
    "first channels": lambda x: x[:, : (x.shape[1] + 1) // 2],
    "last channels": lambda x: x.chunk(2, 1)[-1],
    "shuffled channels": _channels_shuffled,
    "mean expanded": lambda x: x.mean((2, 3), keepdim=True).expand_as(x),
    "first sample": lambda x: x[:1].expand_as(x),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "copy": lambda x: x.clone(),
}


@layer
def move(shapes: Shapes, how: str) -> nn.Module:
    return Function(MOVES[how])


def _first_channel_relu(x: Tensor) -> Tensor:
    x[:, :1].relu_()
    return x


def _first_row_set(x: Tensor) -> Tensor:
    x[:, :, 0] = 0.25
    return x


@layer
def partly_in_place(shapes: Shapes, how: str) -> nn.Module:
    return Function({"relu": _first_channel_relu, "set": _first_row_set}[how])


# ----------------------------------------------------------------------------------------------------------------------
# Blocks


class _Residual(nn.Module):
    def __init__(self, body: nn.Module, gain: float, act: nn.Module) -> None:
        super().__init__()
        self.body, self.gain, self.act = body, gain, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.gain * self.body(x) if self.gain != 1.0 else self.body(x) + x)


@layer
def residual(shapes: Shapes, norm: str, act: str, inplace: bool, mode: str, gain: float, last: str) -> nn.Module:
    c = shapes[0][1]
    norms = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d, "none": lambda c: nn.Identity()}

    def convolution() -> nn.Module:
        return nn.Conv2d(c, c, 3, padding=1, padding_mode=mode, bias=norm == "none")

    body = nn.Sequential(convolution(), norms[norm](c), ACTIVATIONS[act](inplace), convolution(), norms[norm](c))
    return _Residual(body, gain, nn.Identity() if last == "none" else ACTIVATIONS[last](False))


class _Dense(nn.Module):
    """RRDBNet's block, as others write it."""

    def __init__(self, channels: int, growth: int, layers: int, scale: float, bias: bool) -> None:
        super().__init__()
        widths = [growth] * (layers - 1) + [channels]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels + i * growth, width, 3, padding=1, bias=bias) for i, width in enumerate(widths)
        )
        self.act, self.scale = nn.LeakyReLU(0.2, inplace=True), scale

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for convolution in self.convs[:-1]:
            found.append(self.act(convolution(torch.cat(found, 1))))
        return self.convs[-1](torch.cat(found, 1)) * self.scale + x


@layer
def dense(shapes: Shapes, growth: int, layers: int, scale: float, bias: bool, ours: bool) -> nn.Module:
    c = shapes[0][1]
    return ResidualDenseBlock(c, growth) if ours else _Dense(c, growth, layers, scale, bias)
