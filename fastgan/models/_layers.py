"""What the models share: convolutions and normalisations with a fused activation, initial weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgan import ops

LRELU_SLOPE = 0.2


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
        epilogue = ops.Epilogue(bias=self.bias, **activation(self.act))
        return ops.scaled_conv2d(x, self.weight, stride=self.stride, padding=self.padding, epilogue=epilogue)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class UpConvAct(nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d with the activation fused, as :class:`ConvAct`."""

    def __init__(self, *args: Any, act: str = "linear", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        epilogue = ops.Epilogue(bias=self.bias, **activation(self.act))
        return ops.scaled_conv2d(
            x, self.weight, stride=self.stride, padding=self.padding, transposed=True, epilogue=epilogue
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


def make_norm(norm: str, channels: int) -> nn.Module:
    """Pix2Pix's normalisations: batch (affine, running statistics) or instance (neither)."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.InstanceNorm2d(channels)


def norm_then_act(norm: nn.Module, x: Tensor, act: str) -> Tensor:
    """``act(norm(x))``, fused where ``norm`` is torch's own BatchNorm2d or InstanceNorm2d without hooks.

    The layers stay torch's, so their keys, their type and what others do to them stay too: one that was exchanged (for
    SyncBatchNorm, say) or hooked is called as it is, and the activation follows.
    """
    hooked = bool(norm._forward_hooks or norm._forward_pre_hooks)
    if type(norm) is nn.BatchNorm2d and not hooked:
        running = _advance(norm)
        return ops.norm_act(
            x, kind="batch", weight=norm.weight, bias=norm.bias, running=running, eps=norm.eps, **activation(act)
        )
    if type(norm) is nn.InstanceNorm2d and not hooked and not norm.track_running_stats:
        return ops.norm_act(x, kind="instance", weight=norm.weight, bias=norm.bias, eps=norm.eps, **activation(act))
    return ops.bias_act(norm(x), **activation(act))


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
