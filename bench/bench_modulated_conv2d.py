"""modulated_conv2d against the two ways in which people write it: a weight per sample in one grouped convolution, and
scaled activations around one convolution; layers of StyleGAN2, and its scales alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, parametrize, run
from fastgan import ops
from fastgan.ops.demodulation import demodulation
from fastgan.profile.latency import Work

FIR = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
SQUARE = torch.outer(FIR, FIR)


def finish(y: Tensor, noise: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(y + noise * 0.1 + bias[:, None, None], 0.2) * 2**0.5


def filtered(y: Tensor) -> Tensor:
    return F.conv2d(F.pad(y, (1, 1, 1, 1)), (SQUARE * 4).expand(y.shape[1], 1, 4, 4), groups=y.shape[1])


def grouped(x: Tensor, weight: Tensor, style: Tensor, noise: Tensor, bias: Tensor, up: int) -> Tensor:
    """A weight per sample."""
    n, i, h, w = x.shape
    own = weight * style[:, None, :, None, None]
    own = own * torch.rsqrt(own.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    if up == 1:
        y = F.conv2d(x.reshape(1, n * i, h, w), own.flatten(0, 1), padding=1, groups=n)
        return finish(y.reshape(n, -1, h, w), noise, bias)
    own = own.transpose(1, 2).reshape(n * i, -1, 3, 3)
    y = F.conv_transpose2d(x.reshape(1, n * i, h, w), own, stride=2, groups=n)
    return finish(filtered(y.reshape(n, -1, 2 * h + 1, 2 * w + 1)), noise, bias)


def scaled(x: Tensor, weight: Tensor, style: Tensor, noise: Tensor, bias: Tensor, up: int) -> Tensor:
    """Scaled activations."""
    d = torch.rsqrt(style.square() @ weight.square().sum((2, 3)).t() + 1e-8)[:, :, None, None]
    x = x * style[:, :, None, None]
    if up == 1:
        return finish(F.conv2d(x, weight, padding=1) * d, noise, bias)
    return finish(filtered(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2) * d), noise, bias)


def fused(x: Tensor, weight: Tensor, style: Tensor, noise: Tensor, bias: Tensor, up: int) -> Tensor:
    epilogue = ops.Epilogue(noise=noise, noise_strength=0.1, bias=bias, act="lrelu")
    return ops.modulated_conv2d(x, weight, style, up=up, padding=1, resample_filter=FIR, epilogue=epilogue)


def make_layer(c_in: int, c_out: int, size: int, up: int, batch: int) -> Case:
    def inputs() -> list[Any]:
        x, weight = torch.randn(batch, c_in, size, size), torch.randn(c_out, c_in, 3, 3)
        style, bias = torch.randn(batch, c_in) + 1, torch.zeros(c_out)
        leaves = [t.requires_grad_() for t in (x, weight, style)]
        return [*leaves, torch.randn(size * up, size * up), bias.requires_grad_(), up]

    out = size * up
    elements = batch * (c_in * size * size + c_out * out * out) + 9 * c_in * c_out
    flops = 2 * 9 * batch * size * size * c_in * c_out
    work = {
        "fwd": Work(bytes=4 * elements, flops=flops),
        "bwd": Work(bytes=8 * elements, flops=2 * flops),
        "fwd+bwd": Work(bytes=12 * elements, flops=3 * flops),
    }
    name = f"{c_in}→{c_out} at {size}² up {up}, batch {batch}"
    candidates = {"eager": grouped, "scaled activations": scaled, "fused": fused}
    return Case("modulated_conv2d", name, inputs, candidates, work)


def make_scales(channels: int, batch: int) -> Case:
    """The demodulation alone."""

    def inputs() -> list[Tensor]:
        return [
            torch.randn(channels, channels, 3, 3, requires_grad=True),
            torch.randn(batch, channels, requires_grad=True),
        ]

    def eager(weight: Tensor, style: Tensor) -> Tensor:
        return torch.rsqrt(style.square() @ weight.square().sum((2, 3)).t() + 1e-8)

    def fused_scales(weight: Tensor, style: Tensor) -> Tensor:
        return demodulation(weight, style, prenormalize="none", eps=1e-8)[1]

    size = 4 * 9 * channels * channels
    work = {"fwd": Work(bytes=size), "bwd": Work(bytes=2 * size), "fwd+bwd": Work(bytes=3 * size)}
    candidates = {"eager": eager, "fused": fused_scales}
    return Case("demodulation", f"{channels}→{channels} 3×3, batch {batch}", inputs, candidates, work, double=True)


CASES = [
    make_layer(512, 512, 32, 1, 1),
    make_layer(256, 256, 64, 1, 4),
    make_layer(512, 512, 16, 2, 1),
    make_layer(128, 64, 128, 2, 1),
    make_scales(512, 8),
]


@parametrize(CASES)
def bench_modulated_conv2d(benchmark: Any, case: Case, candidate: str, which: str) -> None:
    run(benchmark, case, candidate, which)
