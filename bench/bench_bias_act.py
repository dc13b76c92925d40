"""bias_act against the sequence that people write: StyleGAN2's mapping network and layers of its critic."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, parametrize, run
from fastgan import ops
from fastgan.profile.latency import Work


def make_case(shape: tuple[int, ...], act: str, *, channels_last: bool = False) -> Case:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def inputs() -> list[Tensor]:
        x = torch.randn(shape).contiguous(memory_format=layout)
        return [x.requires_grad_(), torch.randn(shape[1], requires_grad=True)]

    def eager(x: Tensor, b: Tensor) -> Tensor:
        z = x + b.reshape(-1, *[1] * (x.ndim - 2))
        return (F.leaky_relu(z, 0.2) if act == "lrelu" else F.silu(z)) * 2**0.5

    def fused(x: Tensor, b: Tensor) -> Tensor:
        return ops.bias_act(x, b, act=act)

    # Forward reads x and writes y; backward reads the cotangent and what the slope follows from, and writes one.
    size = 4 * torch.Size(shape).numel()
    work = {"fwd": Work(bytes=2 * size), "bwd": Work(bytes=3 * size), "fwd+bwd": Work(bytes=5 * size)}
    name = f"{act} {'×'.join(map(str, shape))}{' channels_last' if channels_last else ''}"
    candidates = {"eager": eager, "fused": fused}
    return Case(
        "bias_act", name, inputs, candidates, work, double=True, layout="NHWC" if channels_last else "contiguous"
    )


CASES = [
    make_case((32, 512), "lrelu"),
    make_case((4, 128, 128, 128), "lrelu"),
    make_case((4, 128, 128, 128), "lrelu", channels_last=True),
    make_case((4, 128, 128, 128), "swish"),
]


@parametrize(CASES)
def bench_bias_act(benchmark: Any, case: Case, candidate: str, which: str) -> None:
    run(benchmark, case, candidate, which)
