"""upfirdn2d's CUDA kernels, thread by thread on the CPU: values against float64, adjoints, layouts, schedules, reads."""

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
    scale = want.abs().max()
    error, allowed = ((t.double() - want).abs().max() / scale for t in (ran.y, eager))
    assert ran.y.shape == want.shape
    assert error <= 2 * allowed + FLOOR[x.dtype], (x.shape, x.dtype, x.stride(), f, options, e)
    assert ran.traffic["y"][1] == ran.y.numel() * ran.y.element_size()
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
    "a matrix of 12 taps": (torch.outer(vector(12), vector(12)) + torch.eye(12), fir(down=2, padding=(5,) * 4), GENERAL),
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


