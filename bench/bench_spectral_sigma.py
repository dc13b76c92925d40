"""σ of a network's layers in one power iteration: torch's parametrisation, spectral_sigma, and one plain read.

torch's candidate is what its layers do at one access of ``.weight`` in training: two products for u and v, one for σ,
W/σ. Ours leaves W/σ out, since 1/σ is a scale behind the convolution. The candidate ``read`` sums the weights: what
touching them once costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrizations import _SpectralNorm

from bench.cases import Case, parametrize, run
from fastgan.ops import spectral_sigma
from fastgan.profile.latency import Work

Shape = tuple[int, int, int, int]
NETWORKS: dict[str, tuple[list[Shape], int]] = {
    "twelve 512×512×3×3": ([(512, 512, 3, 3)] * 12, 0),
    "PatchGAN critic": ([(64, 6, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)], 0),
    "four transposed 512×256×4×4": ([(512, 256, 4, 4)] * 4, 1),
}


def torch_candidate(shapes: Sequence[Shape], dim: int) -> Callable[..., Tensor]:
    parametrizations = [_SpectralNorm(torch.randn(shape), dim=dim) for shape in shapes]

    def eager(weights: list[Tensor]) -> Tensor:
        # One entry of each W/σ: the result has to be one tensor, and more would be our cost, not torch's.
        normalised = [module(weight) for module, weight in zip(parametrizations, weights, strict=True)]
        return torch.stack([weight[0, 0, 0, 0] for weight in normalised])

    return eager


def fused_candidate(shapes: Sequence[Shape], dim: int, order: str) -> Callable[..., Tensor]:
    us = [F.normalize(torch.randn(shape[dim]), dim=0) for shape in shapes]
    vs = [F.normalize(torch.randn(torch.Size(shape).numel() // shape[dim]), dim=0) for shape in shapes]
    return lambda weights: spectral_sigma(weights, us, vs, order=order, dims=[dim] * len(shapes))


def read(weights: list[Tensor]) -> Tensor:
    return torch.stack([weight.sum() for weight in weights])


def make_case(name: str) -> Case:
    shapes, dim = NETWORKS[name]
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes)
    candidates = {
        "eager": torch_candidate(shapes, dim),
        "fused": fused_candidate(shapes, dim, "parametrization"),
        "fused hook": fused_candidate(shapes, dim, "hook"),
        "read": read,
    }
    # Forward reads every weight once, backward writes every gradient.
    work = {"fwd": Work(bytes=size), "bwd": Work(bytes=size), "fwd+bwd": Work(bytes=2 * size)}
    return Case("spectral_sigma", name, lambda: [[torch.randn(shape, requires_grad=True) for shape in shapes]],
                candidates, work)  # fmt: skip


CASES = [make_case(name) for name in NETWORKS]


@parametrize(CASES)
def bench_spectral_sigma(benchmark: Any, case: Case, candidate: str, which: str) -> None:
    run(benchmark, case, candidate, which)
