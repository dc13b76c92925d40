"""feature_matching_loss against F.l1_loss and F.mse_loss over four maps, 37 MB a side; the real side is detached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, parametrize, run
from fastgan import ops
from fastgan.profile.latency import Work

SHAPES = [(1, 64, 256, 256), (1, 128, 128, 128), (1, 256, 64, 64), (1, 512, 62, 62)]
BYTES = 4 * sum(n * c * h * w for n, c, h, w in SHAPES)


def make_inputs(layout: torch.memory_format) -> list[list[Tensor]]:
    fake = [torch.randn(s).contiguous(memory_format=layout).requires_grad_() for s in SHAPES]
    return [fake, [torch.randn(s).contiguous(memory_format=layout) for s in SHAPES]]


def eager(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    return lambda fake, real: torch.stack([loss(f, r.detach()) for f, r in zip(fake, real, strict=True)]).sum()


def make_case(kind: str, loss: Callable[..., Tensor], layout: str) -> Case:
    # Forward reads both sides. Backward writes the gradient; l1 reads two bits a value, l2 both sides again.
    backward = BYTES * (1 + 1 / 16 if kind == "l1" else 3)
    work = {
        "fwd": Work(bytes=2 * BYTES),
        "bwd": Work(bytes=backward),
        "fwd+bwd": Work(bytes=2 * BYTES + backward + (BYTES / 16 if kind == "l1" else 0)),
    }
    candidates = {"eager": eager(loss), "fused": lambda f, r: ops.feature_matching_loss(f, r, kind=kind)}
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    name = f"{kind}, four maps" + (", channels_last" if layout == "channels_last" else "")
    return Case("feature_matching_loss", name, lambda: make_inputs(memory_format), candidates, work, layout=layout)


CASES = [
    make_case("l1", F.l1_loss, "contiguous"),
    make_case("l1", F.l1_loss, "channels_last"),
    make_case("l2", F.mse_loss, "contiguous"),
]


@parametrize(CASES)
def bench_feature_matching_loss(benchmark: Any, case: Case, candidate: str, which: str) -> None:
    run(benchmark, case, candidate, which)
