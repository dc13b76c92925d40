"""scaled_conv2d where the small side of a layer has few pixels, which it computes itself: against torch in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_float64, layouts
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastgan import ops  # noqa: F401  (registers the op)

MOST_PIXELS = 32  # kMaxPixels of csrc/cpu/few_pixels.cpp


def fused(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options) -> Tensor:
    """The C++ op itself, with nothing but the convolution and its bias."""
    pair = {k: (v, v) if isinstance(v, int) else v for k, v in options.items()}
    return torch.ops.fastgan.scaled_conv2d.default(
        x, weight, None, None, None, None, bias, None,
        pair.get("stride", (1, 1)), pair.get("padding", (0, 0)), pair.get("output_padding", (0, 0)),
        (1, 1), options.get("transposed", False), 1, "fp32", "linear", 0.0, 1.0, None, 1.0, False,
    )[0]  # fmt: skip


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options) -> Tensor:
    options = dict(options)
    transposed = options.pop("transposed", False)
    return (F.conv_transpose2d if transposed else F.conv2d)(x, weight, bias, **options)


def make(n, c_in, c_out, h, w, kernel, *, transposed=False, dtype=torch.float32, seed=0):
    """x [n, c_in, h, w], weight, bias [c_out]; values of order 1, and results too."""
    g = torch.Generator().manual_seed(seed)
    shape = (c_in, c_out, *kernel) if transposed else (c_out, c_in, *kernel)
    x = torch.randn(n, c_in, h, w, generator=g, dtype=torch.float64)
    weight = torch.randn(shape, generator=g, dtype=torch.float64) / (c_in * kernel[0] * kernel[1]) ** 0.5
    bias = torch.randn(c_out, generator=g, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def runs_torch(x: Tensor, weight: Tensor, **options) -> bool:
    """Whether the op hands this call to torch's convolution."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        fused(x, weight, **options)
    return any(event.key.startswith("aten::convolution") for event in trace.key_averages())


def significant_strides(x: Tensor) -> list[int]:
    """Strides over which there is anything to step."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1] if x.numel() else []


@st.composite
def calls(draw):
    """A call whose small side has at most MOST_PIXELS + 8 pixels: inside the bound, at it and outside."""
    transposed = draw(st.booleans())
    kernel = tuple(draw(st.sampled_from([1, 2, 3, 4, 7])) for _ in range(2))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(2))
    padding = tuple(draw(st.integers(0, k)) for k in kernel)
    output_padding = tuple(draw(st.integers(0, s - 1)) for s in stride) if transposed else (0, 0)
    n, h, w = draw(st.integers(0, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    sizes = [
        (size - 1) * s - 2 * p + k + extra if transposed else (size + 2 * p - k) // s + 1
        for size, k, s, p, extra in zip((h, w), kernel, stride, padding, output_padding, strict=True)
    ]
    assume(min(sizes) >= 1)
    assume(n * (h * w if transposed else sizes[0] * sizes[1]) <= MOST_PIXELS + 8)
    options = {"stride": stride, "padding": padding, "transposed": transposed}
    if transposed:
        options["output_padding"] = output_padding
    channels = st.sampled_from([1, 2, 3, 5, 8, 17, 33, 67])
    return (n, draw(channels), draw(channels), h, w, kernel), options, draw(st.integers(0, 99))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(calls(), st.sampled_from(["contiguous", "channels_last", "sliced"]))
def test_any_geometry_has_the_layout_of_torchs_result(case, layout):
    shape, options, seed = case
    x, weight, _ = make(*shape, transposed=options["transposed"], seed=seed)
    x = layouts(x)[layout] if x.numel() else x
    assert significant_strides(fused(x, weight, **options)) == significant_strides(plain(x, weight, **options))


# Near a bottleneck: (n, c_in, c_out, size, kernel, options).
BOTTLENECK = {
    "2 to 1": (1, 512, 512, 2, 4, {"stride": 2, "padding": 1}),
    "8 to 4": (2, 96, 130, 8, 4, {"stride": 2, "padding": 1}),
    "4x4 s1 to a logit": (3, 200, 1, 4, 4, {"padding": 1}),
    "3x3": (2, 150, 70, 4, 3, {"padding": 1}),
    "7x7": (1, 40, 20, 4, 7, {"padding": 3}),
    "1x1": (2, 1030, 70, 4, 1, {}),
    "1 to 2": (1, 512, 512, 1, 4, {"stride": 2, "padding": 1, "transposed": True}),
    "2 to 4": (2, 1024, 64, 2, 4, {"stride": 2, "padding": 1, "transposed": True}),
    "4 to 8": (2, 130, 96, 4, 4, {"stride": 2, "padding": 1, "transposed": True}),
    "transposed 3x3": (1, 70, 150, 5, 3, {"stride": 2, "padding": 1, "output_padding": 1, "transposed": True}),
    "transposed 7x7": (1, 40, 20, 5, 7, {"padding": 3, "transposed": True}),
    "transposed to colour": (2, 64, 3, 4, 4, {"stride": 2, "padding": 1, "transposed": True}),
}


def make_bottleneck(name: str, dtype=torch.float32):
    n, c_in, c_out, size, kernel, options = BOTTLENECK[name]
    transposed = options.get("transposed", False)
    return make(n, c_in, c_out, size, size, (kernel, kernel), transposed=transposed, dtype=dtype), options


@pytest.mark.parametrize("name", BOTTLENECK)
def test_layers_of_the_models(name):
    """Values, that torch's convolution is not called, and the same bits for any number of threads."""
    (x, weight, bias), options = make_bottleneck(name)
    exact = plain(x.double(), weight.double(), bias.double(), **options)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fused(x, weight, bias, **options))
    finally:
        torch.set_num_threads(threads)
    assert_close_to_float64(results[0], plain(x, weight, bias, **options), exact, floor=1e-6)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not runs_torch(x, weight, **options)


