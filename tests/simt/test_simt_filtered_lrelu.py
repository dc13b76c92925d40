"""filtered_lrelu's CUDA kernels, thread by thread on the CPU, behind the op's own autograd: values, signs, gradients of
both orders against float64, schedules, what is read and written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simt_build
import torch
from helpers import FLOORS, max_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgan.ops import _filtered_lrelu
from fastgan.reference import filtered_lrelu as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE, STRIP22, STRIP42, STRIP24 = range(4)
ONE_SCHEDULE = (("random", 3),)


def kernels() -> Any:
    return simt_build.load(Path(__file__).parent / "filtered_lrelu.cpp")


def array(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.int32:
        return tensor.numpy().view(np.uint32)
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def constant(tensor: Tensor | None) -> np.ndarray:
    """An array that nobody may write; none is empty."""
    result = array(torch.empty(0) if tensor is None else tensor.detach()).view()
    result.flags.writeable = False
    return result


class Launches:
    """The kernels as the implementation of the two ops on the CPU, as filtered_lrelu.cu is on the GPU.

    Attributes:
        schedules: of the launches to come.
        blocks: that strips are shortened for; 1 makes them as long as they can be.
        traffic: of the launches so far, bytes read and written of (x, fu, fd, bias or signs, y, then the signs).
    """

    def __init__(self) -> None:
        self.schedules, self.blocks = simt_build.SCHEDULES, 1
        self.traffic: list[list[tuple[int, int]]] = []

    def run(self, kind: str, x: Tensor, *arguments: Any) -> None:
        name = f"{kind}_{str(x.dtype).removeprefix('torch.')}"
        traffic = simt_build.run(kernels(), name, constant(x), *arguments, self.blocks, schedules=self.schedules)
        self.traffic.append([entry[1:] for entry in traffic])

    def forward(self, x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter, record):
        y, signs = _filtered_lrelu._forward_fake(
            x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter, record
        )
        # What the kernels leave out shows.
        y.fill_(math.nan), signs.fill_(0x55555555)
        arguments = [list(x.shape), constant(fu), shape(fu), constant(fd), shape(fd), constant(b), up, down]
        settings = [list(padding), flip_filter, gain, slope, math.inf if clamp is None else clamp]
        self.run("forward", x, *arguments, *settings, array(y), array(signs))
        return y, signs

    def replay(self, x, fu, fd, signs, up, down, along, across, flip_filter, fir_gain, gain, slope):
        y = x.new_full((*x.shape[:2], across[3], along[3]), math.nan)
        arguments = [list(x.shape), constant(fu), shape(fu), constant(fd), shape(fd), constant(signs), up, down]
        settings = [list(along), list(across), flip_filter, fir_gain, gain, slope]
        self.run("replay", x, *arguments, *settings, array(y))
        return y


def shape(f: Tensor | None) -> list[int]:
    return [] if f is None else list(f.shape)


@pytest.fixture
def launches() -> Iterator[Launches]:
    launches = Launches()
    with torch.library._scoped_library("fastgan", "IMPL") as library:
        library.impl("filtered_lrelu_cuda", launches.forward, "CPU")
        library.impl("filtered_lrelu_replay_cuda", launches.replay, "CPU")
        yield launches


def lowpass(taps: int) -> Tensor:
    """No symmetry, so that a filter the wrong way round shows."""
    f = torch.hann_window(taps + 2, periodic=False)[1:-1] * torch.linspace(0.5, 1.5, taps)
    return f / f.sum()


def results(function: Any, x: Tensor, b: Tensor | None, seed: int) -> list[Tensor]:
    """Value, the gradients of x and b for a random cotangent, and the gradient of the first one's for that."""
    generator = torch.Generator().manual_seed(seed)
    x = x.detach().requires_grad_()
    leaves = [x] if b is None else [x, b.detach().requires_grad_()]
    y = function(*leaves)
    g, v = (torch.randn(t.shape, generator=generator).to(x.dtype) for t in (y, x))
    g = g.requires_grad_()
    grads = torch.autograd.grad(y, leaves, g, create_graph=True)
    (second,) = torch.autograd.grad(grads[0], g, v)
    return [t.detach() for t in (y, *grads, second)]


