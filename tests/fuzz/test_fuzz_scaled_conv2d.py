"""scaled_conv2d under hypothesis: everything that it takes, and the bounds of every algorithm's choice (csrc/cpu)."""

from __future__ import annotations

from typing import Any

import torch
from budget import share
from conv_cases import ConvCase, conv_cases, draw_conv
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import check, reaching
from pointwise import around

import fastgan
from fastgan._native import algorithm_calls, winograd_tile_calls
from fastgan.backends import PRECISIONS

# What the library's own products ask for beside sizes.
OWN: dict[str, Any] = {
    "dtype": torch.float32,
    "groups": 1,
    "x_layout": st.sampled_from(["contiguous", "sliced", "expanded"]),
    "weight_layout": "contiguous",
    "padding_mode": "zeros",
}


PADDED = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}


def square(side: int) -> tuple[int, int]:
    return (side, side)


def same(draw: Any, kernels: tuple[int, ...], shapes: list[tuple[int, int, int]], **fixed: Any) -> ConvCase:
    """Stride 1 and padding that keeps the size, so that pixels are those of a shape (n, h, w)."""
    k, (n, h, w) = draw(st.sampled_from(kernels)), draw(st.sampled_from(shapes))
    size = {"n": n, "h": h, "w": w, "kernel": square(k), "padding": (k // 2,) * 4}
    return draw_conv(draw, **OWN, **size, stride=(1, 1), dilation=(1, 1), **fixed)


@share(16)
@given(conv_cases())
def test_anything(case: ConvCase) -> None:
    check(case)


@st.composite
def few_pixels(draw: Any) -> ConvCase:
    """Up to 32 pixels on the small side and 64 taps; around both bounds."""
    channels = st.sampled_from([1, 2, 3, 5, 8, 17, 31, 33, 67, 130])
    fixed = {"c_in": channels, "c_out": channels}
    form = draw(st.integers(0, 3))
    if form == 0:
        shapes = [(1, 4, 8), (2, 4, 4), (8, 2, 2), (16, 1, 2), (1, 3, 11), (1, 31, 1), (3, 11, 1), (1, 1, 33)]
        return same(draw, (1, 3, 5, 7), shapes, **fixed)
    if form == 1:
        taps = st.sampled_from([(8, 8), (9, 7), (13, 5), (16, 4), (33, 2), (1, 64), (65, 1)])
        return draw_conv(draw, **OWN | fixed, kernel=taps, dilation=(1, 1), n=st.integers(1, 2), **small_map())
    return draw_conv(draw, **OWN | fixed, dilation=(1, 1), n=st.integers(0, 4), **small_map())


def small_map() -> dict[str, Any]:
    return {"h": st.integers(1, 5), "w": st.integers(1, 5)}


def test_few_pixels() -> None:
    @share(11.2)
    @given(few_pixels())
    @example(ConvCase(n=1, c_in=8, c_out=8, h=4, w=8, **PADDED))
    def draw(case: ConvCase) -> None:
        check(case)

    with reaching("few_pixels"):
        draw()


@st.composite
def unfolded(draw: Any) -> ConvCase:
    """33 to 128 pixels; around the upper bound, and the weight's gradient around its 256 pixels and 64 rows."""
    form = draw(st.integers(0, 2))
    if form == 0:
        shapes = [(1, 8, 16), (2, 8, 8), (8, 4, 4), (16, 2, 4), (1, 3, 43), (1, 127, 1), (1, 33, 1), (11, 1, 3)]
        return same(draw, (1, 3, 5), shapes, c_in=around(16, 48), c_out=around(6, 16, 48), transposed=False)
    if form == 1:
        shapes = [(1, 16, 16), (4, 8, 8), (16, 4, 4), (1, 1, 256), (1, 257, 1), (1, 15, 17), (8, 3, 7)]
        fixed = {"c_in": st.sampled_from([16, 64, 80, 128]), "c_out": around(64), "transposed": False}
        return same(draw, (2, 3, 5), shapes, most=30_000_000, **fixed)
    size = {"n": st.integers(1, 3), "h": st.integers(3, 11), "w": st.integers(3, 11)}
    channels = {"c_in": st.one_of(around(9, 32), st.sampled_from([48, 64, 80])), "c_out": around(9, 64, 130)}
    return draw_conv(draw, **OWN, **size, **channels, stride=st.integers(1, 3).map(square), transposed=False)


def test_unfolded_products() -> None:
    @share(9.6)
    @given(unfolded())
    @example(ConvCase(n=1, c_in=64, c_out=130, h=8, w=8, **PADDED))
    def draw(case: ConvCase) -> None:
        check(case)

    with reaching("unfolded_conv", "unfolded_weight_grad"):
        draw()


def test_unfolded_transposed_products() -> None:
    """From 4 Mi weights on: cases of a second, so there are few of them."""
    size = {"n": st.integers(1, 2), "h": around(5), "w": around(5), "kernel": st.sampled_from([3, 4]).map(square)}
    fixed = {"stride": st.integers(1, 3).map(square), "dilation": (1, 1), "transposed": True, "c_in": around(1040)}

    @share(0.5)
    @given(conv_cases(**OWN, **size, **fixed, c_out=around(464), most=10**9))
    @example(ConvCase(n=1, c_in=1040, c_out=464, h=6, w=6, stride=(2, 2), transposed=True, order=0, **PADDED))
    def draw(case: ConvCase) -> None:
        check(case)

    with reaching("unfolded_conv"):
        draw()


@st.composite
def direct(draw: Any) -> ConvCase:
    """Around 8 channels on one side, 256 taps, and the 8192 pixels of a transposed 3x3 of stride 2."""
    form = draw(st.integers(0, 4))
    many = {"n": st.integers(1, 4), "h": st.integers(1, 40), "w": st.integers(9, 70)}
    if form == 0:
        size = st.sampled_from([(1, 64, 128), (2, 64, 64), (1, 91, 91), (1, 32, 257), (4, 45, 46)])
        n, h, w = draw(size)
        geometry = {"kernel": (3, 3), "stride": (2, 2), "dilation": (1, 1), "transposed": True}
        return draw_conv(draw, **OWN, **geometry, n=n, h=h, w=w, c_in=around(9), c_out=around(9), most=8_000_000)
    if form == 1:
        taps = st.sampled_from([(16, 16), (15, 17), (17, 16), (1, 256), (257, 1)])
        pair = {"c_in": st.integers(1, 4), "c_out": st.integers(1, 4)}
        size = {"n": st.integers(1, 2), "h": st.integers(10, 18), "w": st.integers(10, 18)}
        return draw_conv(draw, **OWN, **pair, **size, kernel=taps, stride=(1, 1), dilation=(1, 1))
    few, other = around(1, 3, 8), st.one_of(st.integers(1, 70), around(6, 12, 16, 48))
    pair = {"c_in": few, "c_out": other} if draw(st.booleans()) else {"c_in": other, "c_out": few}
    return draw_conv(draw, **OWN, **pair, **many, stride=st.integers(1, 3).map(square))


def test_direct_products() -> None:
    @share(14.4)
    @given(direct())
    @example(ConvCase(n=1, c_in=3, c_out=20, h=20, w=24, **PADDED))
    def draw(case: ConvCase) -> None:
        check(case)

    with reaching("direct_conv", "direct_weight_grad"):
        draw()


@st.composite
def winograd(draw: Any) -> ConvCase:
    """2 to 4 taps per phase and axis, over channels and pixels on both sides of what repays the transforms."""
    taps, stride = draw(st.sampled_from([(3, 1), (3, 1), (3, 2), (2, 1), (2, 2), (4, 1)]))
    kernel, transposed = taps * stride, draw(st.booleans())
    channels = st.sampled_from([64, 67, 80, 96, 128] if taps == 3 else [128, 131, 200])
    scale = 1 if transposed else stride
    h, w = (scale * draw(st.integers(20, 34)) + draw(st.integers(0, 1)) for _ in range(2))
    geometry = {"kernel": square(kernel), "stride": square(stride), "dilation": (1, 1), "transposed": transposed}
    n = st.sampled_from([1, 1, 2, 3])
    return draw_conv(draw, **OWN, **geometry, n=n, h=h, w=w, c_in=channels, c_out=channels, most=100_000_000)


def test_winograd() -> None:
    @share(4.8)
    @given(winograd())
    @example(ConvCase(n=2, c_in=128, c_out=130, h=19, w=20, **PADDED))
    @example(ConvCase(n=1, c_in=20, c_out=20, h=19, w=20, **PADDED))
    def draw(case: ConvCase) -> None:
        check(case)

    with reaching("winograd", "torch"):
        draw()


@st.composite
def dense_weight_grad(draw: Any) -> ConvCase:
    """From 9 channels on, lines of up to 256 pixels, around 512 weights and 4 taps."""
    wide = draw(st.booleans())
    size = {"h": st.integers(1, 4), "w": around(256)} if wide else {"h": st.integers(1, 24), "w": st.integers(1, 24)}
    kernel = st.sampled_from([(2, 2), (1, 4), (3, 1), (3, 3), (4, 4), (5, 2)])
    stride = (1, 1) if wide else st.integers(1, 3).map(square)
    padding = {"padding": (1, 1, 1, 1)} if wide else {}
    channels = {"c_in": around(9, 14, 16, 67), "c_out": around(9, 16, 32, 140)}
    return draw_conv(draw, **OWN, **size, **channels, **padding, n=st.integers(1, 16), kernel=kernel, stride=stride)


def test_dense_weight_gradients() -> None:
    @share(8)
    @given(dense_weight_grad())
    @example(ConvCase(n=2, c_in=20, c_out=33, h=21, w=40, **PADDED))
    @example(ConvCase(n=1, c_in=20, c_out=20, h=12, w=12, kernel=(1, 1)))
    def draw(case: ConvCase) -> None:
        check(case)

    with reaching("dense_weight_grad", "torch_weight_grad"):
        draw()


@st.composite
def filtered_weight_grad(draw: Any) -> ConvCase:
    """Kernels that Winograd's filtering has a weight gradient for, around its bounds: 16 channels and many tiles."""
    kernel, stride = draw(st.sampled_from([(3, 1), (4, 1), (4, 2)]))
    size = {"h": st.integers(4, 40), "w": st.integers(4, 40), "padding": (draw(st.integers(0, 3)),) * 4}
    channels = {"c_in": around(16, 33, 48, 70), "c_out": around(16, 33, 80, 140)}
    fixed = {"kernel": square(kernel), "stride": square(stride), "dilation": (1, 1)}
    return draw_conv(draw, **OWN, **size, **channels, **fixed, n=st.integers(1, 8))


def test_filtered_weight_gradients() -> None:
    @share(6)
    @given(filtered_weight_grad())
    @example(ConvCase(n=2, c_in=120, c_out=130, h=33, w=20, **PADDED))
    @example(ConvCase(n=1, c_in=20, c_out=20, h=12, w=12, **PADDED))
    def draw(case: ConvCase) -> None:
        check(case)

    with reaching("winograd_weight_grad", "dense_weight_grad"):
        draw()


def test_explain() -> None:
    """What fastgan.explain names is what serves the call, in either precision."""
    names = ("few_pixels", "unfolded_conv", "winograd", "direct_conv", "torch")

    @share(10)
    @given(
        st.one_of(conv_cases(), few_pixels(), unfolded(), direct(), winograd()),
        st.sampled_from(PRECISIONS),
        st.booleans(),
    )
    @example(ConvCase(n=1, c_in=9, c_out=9, h=4, w=4, **PADDED), "fp32", False)
    @example(ConvCase(n=1, c_in=20, c_out=20, h=9, w=9, **PADDED), "fp32", False)
    @example(ConvCase(n=1, c_in=3, c_out=20, h=20, w=24, **PADDED), "high", False)
    @example(ConvCase(n=2, c_in=128, c_out=130, h=19, w=20, **PADDED), "fp32", False)
    @example(ConvCase(n=2, c_in=128, c_out=130, h=19, w=20, **PADDED), "high", True)
    @example(ConvCase(n=1, c_in=20, c_out=20, h=19, w=20, **PADDED), "fp32", True)
    def draw(case: ConvCase, precision: str, inferring: bool) -> None:
        tensors = case.inputs()
        if inferring:
            tensors["weight"] = torch.nn.Parameter(tensors["weight"])
        linear = [tensors.get(name) for name in ("x", "weight", "in_scale", "out_scale")]
        with fastgan.precision(precision), torch.set_grad_enabled(not inferring):
            named = fastgan.explain("scaled_conv2d", *linear, **case.options(), backend="cpp").algorithm
            calls, tiles = algorithm_calls(), winograd_tile_calls()
            case.call(tensors, "cpp")
        (served,) = (name for name in names if algorithm_calls()[name] > calls[name])
        used = [tile for tile, count in winograd_tile_calls().items() if count > tiles[tile]]
        assert named == "".join([served, *(f" F({m}x{m}, {r}x{r})" for m, r in used)])

    with reaching(*names):
        draw()
