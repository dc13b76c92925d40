"""scaled_conv2d on Triton, under its interpreter: values, gradients and second order against the float64 reference.

The interpreter runs each program in NumPy, so it proves indices, masks, phases, scales and sums. It cannot show TF32's
rounding (it multiplies float32 exactly whatever the precision asked for) nor how tensor cores add up bfloat16 products
(its operands are widened to float32 first); memory, registers and instructions are what the GPU report reads.
"""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from fastgan.kernels._dot import convolution_precision
from fastgan.kernels._launch import recorded
from torch import Tensor

import fastgan
from fastgan import ops
from fastgan.kernels import _tiles
from fastgan.kernels import scaled_conv2d as kernel
from fastgan.kernels import scaled_conv2d_weight_grad as weight_kernel
from fastgan.ops import scaled_conv2d
from fastgan.reference.activation import ACTIVATIONS

# (C_in, C_out, H, W, kernel, options): every geometry of the models, at odd and prime sizes.
GEOMETRIES = {
    "3x3": (5, 7, 3, 5, 3, {"padding": 1}),
    "1x1": (8, 3, 5, 3, 1, {}),
    "4x4 s2": (3, 5, 6, 5, 4, {"stride": 2, "padding": 1}),
    "3x3 s2": (4, 3, 7, 5, 3, {"stride": 2}),
    "7x7 reflect": (2, 3, 4, 4, 7, {"padding": 3, "padding_mode": "reflect"}),
    "3x3 replicate": (3, 4, 3, 4, 3, {"padding": 1, "padding_mode": "replicate"}),
    "3x3 asymmetric": (3, 4, 4, 3, 3, {"padding": (0, 1, 2, 0)}),
    "3x3 dilated": (3, 4, 5, 6, 3, {"padding": 2, "dilation": 2}),
    "transposed 4x4 s2": (6, 5, 3, 2, 4, {"stride": 2, "padding": 1, "transposed": True}),
    "transposed 3x3 s2": (3, 4, 3, 3, 3, {"stride": 2, "transposed": True}),
    "transposed 3x3 s2 with output padding": (
        *(3, 4, 2, 3, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "transposed": True},
    ),
    "transposed 1x1 s3": (3, 4, 2, 3, 1, {"stride": 3, "output_padding": 1, "transposed": True}),
    "transposed 3x3 dilated": (3, 4, 3, 4, 3, {"padding": 1, "dilation": 2, "transposed": True}),
    "transposed from one pixel": (6, 5, 1, 1, 4, {"stride": 2, "padding": 1, "transposed": True}),
}
POINTWISE = {
    "stylegan": {"noise": True, "bias": True, "act": "lrelu", "clamp": 1.5},
    "residual": {"bias": True, "act": "tanh", "residual": True, "residual_gain": 0.7},
}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# Two roundings of the result; a gradient is made of a few.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@contextlib.contextmanager
def float32_precision(name: str):
    """torch's precision of float32 convolutions, "ieee" or "tf32", inside the ``with`` block."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = name
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture(autouse=True)
def _exact_and_few_programs(monkeypatch):
    """Exact float32, and the largest tiles: each program costs the interpreter about the same, whatever its size."""
    monkeypatch.setattr(_tiles, "BUSY", 1)
    with float32_precision("ieee"):
        yield


def make_inputs(geometry: str, pointwise: dict, *, n: int = 2, dtype=torch.float32) -> dict[str, Tensor]:
    """Named float64 leaves; x, weight and residual hold values of ``dtype``, the others of float32."""
    g = torch.Generator().manual_seed(0)
    c_in, c_out, h, w, k, options = GEOMETRIES[geometry]
    shape = (c_in, c_out, k, k) if options.get("transposed") else (c_out, c_in, k, k)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    inputs = {"x": normal(n, c_in, h, w), "weight": normal(*shape) / (c_in * k * k) ** 0.5}
    inputs["in_scale"] = 10 ** (torch.rand(n, c_in, generator=g, dtype=torch.float64) - 0.5)
    inputs["out_scale"] = 10 ** (torch.rand(n, c_out, generator=g, dtype=torch.float64) - 0.5)
    with torch.device("meta"):
        out = scaled_conv2d(torch.empty(n, c_in, h, w), torch.empty(shape), **options, backend="reference").shape
    if pointwise.get("noise"):
        inputs |= {"noise": normal(n, 1, *out[2:]), "noise_strength": torch.tensor(0.3, dtype=torch.float64)}
    if pointwise.get("bias"):
        inputs["bias"] = normal(c_out)
    if pointwise.get("residual"):
        inputs["residual"] = normal(*out)
    return {k: v.to(dtype if k in ("x", "weight", "residual") else torch.float32).double() for k, v in inputs.items()}


def typed(inputs: dict[str, Tensor], dtype: torch.dtype, layout=torch.contiguous_format) -> dict[str, Tensor]:
    """Leaves of a call: x, weight and residual in ``dtype`` and ``layout``, the others in the accumulation dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {}
    for name, value in inputs.items():
        image = name in ("x", "weight", "residual")
        value = value.to(dtype if image else wide, copy=True)
        leaves[name] = (value.contiguous(memory_format=layout) if image else value).requires_grad_()
    return leaves


