"""Calls of the other ops of layers: modulated_conv2d, upfirdn2d, norm_act, bias_act, pixel_norm, minibatch_stddev."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from oracle import KINKS, KINKS_OF_ORDER_2, Case, Named, check, random
from pointwise import (
    BATCHES,
    DTYPES,
    GAINS,
    HALF,
    MOST_WITH_KINKS,
    SMOOTH,
    THREADS,
    X_LAYOUTS,
    EpilogueCase,
    Pointwise,
    around,
    laid_out,
    orders,
    pointwise,
    wide,
)
from torch import Tensor

from fastgan import ops
from fastgan.reference.activation import ACTIVATIONS

__all__ = [
    "BiasCase",
    "FilterCase",
    "ModulatedCase",
    "NormCase",
    "PixelCase",
    "Pointwise",
    "StddevCase",
    "check",
    "torch",
]


def common(draw: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of every case."""
    return {
        "dtype": dtype,
        "threads": draw(THREADS),
        "order": draw(orders(dtype)),
        "seed": draw(st.integers(0, 99)),
    }


@dataclass(frozen=True, kw_only=True)
class ModulatedCase(EpilogueCase):
    """modulated_conv2d of x [n, c_in, h, w]; padding is (left, right, top, bottom)."""

    n: int
    c_in: int
    c_out: int
    h: int
    w: int
    kernel: int
    options: dict[str, Any]
    input_gain: str | float | None = None  # the letters of its shape, C or NC, or the number
    taps: int = 0  # of the resampling filter
    x_layout: str = "contiguous"

    def inputs(self) -> Named:
        weight = random((self.c_out, self.c_in, self.kernel, self.kernel), self.seed + 10)
        found = {
            "x": laid_out(random((self.n, self.c_in, self.h, self.w), self.seed).to(self.dtype), self.x_layout),
            "weight": (weight / (self.c_in * self.kernel**2) ** 0.5).to(self.dtype),
            "style": (10 ** (torch.sigmoid(random((self.n, self.c_in), self.seed + 11)) - 0.5)).to(wide(self.dtype)),
        }
        if isinstance(self.input_gain, str):
            shape = (self.n, self.c_in)[2 - len(self.input_gain) :]
            found["input_gain"] = (torch.sigmoid(random(shape, self.seed + 15)) + 0.5).to(wide(self.dtype))
        return found | self.epilogue.tensors(self.shape(), self.dtype, self.seed)

    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        bare = replace(self, epilogue=Pointwise())
        with torch.device("meta"):
            tensors = {
                "x": torch.empty(self.n, self.c_in, self.h, self.w),
                "weight": torch.empty(self.c_out, self.c_in, self.kernel, self.kernel),
                "style": torch.empty(self.n, self.c_in),
                "input_gain": torch.empty(self.c_in),
            }
            return tuple(bare.call(tensors, "reference").shape)

    def call(self, tensors: Named, backend: str) -> Tensor:
        x = tensors["x"]
        f = random([self.taps], 7).abs() if self.taps else None
        return ops.modulated_conv2d(
            x,
            tensors["weight"],
            tensors["style"],
            **self.options,
            resample_filter=None if f is None else (f / f.sum()).to(device=x.device, dtype=wide(x.dtype)),
            input_gain=tensors["input_gain"] if isinstance(self.input_gain, str) else self.input_gain,
            epilogue=self.epilogue.build(tensors),
            backend=backend,
        )


