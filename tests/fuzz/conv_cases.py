"""Calls of scaled_conv2d, drawn over everything that it takes and around the bounds of its choice of algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from oracle import Named, check, random
from pointwise import BATCHES, DTYPES, THREADS, X_LAYOUTS, EpilogueCase, Pointwise, laid_out, orders, pointwise, wide
from torch import Tensor

from fastgan import ops

__all__ = ["ConvCase", "Pointwise", "check", "conv_cases", "draw_conv", "torch"]

SCALES = st.sampled_from([None, "NC", "NC", "1C", "C", "11", ""])


@dataclass(frozen=True, kw_only=True)
class ConvCase(EpilogueCase):
    """scaled_conv2d of x [n, c_in, h, w]; pairs are (h, w), padding is (left, right, top, bottom)."""

    n: int
    c_in: int
    c_out: int
    h: int
    w: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    output_padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    padding_mode: str = "zeros"
    transposed: bool = False
    groups: int = 1
    in_scale: str | None = None  # the letters of its shape: NC, 1C, C, 11 or "" for 0-dim
    out_scale: str | None = None
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"

    def sizes(self) -> tuple[int, int]:
        """Height and width of the result."""
        pads, found = (self.padding[2] + self.padding[3], self.padding[0] + self.padding[1]), []
        for i, size in enumerate((self.h, self.w)):
            span = self.dilation[i] * (self.kernel[i] - 1) + 1
            if self.transposed:
                found.append((size - 1) * self.stride[i] - pads[i] + span + self.output_padding[i])
            else:
                found.append((size + pads[i] - span) // self.stride[i] + 1)
        return found[0], found[1]

    def products(self) -> int:
        """Multiply-adds of the convolution."""
        small = self.h * self.w if self.transposed else self.sizes()[0] * self.sizes()[1]
        return self.n * self.c_in * self.c_out // self.groups * self.kernel[0] * self.kernel[1] * small

    def inputs(self) -> Named:
        letters = {"N": self.n, "1": 1}
        channels = (self.c_in, self.c_out // self.groups)
        shape = channels if self.transposed else (self.c_out, self.c_in // self.groups)
        terms = shape[0 if self.transposed else 1] * self.kernel[0] * self.kernel[1]
        weight = random((*shape, *self.kernel), self.seed + 10) / terms**0.5
        found = {"x": laid_out(random((self.n, self.c_in, self.h, self.w), self.seed).to(self.dtype), self.x_layout)}
        found["weight"] = laid_out(weight.to(self.dtype), self.weight_layout)
        for name, form, c in (("in_scale", self.in_scale, self.c_in), ("out_scale", self.out_scale, self.c_out)):
            if form is not None:
                size = [letters.get(letter, c) for letter in form]
                # A spread of 10x, as StyleGAN's styles have.
                found[name] = (10 ** (torch.sigmoid(random(size, self.seed + 11)) - 0.5)).to(wide(self.dtype))
        return found | self.epilogue.tensors((self.n, self.c_out, *self.sizes()), self.dtype, self.seed)

    def options(self) -> dict[str, Any]:
        names = ("stride", "padding", "output_padding", "dilation", "padding_mode", "transposed", "groups")
        return {name: getattr(self, name) for name in names}

    def call(self, tensors: Named, backend: str) -> Tensor:
        linear = {name: tensors[name] for name in ("x", "weight", "in_scale", "out_scale") if name in tensors}
        return ops.scaled_conv2d(**linear, **self.options(), epilogue=self.epilogue.build(tensors), backend=backend)


def draw_conv(
    draw: Callable[..., Any], most: int = 4_000_000, dtype: torch.dtype | None = None, **fixed: Any
) -> ConvCase:
    """A valid case: ``fixed`` fields or strategies, the others drawn; n cut to about ``most`` products."""
    values = {name: draw(v) if isinstance(v, st.SearchStrategy) else v for name, v in fixed.items()}

    def pick(name: str, strategy: st.SearchStrategy) -> Any:
        return values[name] if name in values else draw(strategy)

    transposed = pick("transposed", st.booleans())
    side = st.sampled_from([1, 1, 2, 3, 3, 4, 4, 5, 6, 7])
    kernel = pick("kernel", st.one_of(side.map(lambda k: (k, k)), st.tuples(side, side)))
    step = st.integers(1, 3)
    stride = pick("stride", st.one_of(step.map(lambda s: (s, s)), step.map(lambda s: (s, s)), st.tuples(step, step)))
    dilation = pick("dilation", st.sampled_from([(1, 1)] * 4 + [(2, 2), (1, 3), (3, 2)]))
    mode = "zeros" if transposed else pick("padding_mode", st.sampled_from(["zeros"] * 4 + ["reflect", "replicate"]))
    groups = pick("groups", st.sampled_from([1] * 6 + [2, 3]))
    pads = [draw(st.integers(0, k)) for k in kernel]
    padding = (pads[1], pads[1], pads[0], pads[0])
    if "padding" in values:
        padding = values["padding"]
    elif not transposed and draw(st.sampled_from([False, False, False, True])):
        padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    extra = tuple(draw(st.integers(0, s - 1)) for s in stride) if transposed else (0, 0)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sizes = []
    for i, name in enumerate("hw"):
        size = pick(name, st.integers(1, 24))
        before, after = padding[2 - 2 * i], padding[3 - 2 * i]
        if transposed:
            # (size - 1) · stride + span + extra has to be above what is cut.
            size = max(size, -((spans[i] + extra[i] - 1 - before - after) // stride[i]) + 1)
        else:
            size = max(size, spans[i] - before - after, max(before, after) + 1 if mode == "reflect" else 1)
        sizes.append(size)
    case = ConvCase(
        n=pick("n", BATCHES),
        c_in=groups * pick("c_in", st.integers(1, 20)),
        c_out=groups * pick("c_out", st.integers(1, 20)),
        h=sizes[0],
        w=sizes[1],
        kernel=kernel,
        stride=stride,
        padding=padding,
        output_padding=extra,
        dilation=dilation,
        padding_mode=mode,
        transposed=transposed,
        groups=groups,
        in_scale=draw(SCALES),
        out_scale=draw(SCALES),
        x_layout=pick("x_layout", X_LAYOUTS),
        weight_layout=pick("weight_layout", st.sampled_from(["contiguous"] * 5 + ["channels_last", "sliced"])),
        dtype=draw(DTYPES) if dtype is None else dtype,
        threads=draw(THREADS),
        seed=draw(st.integers(0, 99)),
    )
    while case.products() > most and case.n > 1:
        case = replace(case, n=case.n // 2)
    results = case.n * case.c_out * case.sizes()[0] * case.sizes()[1]
    return replace(case, order=draw(orders(case.dtype)), epilogue=pointwise(draw, results, case.dtype))


@st.composite
def conv_cases(draw: Callable[..., Any], **fixed: Any) -> ConvCase:
    """:func:`draw_conv` as a strategy."""
    return draw_conv(draw, **fixed)