def call(leaves: dict[str, Tensor], geometry: str, pointwise: dict, **kwargs) -> Tensor:
    epilogue = {k: v for k, v in pointwise.items() if k not in ("noise", "bias", "residual")}
    epilogue |= {k: v for k, v in leaves.items() if k in ("noise", "noise_strength", "bias", "residual")}
    scales = {k: leaves.get(k) for k in ("in_scale", "out_scale")}
    options = GEOMETRIES[geometry][5]
    return scaled_conv2d(
        leaves["x"], leaves["weight"], **scales, **options, epilogue=ops.Epilogue(**epilogue), **kwargs
    )


def eager(leaves: dict[str, Tensor], geometry: str, pointwise: dict) -> Tensor:
    """What users write in plain torch, in the dtype of x throughout."""
    options, dtype = dict(GEOMETRIES[geometry][5]), leaves["x"].dtype
    x = leaves["x"] * leaves["in_scale"].to(dtype)[:, :, None, None]
    if options.pop("transposed", False):
        y = F.conv_transpose2d(x, leaves["weight"], **options)
    else:
        padding, mode = options.pop("padding", 0), options.pop("padding_mode", "constant")
        padding = padding if isinstance(padding, tuple) else (padding,) * 4
        y = F.conv2d(F.pad(x, padding, mode=mode), leaves["weight"], **options)
    y = y * leaves["out_scale"].to(dtype)[:, :, None, None]
    if "noise" in leaves:
        y = y + (leaves["noise"] * leaves["noise_strength"]).to(dtype)
    activation = ACTIVATIONS[pointwise["act"]]
    y = activation.function(y + leaves["bias"].to(dtype)[:, None, None], activation.alpha) * activation.gain
    if pointwise.get("clamp"):
        y = y.clamp(-pointwise["clamp"], pointwise["clamp"])
    return y + leaves["residual"] * pointwise["residual_gain"] if "residual" in leaves else y


def cotangent(like: Tensor, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=g, dtype=torch.float64).to(like.dtype)


def value_and_grads(leaves, geometry, pointwise, function=call, **kwargs) -> dict[str, Tensor]:
    y = function(leaves, geometry, pointwise, **kwargs)
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent(y, 9))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def second_order(leaves, geometry, pointwise, **kwargs) -> dict[str, Tensor]:
    """Gradients, against random cotangents, of all first gradients together."""
    y = call(leaves, geometry, pointwise, **kwargs)
    values = list(leaves.values())
    first = torch.autograd.grad(y, values, cotangent(y, 9).requires_grad_(), create_graph=True)
    weighed = [cotangent(gradient, 10 + i) for i, gradient in enumerate(first)]
    pairs = [(g, v) for g, v in zip(first, weighed, strict=True) if g.requires_grad]
    second = torch.autograd.grad([g for g, _ in pairs], values, [v for _, v in pairs], allow_unused=True)
    return {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(leaves.items(), second, strict=True)}


def errors(got: dict[str, Tensor], exact: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, float]:
    """Max-norm errors; a scalar gradient against the root sum of squares of its terms, which may cancel by luck."""
    scale = {k: v.abs().max().clamp_min(1e-30) for k, v in exact.items()}
    if "noise" in inputs:
        scale["noise_strength"] = (exact["noise"] / inputs["noise_strength"] * inputs["noise"]).norm()
    return {k: ((got[k].double() - v).abs().max() / scale[k]).item() for k, v in exact.items()}


