"""norm_act against torch's normalisation and in-place activation: the maps of U-Net-256 and of the PatchGAN critic."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, parametrize, run
from fastgan import ops
from fastgan.profile.latency import Work


def make_case(
    model: str, kind: str, act: str, shape: tuple[int, ...], *, channels_last: bool = False, double: bool = False
) -> Case:
    """Batch norm has weight, bias and running statistics, instance norm has none, as in Pix2Pix."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batch = kind == "batch"

    def inputs() -> list[Any]:
        x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
        weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
        running = torch.zeros(shape[1]), torch.ones(shape[1])
        return [x, weight.requires_grad_(), bias.requires_grad_(), *running] if batch else [x]

    def eager(x: Tensor, weight: Any = None, bias: Any = None, mean: Any = None, var: Any = None) -> Tensor:
        z = F.batch_norm(x, mean, var, weight, bias, True) if batch else F.instance_norm(x)
        return F.leaky_relu(z, 0.2, inplace=True) if act == "lrelu" else F.relu(z, inplace=True)

    def fused(x: Tensor, weight: Any = None, bias: Any = None, mean: Any = None, var: Any = None) -> Tensor:
        running = (mean, var, 0.1) if batch else None
        return ops.norm_act(x, kind=kind, weight=weight, bias=bias, running=running, act=act)

    # Forward reads x and writes y (what it reads again of a group is in the cache); backward reads the cotangent and x
    # and writes a gradient.
    size = 4 * torch.Size(shape).numel()
    work = {"fwd": Work(bytes=2 * size), "bwd": Work(bytes=3 * size), "fwd+bwd": Work(bytes=5 * size)}
    name = f"{model} {kind} {act} {'×'.join(map(str, shape))}{' channels_last' if channels_last else ''}"
    candidates = {"eager": eager, "fused": fused}
    return Case(
        "norm_act", name, inputs, candidates, work, double=double, layout="NHWC" if channels_last else "contiguous"
    )


# Channels and side of the maps that are normalised, from the outermost on.
UNET = [(128, 64), (256, 32), (512, 16), (512, 8), (512, 4), (512, 2)]
CRITIC = [(128, 64), (256, 32), (512, 31)]

CASES = [
    make_case("U-Net", "batch", "relu", (4, 64, 128, 128)),
    *[make_case("U-Net", "batch", "lrelu", (4, channels, side, side)) for channels, side in UNET],
    make_case("U-Net", "instance", "relu", (4, 64, 128, 128)),
    *[make_case("U-Net", "instance", "lrelu", (1, channels, side, side)) for channels, side in UNET],
    *[make_case("critic", "instance", "lrelu", (8, channels, side, side), double=True) for channels, side in CRITIC],
    make_case("critic", "instance", "lrelu", (8, 128, 64, 64), channels_last=True, double=True),
    make_case("U-Net", "batch", "lrelu", (4, 128, 64, 64), channels_last=True),
]


@parametrize(CASES)
def bench_norm_act(benchmark: Any, case: Case, candidate: str, which: str) -> None:
    run(benchmark, case, candidate, which)
