"""patch_loss against the losses that people write: three 30×30 maps of a multi-scale PatchGAN, real and fake."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, parametrize, run
from fastgan import ops
from fastgan.profile.latency import Work

MAPS, SIDE = 3, 30


def make_inputs(batch: int) -> list[list[Tensor]]:
    return [[torch.randn(batch, 1, SIDE, SIDE, requires_grad=True) for _ in range(MAPS)] for _ in range(2)]


def eager_bce(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    loss = torch.zeros(())
    for x in real:
        loss = loss + F.binary_cross_entropy_with_logits(x, torch.ones_like(x))
    for x in fake:
        loss = loss + F.binary_cross_entropy_with_logits(x, torch.zeros_like(x))
    return loss


def eager_hinge(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    loss = torch.zeros(())
    for x in real:
        loss = loss + F.relu(1.0 - x).mean()
    for x in fake:
        loss = loss + F.relu(1.0 + x).mean()
    return loss


def eager_relativistic(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    loss = torch.zeros(())
    for r, f in zip(real, fake, strict=True):
        loss = loss + F.softplus(f - r).mean()
    return loss


def fused(**options: Any) -> Any:
    return lambda real, fake: ops.patch_loss(real, fake, over_maps="sum", **options).loss


def make_case(name: str, batch: int, eager: Any, double: bool, **options: Any) -> Case:
    # Forward reads both sides, backward writes both gradients.
    size = 2 * MAPS * batch * SIDE * SIDE * 4
    work = {"fwd": Work(bytes=size), "bwd": Work(bytes=size), "fwd+bwd": Work(bytes=2 * size)}
    candidates = {"eager": eager, "fused": fused(**options)}
    return Case("patch_loss", f"{name}, batch {batch}", lambda: make_inputs(batch), candidates, work, double)


CASES = [
    *[make_case("vanilla", batch, eager_bce, True) for batch in (1, 4)],
    make_case("hinge", 4, eager_hinge, False, mode="hinge"),
    make_case("relativistic", 4, eager_relativistic, True, paired=True),
]


@parametrize(CASES)
def bench_patch_loss(benchmark: Any, case: Case, candidate: str, which: str) -> None:
    run(benchmark, case, candidate, which)