@st.composite
def modulated_cases(draw: Any) -> ModulatedCase:
    dtype, kernel = draw(DTYPES), draw(st.sampled_from([1, 3, 3, 2]))
    up, down = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2), (3, 1)]))
    case = ModulatedCase(
        n=draw(BATCHES),
        # Of one channel, demodulation leaves no gradient of the style but rounding.
        c_in=draw(st.integers(2, 24)),
        c_out=draw(st.integers(1, 24)),
        h=draw(st.integers(4, 14)),
        w=draw(st.integers(4, 14)),
        kernel=kernel,
        options={
            "demodulate": draw(st.booleans()),
            "up": up,
            "down": down,
            "padding": draw(st.sampled_from([0, kernel // 2, (1, 0, 2, 1)])),
            "prenormalize": draw(st.sampled_from(["auto", "none", "stylegan2_fp16", "stylegan3"])),
            "flip_weight": draw(st.sampled_from([None, True, False])),
        },
        input_gain=draw(st.sampled_from([None, None, 0.7, "C", "NC"])),
        taps=draw(st.sampled_from([0, 1, 3, 4])) if max(up, down) > 1 else 0,
        x_layout=draw(X_LAYOUTS),
        **common(draw, dtype),
    )
    n, *rest = case.shape()
    results = n * rest[0] * rest[1] * rest[2]
    return replace(case, epilogue=pointwise(draw, results, dtype))


@dataclass(frozen=True, kw_only=True)
class FilterCase(EpilogueCase):
    """upfirdn2d of x [n, c, h, w]; factors are (x, y), padding is (left, right, top, bottom)."""

    shape: tuple[int, int, int, int]
    taps: tuple[int, ...]  # [taps] or [fh, fw]; () for none
    up: tuple[int, int]
    down: tuple[int, int]
    padding: tuple[int, int, int, int]
    flip: bool = False
    gain: float = 1.0
    x_layout: str = "contiguous"

    def sizes(self) -> tuple[int, int]:
        """Height and width of the result."""
        found = []
        for axis, taps in ((1, self.taps[:1]), (0, self.taps[-1:])):
            full = self.shape[3 - axis] * self.up[axis] + sum(self.padding[2 * axis : 2 * axis + 2])
            found.append((full - (taps[0] if taps else 1) + self.down[axis]) // self.down[axis])
        return found[0], found[1]

    def inputs(self) -> Named:
        found = {"x": laid_out(random(self.shape, self.seed).to(self.dtype), self.x_layout)}
        return found | self.epilogue.tensors((*self.shape[:2], *self.sizes()), self.dtype, self.seed)

    def call(self, tensors: Named, backend: str) -> Tensor:
        f = random(self.taps, self.seed + 10).to(wide(tensors["x"].dtype)) if self.taps else None
        return ops.upfirdn2d(
            tensors["x"],
            f,
            up=self.up,
            down=self.down,
            padding=self.padding,
            flip_filter=self.flip,
            gain=self.gain,
            epilogue=self.epilogue.build(tensors),
            backend=backend,
        )


@st.composite
def filter_cases(draw: Any) -> FilterCase:
    dtype, side, factor = draw(DTYPES), st.integers(1, 12), st.integers(1, 4)
    case = FilterCase(
        shape=(draw(BATCHES), draw(st.integers(1, 9)), *(draw(st.integers(1, 20)) for _ in range(2))),
        taps=draw(st.one_of(st.just(()), st.tuples(side), st.tuples(st.integers(1, 7), st.integers(1, 7)))),
        up=draw(st.one_of(st.tuples(factor, factor), st.sampled_from([(1, 1), (2, 2)]))),
        down=draw(st.one_of(st.tuples(factor, factor), st.sampled_from([(1, 1), (2, 2)]))),
        padding=tuple(draw(st.integers(-2, 7)) for _ in range(4)),
        flip=draw(st.booleans()),
        gain=draw(st.sampled_from([1.0, 4.0, -0.5])),
        x_layout=draw(X_LAYOUTS),
        **common(draw, dtype),
    )
    h, w = case.sizes()
    # What is cropped has to be there.
    left, right, top, bottom = case.padding
    rows, columns = case.shape[2] * case.up[1], case.shape[3] * case.up[0]
    assume(min(h, w) >= 1 and min(rows + top, rows + bottom, columns + left, columns + right) >= 1)
    return replace(case, epilogue=pointwise(draw, case.shape[0] * case.shape[1] * h * w, dtype))


@dataclass(frozen=True, kw_only=True)
class NormCase(Case):
    """norm_act of x [n, c, h, w]; weight and bias by the letters of their shape, C or NC."""

    shape: tuple[int, int, int, int]
    kind: str
    weight: str | None
    bias: str | None
    running: str | None  # given or advanced
    act: str
    gain: float | None
    x_layout: str = "contiguous"

    def inputs(self) -> Named:
        n, c = self.shape[:2]
        found = {"x": laid_out((random(self.shape, self.seed) * 2 + 1).to(self.dtype), self.x_layout)}
        for name, form, seed in (("weight", self.weight, 10), ("bias", self.bias, 11)):
            if form:
                found[name] = random((n, c)[2 - len(form) :], self.seed + seed).to(wide(self.dtype))
        return found

    def call(self, tensors: Named, backend: str) -> Tensor | tuple[Tensor, ...]:
        c, dtype = self.shape[1], wide(tensors["x"].dtype)
        kept = [(random([c], 3) + 1).to(dtype), (random([c], 4).square() + 0.5).to(dtype)]
        running = {None: None, "given": tuple(kept), "advanced": (*kept, 0.3)}[self.running]
        affine = {name: tensors.get(name) for name in ("weight", "bias")}
        y = ops.norm_act(
            tensors["x"],
            kind=self.kind,
            **affine,
            running=running,
            eps=1e-3,
            act=self.act,
            gain=self.gain,
            backend=backend,
        )
        return (y, *kept)

    def kinks(self, tensors: Named) -> list[Tensor]:
        kinks = KINKS_OF_ORDER_2 if self.order > 1 else KINKS
        return [replace(self, act="linear", gain=1.0).call(tensors, "reference")[0]] if self.act in kinks else []


@st.composite
def norm_cases(draw: Any) -> NormCase:
    dtype, kind, n = draw(DTYPES), draw(st.sampled_from(["instance", "batch"])), draw(BATCHES)
    running = draw(st.sampled_from([None, "given", "advanced"])) if kind == "batch" else None
    plane = draw(
        st.one_of(
            st.tuples(st.integers(1, 20), st.integers(1, 20)),
            # Planes of one block of csrc/cpu/image.h, and one more or less.
            st.sampled_from([(1, 2047), (64, 32), (3, 683), (1, 4097)]),
        )
    )
    c = draw(st.one_of(st.integers(1, 40), around(128))) if plane[0] * plane[1] < 400 else draw(st.integers(1, 3))
    # Statistics of two or three values have slopes that rounding alone makes arbitrary.
    assume(running == "given" or plane[0] * plane[1] * (n if kind == "batch" and n else 1) >= 4)
    kinks = dtype not in HALF and n * c * plane[0] * plane[1] <= MOST_WITH_KINKS
    forms = st.sampled_from([None, "C", "C", "NC"])
    return NormCase(
        shape=(n, c, *plane),
        kind=kind,
        weight=draw(forms),
        bias=draw(forms),
        running=running,
        act=draw(st.sampled_from(tuple(ACTIVATIONS) if kinks else SMOOTH)),
        gain=draw(GAINS),
        x_layout=draw(X_LAYOUTS),
        **common(draw, dtype),
    )


@dataclass(frozen=True, kw_only=True)
class BiasCase(Case):
    """bias_act of x of any rank."""

    shape: tuple[int, ...]
    dim: int
    bias: bool
    act: str
    gain: float | None
    clamp: float | None
    x_layout: str = "contiguous"  # of an x [N, C, H, W]

    def inputs(self) -> Named:
        x = random(self.shape, self.seed).to(self.dtype)
        found = {"x": laid_out(x, self.x_layout) if x.ndim == 4 else x}
        if self.bias:
            found["b"] = random([self.shape[self.dim]], self.seed + 10).to(wide(self.dtype))
        return found

    def call(self, tensors: Named, backend: str) -> Tensor:
        options = {"dim": self.dim, "act": self.act, "gain": self.gain, "clamp": self.clamp}
        return ops.bias_act(tensors["x"], tensors.get("b"), **options, backend=backend)

    def kinks(self, tensors: Named) -> list[Tensor]:
        z = replace(self, act="linear", gain=1.0, clamp=None).call(tensors, "reference")
        return Pointwise(act=self.act, gain=self.gain, clamp=self.clamp).kinks(z, self.order)


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """Of rank 1 to 5; only the first axis may be empty."""
    axis = st.one_of(st.integers(1, 9), st.sampled_from([31, 64, 129]))
    small = st.lists(axis, min_size=0, max_size=4).filter(lambda sizes: torch.Size(sizes).numel() <= 20_000)
    image = st.tuples(st.integers(1, 20), st.integers(1, 24), st.integers(1, 24))
    return st.tuples(BATCHES, st.one_of(small, image)).map(lambda pair: (pair[0], *pair[1]))


@st.composite
def bias_cases(draw: Any) -> BiasCase:
    dtype, shape = draw(DTYPES), draw(shapes())
    kinks = dtype not in HALF and torch.Size(shape).numel() <= MOST_WITH_KINKS
    return BiasCase(
        shape=shape,
        dim=draw(st.sampled_from([len(shape) > 1, -1, draw(st.integers(0, len(shape) - 1))])) + 0,
        bias=draw(st.booleans()),
        act=draw(st.sampled_from(tuple(ACTIVATIONS) if kinks else SMOOTH)),
        gain=draw(GAINS),
        clamp=draw(st.sampled_from([None, None, 1.1])) if kinks else None,
        x_layout=draw(X_LAYOUTS),
        **common(draw, dtype),
    )


@dataclass(frozen=True, kw_only=True)
class PixelCase(Case):
    """pixel_norm of x of any rank."""

    shape: tuple[int, ...]
    dim: int
    x_layout: str = "contiguous"  # of an x [N, C, H, W]

    def inputs(self) -> Named:
        x = random(self.shape, self.seed).to(self.dtype)
        return {"x": laid_out(x, self.x_layout) if x.ndim == 4 else x}

    def call(self, tensors: Named, backend: str) -> Tensor:
        return ops.pixel_norm(tensors["x"], dim=self.dim, backend=backend)


@st.composite
def pixel_cases(draw: Any) -> PixelCase:
    dtype, shape = draw(DTYPES), draw(shapes())
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    # x / |x| of one value has the slope 0, and of no value there is none.
    assume(shape[dim] > 1)
    return PixelCase(shape=shape, dim=dim, x_layout=draw(X_LAYOUTS), **common(draw, dtype))


@dataclass(frozen=True, kw_only=True)
class StddevCase(Case):
    """minibatch_stddev of x [group · groups, share · num_channels, h, w]."""

    group: int
    groups: int
    share: int
    num_channels: int
    h: int
    w: int
    x_layout: str = "contiguous"

    def inputs(self) -> Named:
        shape = (self.group * self.groups, self.share * self.num_channels, self.h, self.w)
        return {"x": laid_out(random(shape, self.seed).to(self.dtype), self.x_layout)}

    def call(self, tensors: Named, backend: str) -> Tensor:
        return ops.minibatch_stddev(
            tensors["x"], group_size=self.group, num_channels=self.num_channels, eps=1e-3, backend=backend
        )


@st.composite
def stddev_cases(draw: Any) -> StddevCase:
    dtype, size = draw(DTYPES), st.one_of(st.integers(1, 9), around(16, 48))
    return StddevCase(
        group=draw(st.integers(1, 5)),
        groups=draw(st.integers(0, 4)),
        share=draw(st.integers(1, 20)),
        num_channels=draw(st.integers(1, 3)),
        h=draw(size),
        w=draw(st.integers(1, 9)),
        x_layout=draw(X_LAYOUTS),
        **common(draw, dtype),
    )
