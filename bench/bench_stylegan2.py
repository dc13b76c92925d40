"""StyleGAN2's synthesis network against the two forms in which people run it in plain torch, constant noise.

``eager`` is the default of the public code: a weight per sample, modulated and demodulated, in one convolution with as
many groups as samples. ``scaled`` modulates the activations and demodulates the result around one ordinary convolution,
the public code's other form. Both resample by inserting zeros and a depthwise convolution, as it does without its CUDA
extension. All three read the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, parametrize, run
from fastgan.models import StyleGAN2Generator
from fastgan.models.stylegan2_generator import SynthesisNetwork
from fastgan.nn import ModulatedConv2d, ToRGB
from fastgan.profile.latency import Work

Convolve = Callable[..., Tensor]


def fir(x: Tensor, taps: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Pad and filter with gain 4, what follows an insertion of zeros."""
    channels = x.shape[1]
    return F.conv2d(F.pad(x, sides), (taps * 4).expand(channels, 1, *taps.shape), groups=channels)


def grouped(x: Tensor, weight: Tensor, style: Tensor, *, up: bool, demodulate: bool = True) -> Tensor:
    """A weight per sample."""
    n, i, h, w = x.shape
    own = weight[None] * style[:, None, :, None, None]
    if demodulate:
        own = own * torch.rsqrt(own.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    x = x.reshape(1, n * i, h, w)
    if up:
        y = F.conv_transpose2d(x, own.transpose(1, 2).flatten(0, 1), stride=2, groups=n)
    else:
        y = F.conv2d(x, own.flatten(0, 1), padding=weight.shape[2] // 2, groups=n)
    return y.reshape(n, -1, *y.shape[2:])


def scaled(x: Tensor, weight: Tensor, style: Tensor, *, up: bool, demodulate: bool = True) -> Tensor:
    """One weight for all, scales around it; the sum over the weight is per sample, as there."""
    x = x * style[:, :, None, None]
    if up:
        y = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    else:
        y = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    if not demodulate:
        return y
    own = weight[None] * style[:, None, :, None, None]
    return y * torch.rsqrt(own.square().sum((2, 3, 4)) + 1e-8)[:, :, None, None]


def affine(layer: ModulatedConv2d | ToRGB, w: Tensor) -> Tensor:
    return F.linear(w, layer.affine.weight * layer.style_dim**-0.5, layer.affine.bias)


def plain_layer(layer: ModulatedConv2d, x: Tensor, w: Tensor, convolve: Convolve) -> Tensor:
    y = convolve(x, layer.weight, affine(layer, w), up=layer.up > 1)
    if layer.up > 1:
        y = fir(y, layer.resample_filter, (1, 1, 1, 1))
    y = y + layer.noise_const * layer.noise_strength + layer.bias[:, None, None]
    return (F.leaky_relu(y, 0.2) * 2**0.5).clamp(-layer.clamp, layer.clamp)


def plain_synthesis(ws: Tensor, parameters: list[Tensor], network: SynthesisNetwork, *, convolve: Convolve) -> Tensor:
    styles, x, image = ws.unbind(1), network.b4.const.expand(len(ws), -1, -1, -1), None
    for i, size in enumerate(network.sizes):
        block = getattr(network, f"b{size}")
        if i > 0:
            x = plain_layer(block.conv0, x, styles[2 * i - 1], convolve)
            n, c, h, w = image.shape
            image = F.pad(image.reshape(n, c, h, 1, w, 1), (0, 1, 0, 0, 0, 1)).reshape(n, c, 2 * h, 2 * w)
            image = fir(image, block.resample_filter, (2, 1, 2, 1))
        x = plain_layer(block.conv1, x, styles[2 * i], convolve)
        style = affine(block.torgb, styles[2 * i + 1]) * x.shape[1] ** -0.5
        rgb = convolve(x, block.torgb.weight, style, up=False, demodulate=False) + block.torgb.bias[:, None, None]
        rgb = rgb.clamp(-block.torgb.clamp, block.torgb.clamp)
        image = rgb if image is None else image + rgb
    return image


def fused_synthesis(ws: Tensor, parameters: list[Tensor], network: SynthesisNetwork) -> Tensor:
    return network(ws, "const")


def convolutions(network: SynthesisNetwork) -> Iterator[tuple[ModulatedConv2d | ToRGB, int, int]]:
    """Each layer with the side of its input and of its result."""
    for size in network.sizes:
        for layer in getattr(network, f"b{size}").children():
            if isinstance(layer, (ModulatedConv2d, ToRGB)):
                up = getattr(layer, "up", 1)
                yield layer, size // up, size


def work(network: SynthesisNetwork, batch: int) -> dict[str, Work]:
    """Each convolution's input and result once, each weight once; two operations per product, filters left out."""
    elements = sum(p.numel() for p in network.parameters())
    flops = 0
    for layer, side, result in convolutions(network):
        elements += batch * (layer.in_channels * side**2 + layer.out_channels * result**2)
        flops += 2 * batch * side**2 * layer.weight.numel()
    return {
        "fwd": Work(bytes=4 * elements, flops=flops),
        "bwd": Work(bytes=8 * elements, flops=2 * flops),
        "fwd+bwd": Work(bytes=12 * elements, flops=3 * flops),
    }


def make_case(resolution: int, channel_base: int, batch: int, channel_max: int = 512) -> Case:
    def generator() -> StyleGAN2Generator:
        return StyleGAN2Generator(512, 0, 512, resolution, 3, channel_base, channel_max)

    def inputs() -> list[Any]:
        model = generator()
        with torch.no_grad():
            # At their start, noise strengths and biases are zero.
            for parameter in model.synthesis.parameters():
                if parameter.ndim < 2:
                    parameter.normal_(std=0.1)
            ws = model.eval().mapping(torch.randn(batch, 512))
        return [ws.clone().requires_grad_(), list(model.synthesis.parameters()), model.synthesis]

    with torch.device("meta"):
        found = work(generator().synthesis, batch)
    name = f"synthesis {resolution}², channel_base {channel_base}, batch {batch}"
    candidates = {
        "eager": partial(plain_synthesis, convolve=grouped),
        "scaled": partial(plain_synthesis, convolve=scaled),
        "fused": fused_synthesis,
    }
    return Case("stylegan2", name, inputs, candidates, found)


CASES = [
    make_case(64, 1024, 4, channel_max=64),
    make_case(256, 16384, 1),
    make_case(512, 32768, 1),
]


@parametrize(CASES)
def bench_stylegan2(benchmark: Any, case: Case, candidate: str, which: str) -> None:
    run(benchmark, case, candidate, which)