def check(x: Tensor, fu: Tensor | None, fd: Tensor | None, b: Tensor | None, **options: Any) -> None:
    """The rule of accuracy for values and gradients of both orders, and every sign."""
    options = {"gain": 1.3, "slope": 0.2, "clamp": 0.6, "flip_filter": False} | options

    def plain(x: Tensor, b: Tensor | None = None) -> Tensor:
        filters = (None if f is None else f.to(b.dtype if b is not None else torch.float64) for f in (fu, fd))
        return reference.filtered_lrelu(x, *filters, b, **options)

    def op(x: Tensor, b: Tensor | None = None) -> Tensor:
        return _filtered_lrelu.filtered_lrelu(x, fu, fd, b, **options)

    fused, eager = results(op, x, b, 1), results(plain, x, b, 1)
    exact = results(plain, x.double(), None if b is None else b.double(), 1)
    names = ("value", "gradient of x", *(["gradient of b"] if b is not None else []), "second order")
    for name, got, other, want in zip(names, fused, eager, exact, strict=True):
        assert got.isfinite().all(), name
        allowed = 2 * max_error(other, want) + FLOORS[got.dtype]
        if name == "gradient of b":  # a sum of rounded gradients, here; eager torch's are not
            allowed += FLOORS[x.dtype]
        assert got.dtype == other.dtype
        assert max_error(got, want) <= allowed, (name, max_error(got, want), allowed)
    check_signs(x, fu, fd, b, options)


def check_signs(x: Tensor, fu: Tensor | None, fd: Tensor | None, b: Tensor | None, options: dict[str, Any]) -> None:
    names = ("up", "down", "padding", "gain", "slope", "clamp", "flip_filter")
    arguments = [options[name] for name in names]
    y, signs = _filtered_lrelu._forward_op(x, fu, fd, b, *arguments, True)
    doubles = [None if t is None else t.double() for t in (x, fu, fd, b)]
    assert torch.equal(signs, _filtered_lrelu._forward_fallback(*doubles, *arguments, True)[1])
    unrecorded, none = _filtered_lrelu._forward_op(x, fu, fd, b, *arguments, False)
    assert torch.equal(unrecorded, y)
    assert none.numel() == 0


def image(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(dtype)


def plan(x: Tensor, fu: Tensor | None, fd: Tensor | None, up: int, down: int, padding: tuple) -> list[int]:
    result = np.zeros(4, np.int64)
    simt_build.run(kernels(), "plan", list(x.shape), shape(fu), shape(fd), up, down, list(padding), result)
    return result.tolist()


# Two strips side by side, more than one below each other, for every position of a tap in x and in y.
STRIPS = [
    (2, (9, 8, 10, 11), (1, 1, 32, 60), torch.float32),
    (2, (10, 9, 9, 10), (1, 2, 25, 33), torch.float16),
    (2, (-3, 20, 31, -5), (2, 1, 17, 20), torch.bfloat16),
    (4, (20, 21, 19, 20), (1, 1, 20, 32), torch.float16),
    (4, (21, 22, 22, 21), (1, 2, 9, 11), torch.float32),
    (4, (19, 19, 20, 21), (1, 1, 12, 10), torch.bfloat16),
    (4, (22, 23, 21, 18), (1, 1, 10, 12), torch.float32),
]


@pytest.mark.parametrize(("up", "padding", "sizes", "dtype"), STRIPS)
def test_the_filters_of_stylegan3(launches: Launches, up: int, padding: tuple, sizes: tuple, dtype) -> None:
    x, b, fu, fd = image(*sizes, dtype=dtype), image(sizes[1]), lowpass(6 * up), lowpass(12)
    assert plan(x, fu, fd, up, 2, padding)[0] == (STRIP22 if up == 2 else STRIP42)
    launches.schedules, launches.blocks = simt_build.SCHEDULES[1:3], 1 if sizes[1] == 2 else 1024
    check(x, fu, fd, b, up=up, down=2, padding=padding, flip_filter=sizes[1] == 2)
