"""Finds the fused layers of a model, each with its plain counterpart and the shape that it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLAIN_ACTIVATIONS: Mapping[str, Callable[[nn.Module, Any, Tensor], Tensor]] = {
    "relu": lambda layer, inputs, output: F.relu(output, inplace=True),
    "lrelu": lambda layer, inputs, output: F.leaky_relu(output, 0.2, inplace=True),
    "tanh": lambda layer, inputs, output: torch.tanh(output),
}


@dataclass
class LayerPair:
    """One distinct fused layer: ``names`` of all layers of its kind and shapes, and what to compare on ``shape``."""

    title: str
    shape: tuple[int, ...]
    plain: nn.Module = field(repr=False)
    fused: nn.Module = field(repr=False)
    names: list[str] = field(default_factory=list)


def _is_convolution(layer: nn.Module) -> bool:
    # Not by its weight: reading a spectral-normalised layer's weight in training advances its power iteration.
    return hasattr(layer, "kernel_size")


def _title(fused: nn.Module, plain: nn.Module, shape: tuple[int, ...]) -> str:
    """What a reader needs to recognise the layer: kind, kernel, stride, channels, the size that comes in."""
    kind = "transposed " if isinstance(plain, nn.ConvTranspose2d) else ""
    spectral = "spectral norm, " if hasattr(plain, "parametrizations") else ""
    kernel = f"{plain.kernel_size[0]}×{plain.kernel_size[1]}"
    act = getattr(fused, "act", "linear")
    channels = f"{plain.in_channels}→{plain.out_channels}"
    tail = "" if act == "linear" else f", {act}"
    return f"{spectral}{kind}{kernel} stride {plain.stride[0]}{tail}, {channels} at {shape[-2]}×{shape[-1]}"


def _plain_layer(fused: nn.Module, convolution: nn.Module) -> nn.Module:
    """A copy of the plain convolution, followed by the activation that the fused layer includes.

    The activation is a hook and not a second layer, so that the parameters keep the names of the fused ones.
    """
    layer = deepcopy(convolution)
    act = getattr(fused, "act", "linear")
    if act != "linear":
        layer.register_forward_hook(PLAIN_ACTIVATIONS[act])
    return layer


def pair_layers(fused: nn.Module, plain: nn.Module, example: Tensor) -> list[LayerPair]:
    """The distinct convolution layers of ``fused``, in the order in which they run.

    Args:
        fused: a model of fastgan.models.
        plain: its twin of :mod:`fastgan.profile.plain`, whose submodules have the same names.
        example: an input of both; it is run once through ``fused`` to see the shapes.
    """
    pairs: dict[tuple, LayerPair] = {}

    def note(name: str):
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            shape = tuple(inputs[0].shape)
            counterpart = _plain_layer(layer, plain.get_submodule(name))
            key = (_title(layer, counterpart, shape), shape)
            pair = pairs.setdefault(key, LayerPair(key[0], shape, counterpart, layer))
            pair.names.append(name)

        return hook

    handles = [
        layer.register_forward_hook(note(name)) for name, layer in fused.named_modules() if _is_convolution(layer)
    ]
    training = fused.training
    try:
        with torch.no_grad():
            fused.eval()(example)
    finally:
        fused.train(training)
        for handle in handles:
            handle.remove()
    return list(pairs.values())
