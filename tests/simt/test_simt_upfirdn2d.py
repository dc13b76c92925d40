"""upfirdn2d's CUDA kernels, thread by thread: values against float64, adjoints, layouts, schedules, reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import simt_build
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgan.ops.upfirdn2d import _adjoint, filter_size
from fastgan.reference import upfirdn2d as reference
from fastgan.reference.activation import ACTIVATIONS, resolve
from fastgan.reference.epilogue import Epilogue

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A few roundings of float32, relative to the largest result; half types are rounded once.
FLOOR = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ONE_SCHEDULE = [("random", 3)]
GENERAL = -1

# Filters that are neither symmetric nor positive: what is turned around or shifted by a tap shows.
VECTOR = torch.tensor([1.0, 3.0, -2.0, 0.5])
RANK_ONE = torch.outer(torch.tensor([0.5, 1.0, -2.0, 4.0]), VECTOR)
MATRIX = torch.tensor([[1.0, 2, 0.5, -1], [0.3, -1, 3, 0.7], [2, 0.1, -0.4, 1], [0.2, 1, 1.5, -3]])


def vector(taps: int) -> Tensor:
    return torch.randn(taps, generator=torch.Generator().manual_seed(taps))


@dataclass(frozen=True)
class Fir:
    """The linear part; pairs are (x, y), padding (x0, x1, y0, y1)."""

    up: tuple[int, int] = (1, 1)
    down: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    flip_filter: bool = False
    gain: float = 1.0

    def output_hw(self, x: Tensor, f: Tensor | None) -> tuple[int, int]:
        sizes = []
        for axis, taps in enumerate(filter_size(f)):
            padded = x.shape[3 - axis] * self.up[axis] + sum(self.padding[2 * axis : 2 * axis + 2])
            sizes.append((padded - taps + self.down[axis]) // self.down[axis])
        return sizes[1], sizes[0]


def fir(up: int = 1, down: int = 1, padding: tuple[int, ...] = (0, 0, 0, 0), **options) -> Fir:
    return Fir((up, up), (down, down), padding, **options)


def adjoint_of(options: Fir, taps: tuple[int, int], input_hw: tuple[int, ...], output_hw: tuple[int, ...]) -> Fir:
    """As the op's backward calls it."""
    up, down, padding, *rest = _adjoint((*options.__dict__.values(),), taps, input_hw, output_hw)
    return Fir(up, down, tuple(padding), *rest)


class Ran(NamedTuple):
    y: Tensor
    case: int  # of kFirCases
    blocks: int
    shared_bytes: int
    wide_in: int
    wide_out: int
    two_passes: int
    traffic: dict[str, tuple[int, int]]  # bytes read, written


def storage(t: Tensor | None, writable: bool = False) -> np.ndarray:
    """The elements in the order of memory, as NumPy has the dtype; none for no tensor."""
    if t is None:
        return np.empty(0, np.float32)
    flat = t.as_strided((t.numel(),), (1,))
    array = (flat.view(torch.uint16) if t.dtype == torch.bfloat16 else flat).numpy()
    if not writable:
        # NumPy says who may be written.
        array.flags.writeable = False
    return array