def check_against_eager(geometry: str, pointwise: dict, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """At most twice eager torch's error in the same dtype, plus two roundings."""
    # 49 taps are 49 programs of the weight gradient, and as many passes for each sample.
    inputs = make_inputs(geometry, pointwise, dtype=dtype, n=1 if geometry == "7x7 reflect" else 2)
    exact = value_and_grads(typed(inputs, torch.float64), geometry, pointwise, backend="reference")
    fused = value_and_grads(typed(inputs, dtype, layout), geometry, pointwise, backend="triton")
    plain = value_and_grads(typed(inputs, dtype, layout), geometry, pointwise, function=eager)
    allowed = errors(plain, exact, inputs)
    for key, error in errors(fused, exact, inputs).items():
        assert error <= 2 * allowed[key] + FLOOR[dtype], f"{key}: {error:.2e}, eager {allowed[key]:.2e}"


# Each geometry in one layout and with one epilogue, in turn: every program costs the interpreter a tenth of a second.
TURNS = list(zip(GEOMETRIES, itertools.cycle(itertools.product(LAYOUTS, POINTWISE)), strict=False))


@pytest.mark.parametrize(("geometry", "turn"), TURNS, ids=[f"{g}, {t[0]}, {t[1]}" for g, t in TURNS])
def test_values_and_gradients_against_float64(geometry, turn):
    check_against_eager(geometry, POINTWISE[turn[1]], torch.float32, LAYOUTS[turn[0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("geometry", ["3x3", "4x4 s2", "transposed 3x3 s2 with output padding"])
def test_half_types_against_float64(geometry, dtype):
    """Checked where the result is smooth: x · in_scale is rounded for the tensor cores, and a value that passes
    lrelu's kink or the clamp by that rounding has another gradient."""
    check_against_eager(geometry, {"noise": True, "bias": True, "act": "softplus"}, dtype, torch.channels_last)


CURVED = itertools.cycle([{"noise": True, "bias": True, "act": "softplus"}, {"act": "swish", "residual": True}])
SECOND_ORDER = ["3x3", "1x1", "4x4 s2", "3x3 s2", "3x3 replicate", "transposed 4x4 s2"]
SECOND_ORDER += ["transposed 3x3 s2 with output padding"]


@pytest.mark.parametrize(("geometry", "pointwise"), list(zip(SECOND_ORDER, CURVED, strict=False)), ids=SECOND_ORDER)
def test_second_order_against_float64(geometry, pointwise):
    inputs = make_inputs(geometry, pointwise)
    exact = second_order(typed(inputs, torch.float64), geometry, pointwise, backend="reference")
    fused = second_order(typed(inputs, torch.float32, torch.channels_last), geometry, pointwise, backend="triton")
    for key, value in exact.items():
        assert (fused[key].double() - value).abs().max() <= 3e-6 * value.abs().max(), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_second_order_of_half_types(dtype):
    pointwise = {"bias": True, "act": "softplus"}
    inputs = make_inputs("1x1", pointwise, dtype=dtype)
    exact = second_order(typed(inputs, torch.float64), "1x1", pointwise, backend="reference")
    fused = second_order(typed(inputs, dtype, torch.channels_last), "1x1", pointwise, backend="triton")
    for key, value in exact.items():
        bound = 20 * torch.finfo(dtype).eps
        assert (fused[key].double() - value).abs().max() <= bound * value.abs().max(), key


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_and_their_clamp(act):
    for gain, clamp, residual in [(None, None, False), (0.8, 0.6, False), (None, 0.7, True), (-1.5, None, False)]:
        pointwise = {"bias": True, "act": act, "gain": gain, "clamp": clamp, "residual": residual}
        inputs = make_inputs("1x1", pointwise)
        exact = value_and_grads(typed(inputs, torch.float64), "1x1", pointwise, backend="reference")
        fused = value_and_grads(typed(inputs, torch.float32), "1x1", pointwise, backend="triton")
        assert max(errors(fused, exact, inputs).values()) <= 3e-6, (gain, clamp, residual)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_at_the_ends_of_the_range(act):
    x = torch.tensor([-200.0, -89.0, -88.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 88.0, 89.0, 200.0])
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        leaf = x.to(dtype).reshape(1, 1, 1, -1).requires_grad_()
        y = scaled_conv2d(leaf, torch.ones(1, 1, 1, 1, dtype=dtype), epilogue=ops.Epilogue(act=act), backend=backend)
        results.append((y.double(), torch.autograd.grad(y.sum(), leaf)[0].double()))
    # Values below e^-87 are flushed to zero; a slope taken from the result is exact to a rounding of the result.
    for got, want, floor in zip(*results, (1e-36, 1e-7), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=floor)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_goes_through_every_activation(act):
    x = torch.tensor([torch.nan, 1.0]).reshape(1, 1, 1, 2)
    epilogue = ops.Epilogue(act=act, clamp=2.0)
    y = scaled_conv2d(x, torch.ones(1, 1, 1, 1), epilogue=epilogue, backend="triton").flatten()
    assert y[0].isnan() and y[1].isfinite()


def test_nan_stays_in_its_sample():
    """Also where a tile joins samples, as it does here."""
    inputs = typed(make_inputs("3x3", POINTWISE["stylegan"], n=3), torch.float16)
    with torch.no_grad():
        inputs["x"][1, 2, 1, 2] = torch.nan
        with recorded() as launches:
            y = call(inputs, "3x3", POINTWISE["stylegan"], backend="triton")
    assert launches[0].constants["BLOCK_S"] > 1
    assert not y[0].isnan().any() and not y[2].isnan().any()
    assert y[1, :, 1, 2].isnan().all()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_one_launch_a_layer(geometry):
    inputs = typed(make_inputs(geometry, POINTWISE["stylegan"]), torch.float16, torch.channels_last)
    with recorded() as launches, torch.no_grad():
        call(inputs, geometry, POINTWISE["stylegan"], backend="triton")
    assert [launch.kernel.__name__ for launch in launches] == ["conv_fwd_kernel"]


def test_small_tiles_give_the_same_as_large_ones(monkeypatch):
    """What fills a GPU: several programs in every direction, pixels split over programs, parts added up."""
    pointwise = POINTWISE["stylegan"]
    inputs = make_inputs("3x3", pointwise)
    exact = value_and_grads(typed(inputs, torch.float64), "3x3", pointwise, backend="reference")
    monkeypatch.setattr(_tiles, "BUSY", 128)
    with recorded() as launches:
        fused = value_and_grads(typed(inputs, torch.float32), "3x3", pointwise, backend="triton")
    assert "sum_parts_kernel" in [launch.kernel.__name__ for launch in launches]
    assert max(errors(fused, exact, inputs).values()) <= 1e-6


def test_launches_of_a_backward_pass(monkeypatch):
    """Six: two for the epilogue's gradients, two for x's and in_scale's, two for the weight's; the second of each adds
    up parts, and is not there where there is one part."""
    inputs = typed(make_inputs("3x3", POINTWISE["stylegan"]), torch.float16, torch.channels_last)
    leaves = [v for k, v in inputs.items() if k != "noise"]
    for busy, sums in ((1, []), (128, ["sum_parts_kernel"])):
        monkeypatch.setattr(_tiles, "BUSY", busy)
        y = call(inputs, "3x3", POINTWISE["stylegan"], backend="triton")
        with recorded() as launches:
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        names = [launch.kernel.__name__ for launch in launches]
        first = ["epilogue_grad_kernel", "epilogue_sums_kernel", "conv_fwd_kernel"]
        assert names == [*first, *sums, "conv_weight_grad_kernel", *sums]


def test_bitwise_the_same_every_time(monkeypatch):
    monkeypatch.setattr(_tiles, "BUSY", 16)
    inputs = make_inputs("4x4 s2", POINTWISE["stylegan"])
    runs = [
        value_and_grads(typed(inputs, torch.float32), "4x4 s2", POINTWISE["stylegan"], backend="triton")
        for _ in range(2)
    ]
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_layouts_and_strides():
    dense = torch.randn(4, 6, 6, 8, generator=torch.Generator().manual_seed(0))
    weight, in_scale = cotangent(torch.empty(5, 3, 3, 3), 1), cotangent(torch.empty(2, 3), 2)
    residual = cotangent(torch.empty(2, 6, 4, 8), 3)[:, :5, :, ::2]
    views = {
        "sliced": dense[::2, 1:4, 1:5, ::2],
        "transposed": dense.transpose(2, 3)[:2, :3, :4, :4],
        "expanded": dense[:1, :3, :4, :1].expand(2, 3, 4, 4),
        "channels_last": dense[:2, :3, :4, :4].contiguous(memory_format=torch.channels_last),
        "one channel apart": dense[:2, :4, :4, :4].contiguous(memory_format=torch.channels_last)[:, 1:],
    }
    for name, x in views.items():
        results = []
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, "triton")):
            # From the view itself, so that its strides reach the kernels.
            leaf = x.detach().double() if backend == "reference" else x.detach()
            leaf.requires_grad_()
            w = weight.to(dtype).requires_grad_()
            epilogue = ops.Epilogue(act="tanh", residual=residual.to(dtype))
            y = scaled_conv2d(leaf, w, in_scale.to(dtype), padding=1, epilogue=epilogue, backend=backend)
            # The gradient of a sum is one value expanded to the result's shape.
            results.append((y, *torch.autograd.grad(y.sum(), (leaf, w))))
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(
                got.double(), want, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    nhwc = scaled_conv2d(views["channels_last"], weight, padding=1)
    assert nhwc.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, "C"), (1, "C"), ("C",), (1, 1), ()], ids=str)
