"""upfirdn2d against depthwise convolutions of torch: where StyleGAN2 filters, with what follows in the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, parametrize, run
from fastgan import ops
from fastgan.profile.latency import Work

FIR = torch.outer(*[torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8] * 2)


def depthwise(x: Tensor, gain: float) -> Tensor:
    return (FIR * gain).expand(x.shape[1], 1, 4, 4)


def behind_convolution(x: Tensor, noise: Tensor, bias: Tensor) -> Tensor:
    y = F.conv2d(F.pad(x, (1, 1, 1, 1)), depthwise(x, 4.0), groups=x.shape[1])
    return (F.leaky_relu(y + noise * 0.1 + bias[:, None, None], 0.2) * 2**0.5).clamp(-256, 256)


def fused_behind_convolution(x: Tensor, noise: Tensor, bias: Tensor) -> Tensor:
    epilogue = ops.Epilogue(noise=noise, noise_strength=0.1, bias=bias, act="lrelu", clamp=256.0)
    return ops.upfirdn2d(x, FIR, padding=1, gain=4, epilogue=epilogue)


def up(x: Tensor) -> Tensor:
    return F.conv_transpose2d(x, depthwise(x, 4.0), stride=2, padding=1, groups=x.shape[1])


def down(x: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), depthwise(x, 1.0), stride=2, groups=x.shape[1])


PLACES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], float]] = {
    # eager, fused, pixels of the result per pixel of x
    "behind up = 2": (behind_convolution, fused_behind_convolution, 1.0),
    "skip up": (up, lambda x: ops.upfirdn2d(x, FIR, up=2, padding=(2, 1), gain=4), 4.0),
    "skip down": (down, lambda x: ops.upfirdn2d(x, FIR, down=2, padding=1), 0.25),
}


def make_case(place: str, channels: int, size: int, *, channels_last: bool = False) -> Case:
    eager, fused, ratio = PLACES[place]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with_epilogue = place == "behind up = 2"

    def inputs() -> list[Tensor]:
        x = torch.randn(1, channels, size, size).contiguous(memory_format=layout).requires_grad_()
        rest = [torch.randn(size - 1, size - 1), torch.randn(channels, requires_grad=True)]
        return [x, *rest] if with_epilogue else [x]

    # Each pixel once in and out; four taps along each axis, per pixel of the result, of which up = 2 meets half.
    elements = channels * size * size
    one = Work(bytes=4 * elements * (1 + ratio), flops=2 * 8 * elements * max(1.0, ratio / 2))
    backward = Work(bytes=one.bytes + (8 * elements if with_epilogue else 0), flops=one.flops)
    both = Work(bytes=one.bytes + backward.bytes, flops=one.flops + backward.flops)
    work = {"fwd": one, "bwd": backward, "fwd+bwd": both}
    name = f"{place} {channels} at {size}²{' channels_last' if channels_last else ''}"
    return Case(
        "upfirdn2d",
        name,
        inputs,
        {"eager": eager, "fused": fused},
        work,
        layout="NHWC" if channels_last else "contiguous",
    )


CASES = [
    make_case("behind up = 2", 512, 17),
    *[make_case("behind up = 2", 256, 65, channels_last=flag) for flag in (False, True)],
    *[make_case("behind up = 2", 64, 257, channels_last=flag) for flag in (False, True)],
    make_case("skip up", 3, 128),
    *[make_case("skip down", 128, 128, channels_last=flag) for flag in (False, True)],
]


@parametrize(CASES)
def bench_upfirdn2d(benchmark: Any, case: Case, candidate: str, which: str) -> None:
    run(benchmark, case, candidate, which)