def run(x: Tensor, f: Tensor | None, options: Fir, e: Epilogue | None = None, schedules=simt_build.SCHEDULES) -> Ran:
    """The kernel's result for a dense ``x``, as the op's launcher calls it."""
    e = Epilogue() if e is None else e
    kernels = simt_build.load(Path(__file__).parent / "upfirdn2d.cpp")
    nhwc = not x.is_contiguous()
    height, width = options.output_hw(x, f)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    y = torch.full((*x.shape[:2], height, width), torch.nan, dtype=x.dtype).contiguous(memory_format=layout)
    residual = None if e.residual is None else e.residual.to(x.dtype).contiguous(memory_format=layout)
    strength = None if e.noise_strength is None else torch.tensor([e.noise_strength])
    samples = 1 if e.noise is None or e.noise.ndim == 2 else e.noise.shape[0]
    sizes = [x.shape[0], x.shape[1], nhwc, samples, 0 if f is None else f.ndim, options.flip_filter]
    for axis, taps in enumerate(filter_size(f)):
        sizes += [x.shape[3 - axis], (width, height)[axis], options.up[axis], options.down[axis], taps]
        sizes.append(options.padding[2 * axis])
    alpha, gain = resolve(e.act, e.alpha, e.gain)
    slope = {"lrelu": alpha, "relu": 0.0}.get(e.act, 1.0)
    numbers = (options.gain, slope, gain, float("inf") if e.clamp is None else e.clamp, e.residual_gain)
    named = {"x": x, "f": f, "noise": e.noise, "strength": strength, "bias": e.bias, "residual": residual}
    arrays = {name: storage(None if t is None else t.detach()) for name, t in named.items()}
    if residual is None:
        arrays["residual"] = storage(y[:0])
    chosen, act = np.zeros(6, np.int64), list(ACTIVATIONS).index(e.act)
    name = str(x.dtype).removeprefix("torch.")
    result = storage(y, writable=True)
    entries = simt_build.run(kernels, name, *arrays.values(), sizes, act, *numbers, result, chosen, schedules=schedules)
    traffic = {key: entry[1:] for key, entry in zip([*arrays, "y"], entries, strict=False)}
    return Ran(y, *chosen.tolist(), traffic)


def expected(x: Tensor, f: Tensor | None, options: Fir, e: Epilogue | None) -> Tensor:
    return reference.upfirdn2d(x, f, **options.__dict__, epilogue=e)


def check(x: Tensor, f: Tensor | None, options: Fir, e: Epilogue | None = None, schedules=simt_build.SCHEDULES) -> Ran:
    """The rule of accuracy, against float64 and the reference in ``x``'s dtype; every result is written once."""
    ran = run(x, f, options, e, schedules)
    tensors = {} if e is None else {k: v.double() for k, v in e.__dict__.items() if isinstance(v, Tensor)}
    exact = None if e is None else replace(e, **tensors)
    want = expected(x.double(), None if f is None else f.double(), options, exact)
    eager = expected(x, f, options, e)
    scale = want.abs().max().clamp_min(1e-30)
    error, allowed = ((t.double() - want).abs().max() / scale for t in (ran.y, eager))
    assert ran.y.shape == want.shape
    assert error <= 2 * allowed + FLOOR[x.dtype], (x.shape, x.dtype, x.stride(), f, options, e)
    assert ran.traffic["y"][1] == ran.y.numel() * ran.y.element_size()
    # More, a launch would have to ask for.
    assert ran.shared_bytes <= 47 * 1024
    return ran


def image(*shape: int, dtype: torch.dtype = torch.float32, nhwc: bool = False) -> Tensor:
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout)


def epilogue(options: Fir, x: Tensor, f: Tensor | None, act: str = "lrelu", **rest) -> Epilogue:
    """Everything there is, of the result's size; noise of each sample."""
    shape = (*x.shape[:2], *options.output_hw(x, f))
    noise, bias, residual = torch.randn(shape[0], 1, *shape[2:]), torch.randn(shape[1]), torch.randn(shape).to(x.dtype)
    return Epilogue(noise, 0.3, bias, act, residual=residual, residual_gain=0.7, **rest)


