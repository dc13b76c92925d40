"""What an optimised graph is made of: a few fused layers as functions, beside torch's own operators.

Each function is a node's target in a :class:`torch.fx.Graph`, takes keyword arguments only and computes what its node
means with the library's ops, on any device: so a graph can be run as it is after every pass. ``fastgan.infer.plan``
turns the same nodes into steps that write into planned memory. Tensors are as the kernels take them: scales [N or 1,
C], noise [N or 1, 1, H, W], its strength 0-dim, bias [C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastgan.backends import precision_in_force
from fastgan.reference.epilogue import Epilogue, apply_epilogue

# The epilogue that does nothing, by argument.
PLAIN: dict[str, Any] = {"act": "linear", "alpha": 0.0, "gain": 1.0, "clamp": None, "residual_gain": 1.0}
TENSORS = ("noise", "noise_strength", "bias", "residual")
GEOMETRY = ("stride", "padding", "output_padding", "dilation", "transposed", "groups", "reflect")


def convolution(
    *,
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    output_padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    transposed: bool = False,
    groups: int = 1,
    reflect: bool = False,
    rectify: bool = False,
    act: str = "linear",
    alpha: float = 0.0,
    gain: float = 1.0,
    clamp: float | None = None,
    residual_gain: float = 1.0,
) -> Tensor:
    """``ops.scaled_conv2d``; with ``reflect``, the padding is x's mirror image; with ``rectify``, negative values
    of in_scale * x count as 0."""
    if rectify:
        x, in_scale = F.relu(x if in_scale is None else x * in_scale[:, :, None, None]), None
    if reflect:
        x, padding = F.pad(x, [padding[1], padding[1], padding[0], padding[0]], "reflect"), (0, 0)
    tensors = (x, weight, in_scale, out_scale, noise, noise_strength, bias, residual)
    geometry = (stride, padding, output_padding, dilation, transposed, groups, precision_in_force())
    return torch.ops.fastgan.scaled_conv2d(*tensors, *geometry, act, alpha, gain, clamp, residual_gain, False)[0]


def quantized_convolution(
    *,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    step: float,
    low: int,
    high: int,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """``convolution`` of in_scale * x rounded to multiples of ``step``, low ... high of them, with weight_scale [C_out]
    times a weight in int8."""
    scaled = x if in_scale is None else x * in_scale[:, :, None, None]
    whole = torch.clamp(torch.round(scaled * (1 / step)), low, high)
    factor = step * weight_scale[None] if out_scale is None else step * weight_scale * out_scale
    return convolution(x=whole, weight=weight.to(x.dtype), out_scale=factor, **others)


def pointwise(
    *,
    x: Tensor,
    out_scale: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "linear",
    alpha: float = 0.0,
    gain: float = 1.0,
    clamp: float | None = None,
    residual_gain: float = 1.0,
) -> Tensor:
    """An epilogue alone: activations, sums, factors and shifts per channel."""
    scaled = x if out_scale is None else x * out_scale[:, :, None, None]
    return apply_epilogue(
        scaled, Epilogue(noise, noise_strength, bias, act, alpha, gain, clamp, residual, residual_gain)
    )


def instance_norm(
    *,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "linear",
    alpha: float = 0.0,
    gain: float = 1.0,
    residual_gain: float = 1.0,
) -> Tensor:
    """``ops.norm_act`` over each channel of each sample, and an image added."""
    y = torch.ops.fastgan.norm_act(x, weight, bias, None, None, False, eps, act, alpha, gain)[0]
    return y if residual is None else y + residual_gain * residual


def fir(
    *,
    x: Tensor,
    f: Tensor | None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    up: Sequence[int] = (1, 1),
    down: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    flip_filter: bool = False,
    fir_gain: float = 1.0,
    act: str = "linear",
    alpha: float = 0.0,
    gain: float = 1.0,
    clamp: float | None = None,
    residual_gain: float = 1.0,
) -> Tensor:
    """``ops.upfirdn2d``."""
    tensors = (x, f, noise, noise_strength, bias, residual)
    settings = (up, down, padding, flip_filter, fir_gain, act, alpha, gain, clamp, residual_gain)
    return torch.ops.fastgan.upfirdn2d(*tensors, *settings)


def dense_block(
    *,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    act: str,
    alpha: float,
    gain: float,
    residual_scale: float,
) -> Tensor:
    """``ops.dense_block``."""
    return torch.ops.fastgan.dense_block(x, weights, biases, act, alpha, gain, residual_scale, precision_in_force())


def concatenate(*, tensors: Sequence[Tensor]) -> Tensor:
    """Channels of several images side by side."""
    return torch.cat(list(tensors), 1)


def pad(*, x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """``F.pad`` by (left, right, top, bottom); mode zeros, reflect or replicate."""
    return F.pad(x, list(padding), {"zeros": "constant"}.get(mode, mode))


FUSED = {
    target.__name__: target
    for target in (convolution, quantized_convolution, pointwise, instance_norm, fir, dense_block, concatenate, pad)
}
_HAS_EPILOGUE = (convolution, quantized_convolution, pointwise, fir)


def is_a(node: Any, *targets: Any) -> bool:
    """Whether a graph's node, or anything else, is a call of one of these."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def epilogue_of(node: fx.Node) -> dict[str, Any] | None:
    """The epilogue's arguments of a node that has one, defaults included."""
    if not is_a(node, *_HAS_EPILOGUE):
        return None
    settings = {name: node.kwargs.get(name, default) for name, default in PLAIN.items()}
    return {**settings, **{name: node.kwargs.get(name) for name in TENSORS}}


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def storage_of(node: fx.Node) -> str:
    """How a convolution's weight is stored: "fp32", or "bf16" for values that bfloat16 has."""
    return node.kwargs["weight"].meta.get("storage", "fp32")


def is_image(node: Any) -> bool:
    """Whether a node's value is float32 [N, C, H, W]."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim == 4


def name_of(node: fx.Node) -> str:
    """For people: where in the model the node comes from, and what it is."""
    return node.meta.get("origin", node.name)
