"""pixel_norm against the sequence that people write: latents, and a layer of Progressive GAN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, parametrize, run
from fastgan import ops
from fastgan.profile.latency import Work


def eager(x: Tensor) -> Tensor:
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def make_case(shape: tuple[int, ...], *, channels_last: bool = False) -> Case:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def inputs() -> list[Tensor]:
        return [torch.randn(shape).contiguous(memory_format=layout).requires_grad_()]

    size = 4 * torch.Size(shape).numel()
    work = {"fwd": Work(bytes=2 * size), "bwd": Work(bytes=3 * size), "fwd+bwd": Work(bytes=5 * size)}
    name = f"{'×'.join(map(str, shape))}{' channels_last' if channels_last else ''}"
    candidates = {"eager": eager, "fused": ops.pixel_norm}
    return Case(
        "pixel_norm", name, inputs, candidates, work, double=True, layout="NHWC" if channels_last else "contiguous"
    )


CASES = [
    make_case((32, 512)),
    make_case((4, 256, 64, 64)),
    make_case((4, 256, 64, 64), channels_last=True),
]


@parametrize(CASES)
def bench_pixel_norm(benchmark: Any, case: Case, candidate: str, which: str) -> None:
    run(benchmark, case, candidate, which)