# What StyleGAN2 and 3 call, and the gradients of that: (filter, options, case).
MODELS = {
    "behind a transposed convolution": (VECTOR, fir(padding=(1, 1, 1, 1), gain=4.0), 0),
    "before a stride-2 convolution": (RANK_ONE, fir(padding=(2, 2, 2, 2)), 0),
    "any matrix": (MATRIX, fir(padding=(2, 1, 1, 2), flip_filter=True), 0),
    "skip up": (RANK_ONE, fir(up=2, padding=(2, 1, 2, 1), gain=4.0), 1),
    "any matrix up, odd padding": (MATRIX, fir(up=2, padding=(1, 2, 3, 0)), 1),
    "skip down": (RANK_ONE, fir(down=2, padding=(1, 1, 1, 1)), 2),
    "any matrix down": (MATRIX, fir(down=2, padding=(1, 2, 0, 1)), 2),
    "6 taps up": (vector(6), fir(up=2, padding=(3, 2, 3, 2)), 3),
    "6 taps down": (vector(6), fir(down=2, padding=(2, 2, 3, 2)), 4),
    "12 taps up": (vector(12), fir(up=2, padding=(7, 5, 6, 6), gain=4.0), 5),
    "12 taps down": (vector(12), fir(down=2, padding=(5, 6, 5, 5)), 6),
    "24 taps up by 4": (vector(24), fir(up=4, padding=(13, 10, 12, 11), gain=16.0), 7),
    "a matrix of 12 taps": (
        torch.outer(vector(12), vector(12)) + torch.eye(12),
        fir(down=2, padding=(5,) * 4),
        GENERAL,
    ),
    "12 taps, by 1": (vector(12), fir(padding=(5, 6, 6, 5)), GENERAL),
    "no filter": (None, fir(up=2), GENERAL),
}
# 4 columns of half a vector more, rows of whole vectors, odd rows that loads of 16 bytes cannot take.
SIZES = [(1, 2, 12, 40), (2, 3, 9, 16), (1, 3, 11, 13)]


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_epilogue_of_the_models(name: str, nhwc: bool) -> None:
    torch.manual_seed(0)
    f, options, case = MODELS[name]
    n, c, height, width = SIZES[list(MODELS).index(name) % 3]
    c = 20 if nhwc else c
    x = image(n, c, height, width, nhwc=nhwc)
    ran = check(x, f, options, epilogue(options, x, f, clamp=1.5), schedules=simt_build.SCHEDULES[:3])
    assert ran.case == case
    assert ran.wide_in == (nhwc or width % 4 == 0)


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_types(dtype: torch.dtype, nhwc: bool) -> None:
    """In vectors, and one by one."""
    torch.manual_seed(1)
    for c, width in ((16, 24), (5, 23)):
        x = image(2, c, 9, width, dtype=dtype, nhwc=nhwc)
        options = fir(padding=(2, 1, 1, 2), gain=2.0)
        ran = check(x, MATRIX, options, epilogue(options, x, MATRIX, clamp=1.0), schedules=simt_build.SCHEDULES[:3])
        assert ran.wide_in == ran.wide_out == (c == 16)
        down = fir(up=3, down=2, padding=(2, 1, 1, 2))
        assert check(x, vector(5), down, epilogue(down, x, vector(5)), schedules=ONE_SCHEDULE).case == GENERAL


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_the_same_kernel(name: str, nhwc: bool) -> None:
    """Values of the adjoint, and <A x, y> = <x, A* y> of what the kernels gave; twice the adjoint is the map again."""
    torch.manual_seed(2)
    f, options, _ = MODELS[name]
    x = image(1, 3, 10, 14, nhwc=nhwc)
    taps, hw = filter_size(f), tuple(x.shape[2:])
    there = check(x, f, options, schedules=ONE_SCHEDULE)
    adjoint = adjoint_of(options, taps, hw, there.y.shape[2:])
    y = torch.randn_like(there.y)
    back = check(y, f, adjoint, schedules=ONE_SCHEDULE)
    assert back.y.shape == x.shape
    terms = (there.y.double() * y.double()).abs().sum()
    difference = (there.y.double() * y.double()).sum() - (x.double() * back.y.double()).sum()
    assert difference.abs() <= 1e-6 * terms
    again = adjoint_of(adjoint, taps, there.y.shape[2:], hw)
    torch.testing.assert_close(run(x, f, again, schedules=ONE_SCHEDULE).y, there.y, rtol=0, atol=0)