def test_every_form_of_scale(shape):
    inputs = make_inputs("4x4 s2", {"bias": True})
    for name, channels in (("in_scale", 3), ("out_scale", 5)):
        inputs[name] = cotangent(torch.empty([channels if s == "C" else s for s in shape]), 1).double()
    pointwise = {"bias": True, "act": "linear"}
    exact = value_and_grads(typed(inputs, torch.float64), "4x4 s2", pointwise, backend="reference")
    fused = value_and_grads(typed(inputs, torch.float32), "4x4 s2", pointwise, backend="triton")
    assert fused["in_scale"].shape == inputs["in_scale"].shape
    assert max(errors(fused, exact, inputs).values()) <= 2e-6


def test_empty_batch():
    inputs = typed(make_inputs("4x4 s2", POINTWISE["stylegan"], n=0), torch.float32)
    with recorded() as launches:
        got = value_and_grads(inputs, "4x4 s2", POINTWISE["stylegan"], backend="triton")
    assert got["y"].shape == (0, 5, 3, 2)
    assert all(got[k].shape == v.shape and not got[k].any() for k, v in inputs.items())
    assert launches == []


def test_nothing_intermediate_overflows_in_half():
    """x · in_scale and the product lie beyond float16's 65504, the layer's result and gradients do not."""
    x = torch.full((1, 16, 2, 2), 200.0, dtype=torch.float16)
    weight = torch.full((2, 16, 1, 1), 10.0, dtype=torch.float16)
    in_scale, out_scale = torch.full((1, 16), 1e4, requires_grad=True), torch.full((1, 2), 1e-7, requires_grad=True)
    y = scaled_conv2d(x, weight, in_scale, out_scale, backend="triton")
    torch.testing.assert_close(y.float(), torch.full_like(y, 32.0, dtype=torch.float32), rtol=2e-3, atol=0)
    grad_in, grad_out = torch.autograd.grad(y.float().sum(), (in_scale, out_scale))
    torch.testing.assert_close(grad_in, torch.full_like(grad_in, 200 * 10 * 1e-7 * 8), rtol=2e-3, atol=0)
    torch.testing.assert_close(grad_out, torch.full_like(grad_out, 200 * 10 * 16e4 * 4), rtol=2e-3, atol=0)


