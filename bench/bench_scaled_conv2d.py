"""scaled_conv2d against the sequence that people write: layers of U-Net-256, of the PatchGAN critic and of StyleGAN2.

Batch norm is folded in the U-Net's rows (scale and shift per channel), as in evaluation; the critic's layers carry 1/σ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, parametrize, run
from fastgan import ops
from fastgan.profile.latency import Work

Layer = tuple[int, int, int, int, int, bool]  # C_in, C_out, size of the input, kernel, stride, transposed
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "lrelu": lambda x: F.leaky_relu(x, 0.2),
    "relu": F.relu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


def unet_layers(width: int, size: int) -> list[tuple[Layer, str]]:
    """The convolutions of the U-Net from the image down to one pixel and back, with the activation that follows."""
    levels = size.bit_length() - 1
    widths = [width * min(2**level, 8) for level in range(levels)]
    down = [((3 if i == 0 else widths[i - 1], widths[i], size >> i, 4, 2, False), "lrelu") for i in range(levels)]
    up: list[tuple[Layer, str]] = [((widths[-1], widths[-2], 1, 4, 2, True), "relu")]
    up += [((2 * widths[i], widths[i - 1], size >> (i + 1), 4, 2, True), "relu") for i in range(levels - 2, 0, -1)]
    return [*down, *up, ((2 * widths[0], 3, size // 2, 4, 2, True), "tanh")]


CRITIC: list[tuple[Layer, str]] = [
    ((6, 64, 256, 4, 2, False), "lrelu"),
    ((64, 128, 128, 4, 2, False), "lrelu"),
    ((128, 256, 64, 4, 2, False), "lrelu"),
    ((256, 512, 32, 4, 1, False), "lrelu"),
    ((512, 1, 31, 4, 1, False), "linear"),
]


def work(layer: Layer, batch: int) -> dict[str, Work]:
    """Each activation once in and out, the weights once; two operations per product. Backward has two such products."""
    c_in, c_out, size, kernel, stride, transposed = layer
    out = size * stride if transposed else (size + 2 - kernel) // stride + 1
    pixels = size * size if transposed else out * out
    elements = batch * (c_in * size * size + c_out * out * out) + c_in * c_out * kernel * kernel
    flops = 2 * batch * pixels * c_in * c_out * kernel * kernel
    one, two = Work(bytes=4 * elements, flops=flops), Work(bytes=8 * elements, flops=2 * flops)
    return {"fwd": one, "bwd": two, "fwd+bwd": Work(bytes=12 * elements, flops=3 * flops)}


def make_case(model: str, layer: Layer, act: str, batch: int, *, per_channel: bool) -> Case:
    c_in, c_out, size, kernel, stride, transposed = layer

    def inputs() -> list[Tensor]:
        shape = (c_in, c_out) if transposed else (c_out, c_in)
        weight = torch.randn(*shape, kernel, kernel) / (c_in * kernel * kernel) ** 0.5
        scale = torch.rand(c_out) + 0.5 if per_channel else torch.rand(()) + 0.5
        x, bias = torch.randn(batch, c_in, size, size), torch.randn(c_out)
        return [x.requires_grad_(), weight.requires_grad_(), scale, bias.requires_grad_()]

    def eager(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        # What torch's spectral norm and a folded batch norm do: the weight is scaled, the bias rides along.
        axes = (slice(None),) + (None,) * (2 if transposed else 3)
        weight = weight * (scale[axes] if per_channel else scale)
        convolve = F.conv_transpose2d if transposed else F.conv2d
        return ACTS[act](convolve(x, weight, bias, stride, 1))

    def fused(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        epilogue = ops.Epilogue(bias=bias, act=act, gain=1.0)
        return ops.scaled_conv2d(
            x, weight, None, scale, stride=stride, padding=1, transposed=transposed, epilogue=epilogue
        )

    arrow = "transposed" if transposed else f"stride {stride}"
    name = f"{model} {c_in}→{c_out} at {size}² {kernel}×{kernel} {arrow}, batch {batch}"
    return Case("scaled_conv2d", name, inputs, {"eager": eager, "fused": fused}, work(layer, batch))


def make_stylegan(channels: int, size: int) -> Case:
    """A synthesis layer: style, demodulation, noise, bias, leaky ReLU; eager in its faster, scaled-activation form."""

    def inputs() -> list[Any]:
        x, weight = torch.randn(1, channels, size, size), torch.randn(channels, channels, 3, 3)
        style, demodulation = torch.rand(1, channels) + 0.5, torch.rand(1, channels) / (3 * channels**0.5)
        return [x.requires_grad_(), weight.requires_grad_(), style, demodulation, torch.randn(size, size)]

    def eager(x: Tensor, weight: Tensor, style: Tensor, demodulation: Tensor, noise: Tensor) -> Tensor:
        y = F.conv2d(x * style[:, :, None, None], weight, padding=1) * demodulation[:, :, None, None]
        return F.leaky_relu(y + noise * 0.1, 0.2) * 2**0.5

    def fused(x: Tensor, weight: Tensor, style: Tensor, demodulation: Tensor, noise: Tensor) -> Tensor:
        epilogue = ops.Epilogue(noise=noise, noise_strength=0.1, act="lrelu")
        return ops.scaled_conv2d(x, weight, style, demodulation, padding=1, epilogue=epilogue)

    found = work((channels, channels, size, 3, 1, False), 1)
    name = f"StyleGAN2 {channels}→{channels} at {size}² 3×3, batch 1"
    return Case("scaled_conv2d", name, inputs, {"eager": eager, "fused": fused}, found)


CASES = [
    *[make_case("U-Net", layer, act, 1, per_channel=True) for layer, act in unet_layers(64, 256)],
    *[make_case("critic", layer, act, 1, per_channel=False) for layer, act in CRITIC],
    *[make_stylegan(channels, size) for channels, size in ((512, 64), (256, 128), (128, 256))],
]


@parametrize(CASES)
def bench_scaled_conv2d(benchmark: Any, case: Case, candidate: str, which: str) -> None:
    run(benchmark, case, candidate, which)
