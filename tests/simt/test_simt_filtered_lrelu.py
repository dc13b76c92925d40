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
from fastgan.ops.upfirdn2d import filter_size
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
        if name == "gradient of b":
            # A sum that cancels, here of what was rounded: measured against the sum of magnitudes.
            magnitude = exact[1].abs().sum((0, 2, 3)).max() / want.abs().max().clamp_min(1e-30)
            allowed += FLOORS[x.dtype] * float(magnitude)
        assert got.dtype == other.dtype
        assert max_error(got, want) <= allowed, (name, max_error(got, want), allowed)
    check_signs(x, fu, fd, b, options)


def check_signs(x: Tensor, fu: Tensor | None, fd: Tensor | None, b: Tensor | None, options: dict[str, Any]) -> None:
    names = ("up", "down", "padding", "gain", "slope", "clamp", "flip_filter")
    arguments = [options[name] for name in names]
    y, signs = _filtered_lrelu._forward_op(x, fu, fd, b, *arguments, True)
    doubles = [None if t is None else t.double() for t in (x, fu, fd, b)]
    want = _filtered_lrelu._forward_fallback(*doubles, *arguments, True)[1]
    along, across = _filtered_lrelu._axes(x, fu, fd, options["up"], options["down"], options["padding"])
    got, want = (_filtered_lrelu._unpacked(words, across.mid) for words in (signs, want))
    # Where a filter is shorter than its factor, some of z reaches no output.
    (columns, rows), down = filter_size(fd), options["down"]
    used = torch.outer(torch.arange(across.mid) % down < rows, torch.arange(along.mid) % down < columns)
    assert torch.equal(got * used, want * used)
    unrecorded, none = _filtered_lrelu._forward_op(x, fu, fd, b, *arguments, False)
    assert torch.equal(unrecorded, y)
    assert none.numel() == 0


