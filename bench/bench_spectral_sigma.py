"""σ of a network's layers, one power iteration: torch's parametrisation, its hook, spectral_sigma, and one plain read.

    pytest bench/bench_spectral_sigma.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

torch's row is what its layers do at one access of ``.weight`` in training: two products for u and v, one for σ, W/σ.
Ours leaves W/σ out, since 1/σ is a scale behind the convolution. ``read`` sums the weights: what touching them once
costs on this machine.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as hook_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

from fastgan.ops import spectral_sigma

PATCHGAN = ((6, 64), (64, 128), (128, 256), (256, 512), (512, 1))
NETWORKS: dict[str, Callable[[], list[nn.Module]]] = {
    "twelve 512x512x3x3": lambda: [nn.Conv2d(512, 512, 3) for _ in range(12)],
    "PatchGAN critic": lambda: [nn.Conv2d(a, b, 4) for a, b in PATCHGAN],
    "four transposed 512x256x4x4": lambda: [nn.ConvTranspose2d(512, 256, 4) for _ in range(4)],
    "five tiny 8x6x3x3": lambda: [nn.Conv2d(6, 8, 3) for _ in range(5)],
}
Forward = Callable[[], list[Tensor]]


def torch_parametrization(layers: list[nn.Module]) -> Forward:
    layers = [spectral_norm(layer) for layer in layers]
    return lambda: [layer.weight for layer in layers]


def torch_hook(layers: list[nn.Module]) -> Forward:
    layers = [hook_spectral_norm(layer) for layer in layers]
    hooks = [next(iter(layer._forward_pre_hooks.values())) for layer in layers]
    return lambda: [hook.compute_weight(layer, True) for hook, layer in zip(hooks, layers, strict=True)]


def fused(layers: list[nn.Module], order: str, memory_format: torch.memory_format) -> Forward:
    weights = [layer.weight.detach().contiguous(memory_format=memory_format).requires_grad_() for layer in layers]
    dims = [int(isinstance(layer, nn.ConvTranspose2d)) for layer in layers]
    us = [F.normalize(torch.randn(w.shape[d]), dim=0) for w, d in zip(weights, dims, strict=True)]
    vs = [F.normalize(torch.randn(w.numel() // w.shape[d]), dim=0) for w, d in zip(weights, dims, strict=True)]
    return lambda: [spectral_sigma(weights, us, vs, order=order, dims=dims)]


def read(layers: list[nn.Module]) -> Forward:
    return lambda: [layer.weight.detach().sum() for layer in layers]


CANDIDATES: dict[str, Callable[[list[nn.Module]], Forward]] = {
    "torch parametrization": torch_parametrization,
    "spectral_sigma": lambda layers: fused(layers, "parametrization", torch.contiguous_format),
    "spectral_sigma channels_last": lambda layers: fused(layers, "parametrization", torch.channels_last),
    "torch hook": torch_hook,
    "spectral_sigma hook": lambda layers: fused(layers, "hook", torch.contiguous_format),
    "read": read,
}


DIRECTIONS = {candidate: ["forward", "forward and backward"] for candidate in CANDIDATES} | {"read": ["forward"]}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("candidate", "direction"), [(c, d) for c, ds in DIRECTIONS.items() for d in ds])
def bench_sigma(benchmark, network: str, candidate: str, direction: str) -> None:
    torch.manual_seed(0)
    forward = CANDIDATES[candidate](NETWORKS[network]())

    def forward_and_backward() -> None:
        torch.autograd.backward([result.sum() for result in forward()])

    benchmark.group = f"{network}, {direction}"
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    benchmark.pedantic(
        forward if direction == "forward" else forward_and_backward, rounds=15, warmup_rounds=2, iterations=1
    )