def test_each_input_is_read_once_by_each_tile() -> None:
    torch.manual_seed(3)
    f = RANK_ONE
    # Tiles of 64 x 32 with a halo of 3 rows and columns, one of them; 16 planes of small maps in a block.
    for shape, blocks, factor in (((1, 1, 32, 60), 1, 1.0), ((4, 8, 8, 8), 2, 1.0), ((1, 1, 64, 128), 4, 1.13)):
        x = image(*shape)
        options = fir(padding=(1, 2, 1, 2))
        e = epilogue(options, x, f)
        ran = check(x, f, options, e, schedules=ONE_SCHEDULE)
        bytes_of_y = ran.y.numel() * 4
        assert ran.blocks == blocks
        assert ran.traffic["residual"] == (bytes_of_y, 0)
        assert ran.traffic["noise"] == (bytes_of_y, 0)
        assert x.numel() * 4 <= ran.traffic["x"][0] <= factor * x.numel() * 4
        assert ran.traffic["f"][0] == ran.blocks * f.numel() * 4
    # A tile of the general kernel in several pieces.
    x, f = image(1, 2, 20, 24), vector(90)
    ran = check(x, f, fir(padding=(60, 50, 70, 40)), schedules=ONE_SCHEDULE)
    assert ran.case == GENERAL
    assert ran.traffic["x"][0] <= ran.blocks * x.numel() * 4


def test_what_shared_memory_does_not_hold_comes_in_pieces() -> None:
    """Long filters, as one vector and as a matrix, in both layouts."""
    torch.manual_seed(4)
    wide = torch.randn(3, 700) / 20
    calls = [
        (vector(70), fir(padding=(35, 40, 35, 35))),
        (wide, Fir(padding=(690, 3, 0, 1))),
        (wide, Fir(up=(2, 1), down=(1, 2), padding=(665, 3, 2, 2))),
        (vector(31).outer(vector(41)), fir(down=9, padding=(30, 31, 20, 30))),
    ]
    for nhwc in (False, True):
        x = image(1, 2, 9, 20, nhwc=nhwc)
        for f, options in calls[:2] if nhwc else calls:
            assert check(x, f, options, schedules=ONE_SCHEDULE).case == GENERAL


def test_two_passes_where_they_are_fewer_products() -> None:
    x = image(1, 2, 30, 30)
    assert check(x, vector(9), fir(padding=(4, 4, 4, 4)), schedules=ONE_SCHEDULE).two_passes
    # A row in five is of use, so filtering all of them along x would be more than the products together.
    assert not check(x, vector(2), fir(down=5), schedules=ONE_SCHEDULE).two_passes


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_addresses_that_are_not_aligned(offset: int) -> None:
    torch.manual_seed(5)
    for dtype in DTYPES:
        x = torch.randn(2 * 8 * 16 + offset).to(dtype)[offset:].view(1, 2, 8, 16)
        options = fir(padding=(2, 1, 2, 1))
        e = epilogue(options, x, VECTOR)
        e.noise = torch.randn(8 * 16 + offset)[offset:].view(1, 1, 8, 16)
        ran = check(x, VECTOR, options, e, schedules=ONE_SCHEDULE)
        assert ran.wide_in == (offset * x.element_size() % 16 == 0)
        assert ran.wide_out == (offset % 4 == 0)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_and_what_is_not_finite(act: str) -> None:
    torch.manual_seed(6)
    x = image(1, 2, 6, 8)
    x[0, 0, 1] *= 40
    e = Epilogue(bias=torch.randn(2), act=act, alpha=0.3 if act == "lrelu" else None, gain=1.3)
    check(x, VECTOR, fir(padding=(2, 1, 2, 1)), e, schedules=ONE_SCHEDULE)
    x[0, 1, 2, 2:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 300.0])
    for clamp in (None, 2.0):
        e = Epilogue(act=act, clamp=clamp)
        want = expected(x, None, fir(), e)
        torch.testing.assert_close(run(x, None, fir(), e, ONE_SCHEDULE).y, want, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_matrix_of_rank_one_is_two_vectors() -> None:
    """To a few roundings; one that is nearly of rank one is not taken for it, nor one of zeros or with a NaN."""
    one = torch.zeros(1, 1, 8, 8)
    one[0, 0, 3, 4] = 1
    nearly = torch.outer(VECTOR, VECTOR)
    nearly[1, 2] *= 1 + 2.0**-18
    for f in (RANK_ONE, nearly, nearly.t().contiguous(), torch.zeros(4, 4), torch.eye(4), MATRIX):
        got = run(one, f, fir(padding=(3, 3, 3, 3)), schedules=ONE_SCHEDULE).y[0, 0, 3:7, 4:8]
        torch.testing.assert_close(got, f, rtol=0 if f is not RANK_ONE else 5e-7, atol=0)
    broken = RANK_ONE.clone()
    broken[2, 1] = torch.nan
    y = run(torch.ones(1, 1, 8, 8), broken, fir(padding=(1, 1, 1, 1)), schedules=ONE_SCHEDULE).y
    torch.testing.assert_close(
        y, expected(torch.ones(1, 1, 8, 8), broken, fir(padding=(1, 1, 1, 1)), None), equal_nan=True
    )


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (70, 3, 1, 1), (3, 33, 2, 1), (1, 1, 1, 300), (1, 2, 300, 1)])
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_sizes_of_one(shape: tuple[int, ...], nhwc: bool) -> None:
    torch.manual_seed(7)
    x = image(*shape, nhwc=nhwc)
    for f, options in ((VECTOR, fir(padding=(2, 1, 2, 1))), (VECTOR, fir(up=2, padding=(3, 2, 3, 2))), (None, fir())):
        check(x, f, options, epilogue(options, x, f), schedules=ONE_SCHEDULE)