@pytest.mark.parametrize("name", [name for name, case in BOTTLENECK.items() if case[0] > 1])
def test_nan_stays_in_its_sample(name):
    (x, weight, bias), options = make_bottleneck(name)
    clean = fused(x, weight, bias, **options)
    x[1] = torch.nan
    y = fused(x, weight, bias, **options)
    assert y[1].isnan().any()
    assert torch.equal(y[0], clean[0])


def test_nan_of_one_pixel_reaches_what_its_taps_reach():
    """Taps over padding are no products with the image: what torch's definition leaves finite is finite."""
    for transposed, size in itertools.product((False, True), (3, 4)):
        x, weight, _ = make(1, 5, 6, size, size, (3, 3), transposed=transposed)
        x[0, 2, 0, 1] = torch.nan
        options = {"stride": 2, "padding": 1, "transposed": transposed}
        want = plain(x.double(), weight.double(), **options).isnan()
        assert torch.equal(fused(x, weight, **options).isnan(), want)
        assert not want.all()


def test_what_is_left_to_torch():
    """More pixels than our products win at, a weight in channels_last and an empty batch; but not half precision, which
    is widened before."""
    weight = torch.randn(9, 10, 3, 3)
    at, above = torch.randn(1, 10, 4, 8), torch.randn(1, 10, 13, 11)
    for transposed in (False, True):
        w = weight.transpose(0, 1).contiguous() if transposed else weight
        assert not runs_torch(at, w, padding=1, transposed=transposed)
        assert runs_torch(above, w, padding=1, transposed=transposed)
        assert not runs_torch(at.bfloat16(), w.bfloat16(), padding=1, transposed=transposed)
        last = w.contiguous(memory_format=torch.channels_last)
        assert runs_torch(at, last, padding=1, transposed=transposed)
        assert runs_torch(at[:0], w, padding=1, transposed=transposed)
        assert not runs_torch(at, torch.randn(10, 10, 8, 8), stride=2, padding=4, transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_wrong_arguments_get_torchs_own_errors(transposed):
    x, weight = torch.randn(1, 4, 2, 2), torch.randn(5, 5, 3, 3)
    with pytest.raises(RuntimeError, match="channels"):
        fused(x, weight, padding=1, transposed=transposed)
    weight = torch.randn(4, 4, 3, 3)
    with pytest.raises(RuntimeError, match="bias"):
        fused(x, weight, torch.zeros(3), padding=1, transposed=transposed)
    with pytest.raises(RuntimeError, match="stride"):
        fused(x, weight, stride=0, padding=1, transposed=transposed)
    if transposed:
        with pytest.raises(RuntimeError, match=r"output.padding"):
            fused(x, weight, padding=1, output_padding=1, transposed=True)
    else:
        with pytest.raises(RuntimeError, match="Kernel size"):
            fused(x, weight)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", ["2 to 1", "8 to 4", "1 to 2", "4 to 8"])
def test_fake_result_has_the_same_strides(name, layout):
    (x, weight, bias), options = make_bottleneck(name)
    transposed = options.get("transposed", False)
    x = layouts(x)[layout]
    args = (x, weight, None, None, None, None, bias, None, (2, 2), (1, 1), (0, 0), (1, 1), transposed, 1)
    op = torch.ops.fastgan.scaled_conv2d.default
    torch.library.opcheck(op, (*args, "fp32", "linear", 0.0, 1.0, None, 1.0, False), test_utils="test_faketensor")


@pytest.mark.parametrize("name", ["4x4 s1 to a logit", "transposed 3x3"])
def test_gradients_of_both_orders(name):
    n, c_in, c_out, size, kernel, options = BOTTLENECK[name]
    transposed = options.get("transposed", False)
    x, weight, bias = make(n, 3, 2, size, size, (kernel, kernel), transposed=transposed, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(*inputs):
        return fused(*inputs, **options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