def test_the_saved_product_is_float32():
    x, weight = torch.randn(1, 4, 3, 3).half(), torch.randn(2, 4, 1, 1).half()
    pointwise = kernel.Convolution((1, 1), (0, 0), (0, 0), (1, 1), False)
    assert kernel.plan(x, weight, None, None, kernel.Tail(), pointwise, save_conv=True).c.dtype == torch.float32


def test_offsets_beyond_32_bits():
    """Samples and rows that lie 2^31 elements apart, in memory that is reserved and never touched between them."""
    poisoned = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # 8 GiB, of which some bytes are used
    storage = torch.empty(2**32 + 2**22, dtype=torch.float16)
    torch.utils.deterministic.fill_uninitialized_memory = poisoned
    for strides in ((2**32, 16, 4, 1), (16, 64, 2**31, 1), (16, 2**31, 4, 1)):
        x = storage.as_strided((2, 2, 2, 4), strides)
        values = cotangent(torch.empty(2, 2, 2, 4), 4).half()
        x.copy_(values)
        weight = cotangent(torch.empty(3, 2, 3, 3), 5).half()
        want = scaled_conv2d(values.double(), weight.double(), padding=1, backend="reference")
        got = scaled_conv2d(x, weight, padding=1, backend="triton")
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)
        leaf, w = x.detach(), weight.clone().requires_grad_()
        (grad,) = torch.autograd.grad(scaled_conv2d(leaf, w, padding=1, backend="triton").sum(), w)
        (exact,) = torch.autograd.grad(
            scaled_conv2d(values.double(), (w64 := w.detach().double().requires_grad_()), padding=1).sum(), w64
        )
        torch.testing.assert_close(grad.double(), exact, rtol=2e-3, atol=2e-3)