def test_large_batches_are_several_launches() -> None:
    kernels = simt_build.load(Path(__file__).parent / "upfirdn2d.cpp")
    for sizes, want in (
        ((8, 512, 64, 64), 8),
        ((2**20, 2**14, 1, 1), 2**16),
        ((4, 2, 2**15, 2**15), 4),
        ((9, 2**31, 4, 8), 1),
    ):
        got = np.zeros(1, np.int64)
        kernels.samples_of(list(sizes), got)
        assert got[0] == want


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_calls(data: st.DataObject) -> None:
    """Any factors, filters, paddings that crop, layouts and epilogues; half of the calls such as have a kernel."""
    torch.manual_seed(8)
    small = st.integers(1, 3)
    x = image(data.draw(small), data.draw(st.sampled_from([1, 3, 8, 20])), data.draw(st.integers(1, 20)),
              data.draw(st.sampled_from([1, 4, 7, 16, 37])), nhwc=data.draw(st.booleans()))  # fmt: skip
    padding = tuple(data.draw(st.lists(st.integers(-3, 9), min_size=4, max_size=4)))
    if data.draw(st.booleans()):
        up, down, taps = data.draw(st.sampled_from([(1, 1, 4), (2, 1, 4), (1, 2, 4), (2, 1, 12), (4, 1, 24)]))
        f = data.draw(st.sampled_from([VECTOR, RANK_ONE, MATRIX])) if taps == 4 else vector(taps)
        options = fir(up, down, padding)
    else:
        f = data.draw(
            st.sampled_from([None, vector(1), vector(5), MATRIX[:, :3].contiguous(), MATRIX[:1].contiguous()])
        )
        factors = [(data.draw(small), data.draw(small)) for _ in range(2)]
        options = Fir(*factors, padding)
    options = replace(options, flip_filter=data.draw(st.booleans()), gain=data.draw(st.sampled_from([1.0, -0.5])))
    if min(options.output_hw(x, f)) < 1:
        return
    e = epilogue(options, x, f, data.draw(st.sampled_from(["linear", "lrelu", "tanh"])))
    for name in ("noise", "bias", "residual"):
        if data.draw(st.booleans()):
            setattr(e, name, None)
    if e.noise is None:
        e.noise_strength = None
    check(x, f, options, e, schedules=[("forward", 0), ("random", data.draw(st.integers(0, 99)))])