def image(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(dtype)


def plan(x: Tensor, fu: Tensor | None, fd: Tensor | None, up: int, down: int, padding: tuple) -> list[int]:
    result = np.zeros(3, np.int64)
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


def test_any_width_of_load_and_store_gives_the_same(launches: Launches) -> None:
    """Rows of 16, 8, 4 and 2 bytes' alignment; pairs of outputs that may be stored at once, and not."""
    fu, fd, options = lowpass(12), lowpass(12), {"up": 2, "down": 2, "gain": 1.0, "slope": 0.2, "clamp": 0.5}
    launches.schedules = ONE_SCHEDULE
    for dtype in (torch.float32, torch.float16):
        wide = image(1, 1, 6, 32, dtype=dtype)
        for width in (32, 28, 26, 25):
            x = wide[..., :width].contiguous()
            check(x, fu, fd, None, padding=(9, 9, 10, 11), flip_filter=False, **options)


def test_strips_of_any_height_give_the_same_bits(launches: Launches) -> None:
    x, fu, fd, b = image(1, 1, 72, 9), lowpass(12), lowpass(12), image(1)
    options = {"up": 2, "down": 2, "padding": (10,) * 4, "gain": 1.3, "slope": 0.2, "clamp": 0.6, "flip_filter": False}
    launches.schedules, got = ONE_SCHEDULE, []
    for launches.blocks in (1, 2, 1024):
        got.append(results(lambda x, b: _filtered_lrelu.filtered_lrelu(x, fu, fd, b, **options), x, b, 0))
    for other in got[1:]:
        assert all(torch.equal(one, two) for one, two in zip(got[0], other, strict=True))


# Filters and factors of the general kernel: StyleGAN3-R's radial one, none, other sizes, filters shorter than factors.
TILES = [
    (lowpass(12), torch.outer(lowpass(12), lowpass(12)) + 0.01, 2, 2, (9, 10, 11, 8), (1, 1, 24, 9)),
    (lowpass(24), torch.outer(lowpass(12), lowpass(12)) - 0.01, 4, 2, (20, 21, 22, 23), (1, 1, 7, 6)),
    (None, None, 1, 1, (0, 0, 0, 0), (2, 3, 5, 40)),
    (lowpass(12), None, 2, 1, (5, 6, 7, 3), (1, 2, 4, 5)),
    (None, lowpass(3), 3, 5, (2, 9, 4, 1), (1, 1, 9, 14)),
    (lowpass(5), lowpass(2), 2, 4, (1, 2, 2, 2), (1, 2, 21, 70)),
    (image(3, 4), image(2, 5), 1, 3, (-1, 4, 3, -2), (2, 1, 13, 37)),
    (lowpass(2), image(1, 1), 4, 32, (0, 1, 0, 2), (1, 1, 17, 40)),
    (lowpass(6), lowpass(12), 1, 2, (8, 8, 8, 8), (1, 1, 1, 1)),
]


@pytest.mark.parametrize(("fu", "fd", "up", "down", "padding", "sizes"), TILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_filters(launches: Launches, fu, fd, up: int, down: int, padding: tuple, sizes: tuple, dtype) -> None:
    x = image(*sizes, dtype=dtype)
    assert plan(x, fu, fd, up, down, padding)[0] == TILE
    launches.schedules = simt_build.SCHEDULES[1:3] if dtype == torch.float32 else ONE_SCHEDULE
    clamp = None if dtype == torch.float16 else 0.6
    check(x, fu, fd, image(sizes[1]), up=up, down=down, padding=padding, clamp=clamp, flip_filter=up == 1)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_calls(launches: Launches, data: st.DataObject) -> None:
    draw = data.draw
    up, down = (draw(st.integers(1, 5), label=name) for name in ("up", "down"))
    filters = []
    for name, factor in (("fu", up), ("fd", down)):
        kind = draw(st.sampled_from(("none", "separable", "six per factor", "planar")), label=name)
        taps = st.integers(1, 7)
        filters.append(
            {
                "none": lambda: None,
                "separable": lambda taps=taps: image(draw(taps)),
                "six per factor": lambda factor=factor: lowpass(6 * factor),
                "planar": lambda taps=taps: image(draw(taps), draw(taps)),
            }[kind]()
        )
    sizes = [draw(st.integers(1, most)) for most in (2, 3, 12, 30)]
    sides: list[int] = []
    for i in (1, 0):
        reach = sum((1 if f is None else f.shape[-i]) - 1 for f in filters)
        before = draw(st.integers(-min(3, sizes[3 - (1 - i)] * up - 1), 12))
        least = reach + 1 - sizes[3 - (1 - i)] * up - before
        sides += [before, max(draw(st.integers(-3, 12)), least)]
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    options = {"up": up, "down": down, "padding": tuple(sides), "gain": draw(st.sampled_from((1.4, -0.7)))}
    options |= {"clamp": draw(st.sampled_from((None, 0.5))), "slope": draw(st.sampled_from((0.2, 0.0, -1.5)))}
    launches.schedules, launches.blocks = (("forward", 0), ("random", seed)), draw(st.sampled_from((1, 1024)))
    b = image(sizes[1]) if draw(st.booleans()) else None
    check(image(*sizes, dtype=dtype), *filters, b, flip_filter=draw(st.booleans()), **options)


@pytest.mark.parametrize(("fu", "fd"), [(lowpass(12), lowpass(12)), (lowpass(12), torch.outer(lowpass(4), lowpass(4)))])
@pytest.mark.parametrize("clamp", [None, 0.6])
def test_nan_and_infinity_reach_what_they_reach_in_torch(launches: Launches, fu, fd, clamp: float | None) -> None:
    x = image(1, 2, 20, 22)
    x[0, 0, 4, 5], x[0, 1, 7, 20], x[0, 1, 15, 3] = math.nan, math.inf, -math.inf
    options = {"up": 2, "down": 2, "padding": (9, 10, 11, 8), "gain": 1.3, "slope": 0.2, "flip_filter": False}
    options["clamp"] = clamp
    got, want = [], []
    for function, into in ((_filtered_lrelu.filtered_lrelu, got), (reference.filtered_lrelu, want)):
        leaf = x.clone().requires_grad_()
        y = function(leaf, fu, fd, None, **options)
        into += [y.detach(), torch.autograd.grad(y, leaf, torch.ones_like(y))[0]]
    assert got[0].isnan().any()
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize(("up", "down_filter"), [(2, lowpass(12)), (4, lowpass(12)), (2, torch.ones(3, 3) / 9)])
def test_every_byte_once(launches: Launches, up: int, down_filter: Tensor) -> None:
    """An image of one block: x, y and the signs are read or written once, in the op and in its gradient."""
    launches.schedules = ONE_SCHEDULE
    x, b, fu = image(2, 2, 48 // up, 48 // up, dtype=torch.bfloat16), image(2), lowpass(6 * up)
    options = {"up": up, "down": 2, "padding": (3 * up,) * 4, "gain": 1.0, "slope": 0.2, "clamp": 0.6}
    function = _filtered_lrelu.filtered_lrelu
    y = function(x.requires_grad_(), fu, down_filter, b.requires_grad_(), flip_filter=False, **options)
    y.backward(torch.ones_like(y))
    (x_bytes, *_, y_bytes, sign_bytes), (grad_y_bytes, _, _, replayed_bytes, grad_x_bytes) = launches.traffic
    tensor_bytes = [(t.numel() * t.element_size()) for t in (x, y)]
    assert [x_bytes[0], y_bytes[1]] == tensor_bytes
    assert [grad_x_bytes[1], grad_y_bytes[0]] == tensor_bytes
    assert (x_bytes[1], y_bytes[0], sign_bytes[0], replayed_bytes[1]) == (0, 0, 0, 0)
    mid = (y.shape[2] - 1) * 2 + down_filter.shape[0]
    assert sign_bytes[1] == replayed_bytes[0] == 4 * (-(-mid // 16) * mid * 4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), up=st.integers(1, 40), down=st.integers(1, 40))
def test_what_fits_shared_memory_is_said_before_the_launch(data: st.DataObject, up: int, down: int) -> None:
    side = st.integers(1, 40)
    fu, fd = (data.draw(st.one_of(st.none(), side.map(torch.ones), st.builds(torch.ones, side, side))) for _ in "ud")
    x = torch.ones(1, 1, 100, 100)
    _, used, needed = plan(x, fu, fd, up, down, (0, 0, 0, 0))
    assert needed == _filtered_lrelu._smallest_tile(fu, fd, up, down)
    assert used <= _filtered_lrelu._SHARED_BYTES
    assert (used > 0) == (needed <= _filtered_lrelu._SHARED_BYTES)