def test_what_the_kernels_do_not_know_runs_on_the_fallback():
    g = torch.Generator().manual_seed(0)
    cases = [
        (torch.randn(1, 4, 3, 3, generator=g), torch.randn(4, 2, 3, 3, generator=g), {"groups": 2}),
        (
            torch.randn(1, 2, 3, 3, generator=g),
            torch.randn(2, 3, 3, 3, generator=g),
            {"stride": 2, "dilation": 2, "transposed": True},
        ),
    ]
    for x, weight, options in cases:
        with recorded() as launches:
            got = scaled_conv2d(x, weight, **options, backend="triton")
        assert launches == []
        torch.testing.assert_close(got, scaled_conv2d(x, weight, **options, backend="reference"))
    with pytest.raises(ValueError, match="it takes float32, bfloat16 and float16, got torch"):
        scaled_conv2d(cases[0][0].double(), cases[0][1].double(), groups=2, backend="triton")


def test_tf32_only_where_torch_allows_it():
    x = torch.empty(0)
    assert convolution_precision(x) == "ieee"
    with float32_precision("tf32"):
        assert convolution_precision(x) == "tf32"
        assert convolution_precision(x.half()) == "ieee"


@pytest.mark.parametrize("precision", ["fp32", "high"])
def test_high_precision_multiplies_float32_exactly_whatever_torch_allows(precision):
    """In the forward, in both gradients, which are asked for elsewhere, and where the launch demodulates."""
    leaves = typed(make_inputs("3x3", POINTWISE["stylegan"]), torch.float32)
    weight, style = leaves["weight"].detach(), leaves["in_scale"].detach()
    with float32_precision("tf32"), recorded() as launches:
        with fastgan.precision(precision):
            y = call(leaves, "3x3", POINTWISE["stylegan"], backend="triton")
            with torch.no_grad():
                ops.modulated_conv2d(leaves["x"], weight, style, weight_energy=ops.weight_energy(weight))
        torch.autograd.grad(y.sum(), [leaves["x"], leaves["weight"], leaves["in_scale"]])
    products = [launch.constants["PRECISION"] for launch in launches if "PRECISION" in launch.constants]
    assert products == ["ieee" if precision == "high" else "tf32"] * 4


def test_a_pixel_tile_covers_with_little_beyond():
    for n, h, w, most in itertools.product((1, 3, 64), (1, 5, 9, 257), (1, 4, 31, 257), (16, 128)):
        tile = _tiles.pixel_tile(n, h, w, most)
        tiles = tile.count(n, h, w)
        assert 16 <= tile.pixels <= most
        assert all(t & (t - 1) == 0 for t in tile)
        assert tiles[0] * tile.s >= n and tiles[1] * tile.h >= h and tiles[2] * tile.w >= w
    # A 257 × 257 map, what a transposed convolution makes of 128 × 128: under a tenth beyond it.
    tile = _tiles.pixel_tile(1, 257, 257, 128)
    _, rows, columns = tile.count(1, 257, 257)
    assert rows * columns * tile.pixels <= 1.1 * 257 * 257


def test_shipped_layers_are_one_launch_near_the_compulsory_bytes():
    labels = [label for label, _ in kernel.shipped()]
    assert len(labels) == len(set(labels))
    for label, launches in kernel.shipped():
        assert len(launches) == 1 or label.endswith("data gradient"), label
        # The style that demodulation takes is in_scale: once.
        tensors = {id(t): t for t in launches[0].arguments.values() if isinstance(t, Tensor)}.values()
        assert launches[0].bytes == sum(t.numel() * t.element_size() for t in tensors), label
    assert all(1 <= len(launches) <= 2 for _, launches in weight_kernel.shipped())
    (first,) = [launches[0] for label, launches in kernel.shipped() if label == "StyleGAN2-256 b64.conv1 fp16 NHWC"]
    assert first.flops == 2 * 8 * 512 * 512 * (9 * 64 * 64 + 1)


def test_torch_compile():
    pointwise = POINTWISE["stylegan"]
    inputs = typed(make_inputs("3x3", pointwise), torch.float32)
    want = value_and_grads(inputs, "3x3", pointwise, backend="triton")

    def compiled(leaves, geometry, pointwise):
        return torch.compile(call, backend="aot_eager", fullgraph=True)(leaves, geometry, pointwise, backend="triton")

    got = value_and_grads(inputs, "3x3", pointwise, function=compiled)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5)
