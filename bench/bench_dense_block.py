"""dense_block against the sequence that people write: the block of RRDBNet, 23 x 3 of which are Real-ESRGAN."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import Case, parametrize, run
from fastgan import ops
from fastgan.profile.latency import Work

CHANNELS, GROWTH, LAYERS = 64, 32, 5


def eager(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    features = [x]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        features.append(F.leaky_relu(F.conv2d(torch.cat(features, 1), weight, bias, padding=1), 0.2, inplace=True))
    return F.conv2d(torch.cat(features, 1), weights[-1], biases[-1], padding=1) * 0.2 + x


def eager_channels_last(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    last = {"memory_format": torch.channels_last}
    return eager(x.contiguous(**last), [weight.contiguous(**last) for weight in weights], biases)


def make_inputs(size: int) -> list[Any]:
    outputs = [GROWTH] * (LAYERS - 1) + [CHANNELS]
    weights = [nn.Parameter(torch.randn(o, CHANNELS + i * GROWTH, 3, 3) / 24) for i, o in enumerate(outputs)]
    return [torch.randn(1, CHANNELS, size, size), weights, [nn.Parameter(torch.randn(o)) for o in outputs]]


def make_case(size: int) -> Case:
    pairs = [(CHANNELS + i * GROWTH, CHANNELS if i + 1 == LAYERS else GROWTH) for i in range(LAYERS)]
    products = sum(a * b for a, b in pairs)
    elements = 2 * CHANNELS * size**2 + 9 * products
    return Case(
        "dense_block",
        f"RRDBNet's 64 + 4·32 at {size}²",
        lambda: make_inputs(size),
        {"eager": eager, "eager channels_last": eager_channels_last, "fused": ops.dense_block},
        {"fwd": Work(bytes=4 * elements, flops=2 * 9 * size**2 * products)},
        baselines=("eager", "eager channels_last"),
    )


CASES = [make_case(size) for size in (64, 128)]


@parametrize(CASES)
def bench_dense_block(benchmark: Any, case: Case, candidate: str, which: str) -> None:
    run(benchmark, case, candidate, which)
