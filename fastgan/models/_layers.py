"""What the models share: convolutions and normalisations with a fused activation, initial weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import ops

LRELU_SLOPE = 0.2
# Below this many values per mean torch's layers are faster on two cores than norm_act, whose time is then that of its
# calls; bench/bench_norm_act.py has the shapes around the bounds.
FEW_VALUES = {"batch": 2048, "instance": 256}


def activation(act: str) -> dict[str, Any]:
    """``act`` as the ops' arguments, with the plain gain of 1 that Pix2Pix expects."""
    return {"act": act, "alpha": LRELU_SLOPE if act == "lrelu" else None, "gain": 1.0}


class ConvAct(nn.Conv2d):
    """torch.nn.Conv2d, its arguments and state-dict keys, with the activation fused: y = act(conv(x) + bias), gain 1.

    Args:
        act: linear, relu, lrelu (slope 0.2) or tanh; the others are torch.nn.Conv2d's.
    """

    def __init__(self, *args: Any, act: str = "linear", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, None, self.bias, self.act)

    def convolve(self, x: Tensor, out_scale: Tensor | None, bias: Tensor | None, act: str) -> Tensor:
        """act(out_scale ⊙ conv(x) + bias) with another scale, bias and activation than the layer's own."""
        epilogue = ops.Epilogue(bias=bias, **activation(act))
        return ops.scaled_conv2d(
            x, self.weight, out_scale=out_scale, stride=self.stride, padding=self.padding, epilogue=epilogue
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class UpConvAct(nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d with the activation fused, as :class:`ConvAct`."""

    def __init__(self, *args: Any, act: str = "linear", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, None, self.bias, self.act)

    def convolve(self, x: Tensor, out_scale: Tensor | None, bias: Tensor | None, act: str) -> Tensor:
        """As :meth:`ConvAct.convolve`."""
        epilogue = ops.Epilogue(bias=bias, **activation(act))
        return ops.scaled_conv2d(
            x,
            self.weight,
            out_scale=out_scale,
            stride=self.stride,
            padding=self.padding,
            transposed=True,
            epilogue=epilogue,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


def make_norm(norm: str, channels: int) -> nn.Module:
    """Pix2Pix's normalisations: batch (affine, running statistics) or instance (neither)."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.InstanceNorm2d(channels)


def conv_norm_act(conv: nn.Module, norm: nn.Module, x: Tensor, act: str) -> Tensor:
    """``act(norm(conv(x)))`` in as few passes as the layers allow.

    A batch norm that evaluates is a factor and a shift per channel: then all three are one call. Else the convolution
    is one and normalisation and activation are one, where ``norm`` is torch's own BatchNorm2d or InstanceNorm2d. The
    norms stay torch's layers, so their keys, their type and what others do to them stay too: one that was exchanged
    (for SyncBatchNorm, say) or hooked is called as it is, and the activation follows; a hooked convolution gives its
    own result to the hook. Maps of few values go through torch's layers too, where those are faster.
    """
    if type(norm) not in (nn.BatchNorm2d, nn.InstanceNorm2d) or _hooked(norm):
        return ops.bias_act(norm(conv(x)), **activation(act))
    if type(norm) is nn.InstanceNorm2d:
        if norm.track_running_stats:
            return ops.bias_act(norm(conv(x)), **activation(act))
        y = conv(x)
        if _few_values(y, "instance"):
            return _activate_(norm(y), act)
        return ops.norm_act(y, kind="instance", weight=norm.weight, bias=norm.bias, eps=norm.eps, **activation(act))
    foldable = isinstance(conv, (ConvAct, UpConvAct)) and conv.act == "linear" and not _hooked(conv)
    if foldable and not norm.training and norm.running_mean is not None:
        return conv.convolve(x, *_scale_and_shift(norm, conv.bias), act)
    y = conv(x)
    if _few_values(y, "batch"):
        return _activate_(norm(y), act)
    running = _advance(norm)
    return ops.norm_act(
        y, kind="batch", weight=norm.weight, bias=norm.bias, running=running, eps=norm.eps, **activation(act)
    )


def _few_values(y: Tensor, kind: str) -> bool:
    n, _, height, width = y.shape
    # torch's norms refuse an empty batch, or spoil their running statistics with it.
    return n > 0 and height * width * (n if kind == "batch" else 1) < FEW_VALUES[kind]


def _activate_(y: Tensor, act: str) -> Tensor:
    """Activates a norm's result in its place: no norm's backward reads it."""
    return F.relu(y, inplace=True) if act == "relu" else F.leaky_relu(y, LRELU_SLOPE, inplace=True)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _scale_and_shift(norm: nn.BatchNorm2d, conv_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Batch norm in evaluation, after a convolution with a bias: conv → scale · conv + shift, each [C]."""
    wide = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    mean = norm.running_mean if conv_bias is None else norm.running_mean - conv_bias
    # Few small operations: each costs as much as a thousandth of a layer. Not cached: a version counter misses what is
    # written through .data, as averages of weights often are.
    return scale, -mean * scale if norm.bias is None else torch.addcmul(norm.bias, mean, scale, value=-1)


def _advance(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float] | None:
    """norm_act's ``running`` for one forward of ``norm``; counts the batch as torch does."""
    if norm.running_mean is None:
        return None
    if not norm.training:
        return norm.running_mean, norm.running_var
    if not norm.track_running_stats:
        return None
    norm.num_batches_tracked.add_(1)
    momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    return norm.running_mean, norm.running_var, momentum


@torch.no_grad()
def initialise(weight: Tensor, bias: Tensor | None) -> None:
    """Pix2Pix's initial convolution: weight N(0, 0.02), bias 0."""
    weight.normal_(0.0, 0.02)
    if bias is not None:
        bias.zero_()


@torch.no_grad()
def initialise_norm(norm: nn.Module) -> None:
    """Pix2Pix's initial batch norm: weight N(1, 0.02), bias 0; an instance norm has nothing to set."""
    if isinstance(norm, nn.BatchNorm2d):
        norm.weight.normal_(1.0, 0.02)
        norm.bias.zero_()
