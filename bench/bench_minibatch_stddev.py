"""minibatch_stddev against the sequence that people write, where StyleGAN2's critic has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, parametrize, run
from fastgan import ops
from fastgan.profile.latency import Work


def eager(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    groups = x.reshape(4, n // 4, c, h, w)
    deviation = ((groups - groups.mean(0)).square().mean(0) + 1e-8).sqrt().mean((1, 2, 3))
    return torch.cat([x, deviation.repeat(4)[:, None, None, None].expand(-1, 1, h, w)], 1)


def make_case(batch: int) -> Case:
    size = 4 * batch * 512 * 16
    # Forward reads x and writes it; backward reads x and the cotangent and writes one.
    work = {"fwd": Work(bytes=2 * size), "bwd": Work(bytes=3 * size), "fwd+bwd": Work(bytes=5 * size)}
    return Case(
        "minibatch_stddev",
        f"512 at 4², batch {batch}",
        lambda: [torch.randn(batch, 512, 4, 4, requires_grad=True)],
        {"eager": eager, "fused": ops.minibatch_stddev},
        work,
        double=True,
    )


CASES = [make_case(batch) for batch in (4, 32)]


@parametrize(CASES)
def bench_minibatch_stddev(benchmark: Any, case: Case, candidate: str, which: str) -> None:
    run(benchmark, case, candidate, which)
