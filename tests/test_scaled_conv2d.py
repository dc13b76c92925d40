"""scaled_conv2d: values and gradients against the float64 reference, derivatives of both orders, layouts, dtypes,
errors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan import ops
from fastgan.ops import scaled_conv2d
from fastgan.reference.activation import ACTIVATIONS

# (C_in, C_out, H, W, kernel, options): every geometry of the models, and prime sizes.
GEOMETRIES = {
    "3x3": (5, 7, 11, 13, 3, {"padding": 1}),
    "1x1": (8, 3, 7, 5, 1, {}),
    "4x4 s2": (3, 8, 12, 10, 4, {"stride": 2, "padding": 1}),
    "4x4 s2 odd": (3, 4, 11, 13, 4, {"stride": 2, "padding": 1}),
    "4x4 s2 to one pixel": (6, 5, 2, 2, 4, {"stride": 2, "padding": 1}),
    "4x4 s1": (4, 1, 9, 8, 4, {"padding": 1}),
    "7x7 reflect": (3, 4, 9, 11, 7, {"padding": 3, "padding_mode": "reflect"}),
    "3x3 replicate": (3, 4, 5, 7, 3, {"padding": 1, "padding_mode": "replicate"}),
    "3x3 asymmetric": (3, 4, 6, 7, 3, {"padding": (0, 1, 2, 0)}),
    "transposed 4x4 s2": (6, 5, 5, 7, 4, {"stride": 2, "padding": 1, "transposed": True}),
    "transposed 3x3 s2": (6, 5, 5, 4, 3, {"stride": 2, "padding": 1, "output_padding": 1, "transposed": True}),
    "transposed 4x4 s2 from one pixel": (6, 5, 1, 1, 4, {"stride": 2, "padding": 1, "transposed": True}),
    "dilated groups": (4, 6, 9, 9, 3, {"padding": 2, "dilation": 2, "groups": 2}),
    "transposed groups": (4, 6, 5, 5, 3, {"stride": 2, "groups": 2, "transposed": True}),
}
POINTWISE = {
    "plain": {},
    "bias": {"bias": True},
    "lrelu": {"bias": True, "act": "lrelu", "gain": 1.0},
    "stylegan": {"noise": True, "bias": True, "act": "lrelu", "clamp": 1.5},
    "residual": {"bias": True, "act": "relu", "gain": 1.0, "residual": True, "residual_gain": 0.7},
    "tanh": {"bias": True, "act": "tanh"},
}


def output_shape(geometry: str, n: int) -> tuple[int, ...]:
    c_in, c_out, h, w, k, options = GEOMETRIES[geometry]
    groups = options.get("groups", 1)
    shape = (c_in, c_out // groups, k, k) if options.get("transposed") else (c_out, c_in // groups, k, k)
    with torch.device("meta"):
        return tuple(
            scaled_conv2d(torch.empty(n, c_in, h, w), torch.empty(shape), **options, backend="reference").shape
        )


def make_inputs(geometry: str, pointwise: dict, *, n=2, scales=True, seed=0) -> dict[str, torch.Tensor]:
    """Named float64 leaves of one call; scales spread by 10x within a layer, as StyleGAN's styles do."""
    g = torch.Generator().manual_seed(seed)
    c_in, c_out, h, w, k, options = GEOMETRIES[geometry]
    groups = options.get("groups", 1)
    shape = (c_in, c_out // groups, k, k) if options.get("transposed") else (c_out, c_in // groups, k, k)
    inputs = {
        "x": torch.randn(n, c_in, h, w, generator=g, dtype=torch.float64),
        "weight": torch.randn(shape, generator=g, dtype=torch.float64) / (c_in * k * k / groups) ** 0.5,
    }
    if scales:
        inputs["in_scale"] = 10 ** (torch.rand(n, c_in, generator=g, dtype=torch.float64) - 0.5)
        inputs["out_scale"] = 10 ** (torch.rand(n, c_out, generator=g, dtype=torch.float64) - 0.5)
    out = output_shape(geometry, n)
    if pointwise.get("noise"):
        inputs["noise"] = torch.randn(n, 1, *out[2:], generator=g, dtype=torch.float64)
        inputs["noise_strength"] = torch.tensor(0.3, dtype=torch.float64)
    if pointwise.get("bias"):
        inputs["bias"] = torch.randn(c_out, generator=g, dtype=torch.float64)
    if pointwise.get("residual"):
        inputs["residual"] = torch.randn(out, generator=g, dtype=torch.float64)
    return inputs


def call(inputs: dict[str, torch.Tensor], geometry: str, pointwise: dict, **kwargs) -> torch.Tensor:
    epilogue = {k: v for k, v in pointwise.items() if k not in ("noise", "bias", "residual")}
    epilogue |= {k: v for k, v in inputs.items() if k in ("noise", "noise_strength", "bias", "residual")}
    scales = {k: inputs.get(k) for k in ("in_scale", "out_scale")}
    options = GEOMETRIES[geometry][5]
    return scaled_conv2d(
        inputs["x"], inputs["weight"], **scales, **options, epilogue=ops.Epilogue(**epilogue), **kwargs
    )


def value_and_grads(inputs, geometry, pointwise, dtype, layout=torch.contiguous_format, function=call, **kwargs):
    """y and the gradients of all inputs against a fixed random cotangent; x, weight and residual in ``dtype``, the rest
    in the accumulation dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {k: v.to(dtype if k in ("x", "weight", "residual") else wide) for k, v in inputs.items()}
    leaves["x"] = leaves["x"].contiguous(memory_format=layout)
    leaves = {k: v.detach().requires_grad_() for k, v in leaves.items()}
    y = function(leaves, geometry, pointwise, **kwargs)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def eager(inputs, geometry, pointwise):
    """What users write in plain torch, in the dtype of x throughout."""
    options = dict(GEOMETRIES[geometry][5])
    x, weight, dtype = inputs["x"], inputs["weight"], inputs["x"].dtype
    if "in_scale" in inputs:
        x = x * inputs["in_scale"].to(dtype)[:, :, None, None]
    if options.pop("transposed", False):
        y = F.conv_transpose2d(x, weight, **options)
    else:
        padding, mode = options.pop("padding", 0), options.pop("padding_mode", "constant")
        padding = padding if isinstance(padding, tuple) else (padding,) * 4
        y = F.conv2d(F.pad(x, padding, mode=mode), weight, **options)
    if "out_scale" in inputs:
        y = y * inputs["out_scale"].to(dtype)[:, :, None, None]
    if "noise" in inputs:
        y = y + (inputs["noise"] * inputs["noise_strength"]).to(dtype)
    if "bias" in inputs:
        y = y + inputs["bias"].to(dtype)[:, None, None]
    act = pointwise.get("act", "linear")
    gain = pointwise.get("gain") or ACTIVATIONS[act].gain
    y = ACTIVATIONS[act].function(y, ACTIVATIONS[act].alpha) * gain
    if pointwise.get("clamp"):
        y = y.clamp(-pointwise["clamp"], pointwise["clamp"])
    return y + inputs["residual"] * pointwise["residual_gain"] if "residual" in inputs else y


def relative_errors(got: dict, exact: dict, inputs: dict | None = None) -> dict[str, float]:
    """Max-norm errors. With ``inputs``, the one scalar gradient is measured against the root sum of squares of its
    terms: against itself, it would be a matter of luck how much they cancel."""
    scale = {k: v.abs().max().clamp_min(1e-30) for k, v in exact.items()}
    if inputs is not None and "noise" in inputs:
        scale["noise_strength"] = (exact["noise"] / inputs["noise_strength"] * inputs["noise"]).norm()
    return {k: ((got[k].double() - v).abs().max() / scale[k]).item() for k, v in exact.items()}


# What remains when both errors are a few roundings: measured 4e-7 (float32) at worst over the cases below, one ulp in
# half.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_and_gradients_against_float64(geometry, dtype):
    for layout, (name, pointwise) in zip(
        itertools.cycle([torch.contiguous_format, torch.channels_last]), POINTWISE.items(), strict=False
    ):
        inputs = make_inputs(geometry, pointwise)
        # Half types: the float64 oracle starts from the rounded inputs, so that only the arithmetic is compared.
        inputs = {
            k: v.to(dtype).double() if k in ("x", "weight", "residual") else v.float().double()
            for k, v in inputs.items()
        }
        if dtype != torch.float32:
            # A clamp's gradient is a step: one value that rounds onto the bound would decide the max-norm, eager or
            # fused.
            pointwise = {**pointwise, "clamp": None}
        exact = value_and_grads(inputs, geometry, pointwise, torch.float64, backend="reference")
        fused = relative_errors(
            value_and_grads(inputs, geometry, pointwise, dtype, layout, backend="cpp"), exact, inputs
        )
        plain = relative_errors(
            value_and_grads(inputs, geometry, pointwise, dtype, layout, function=eager), exact, inputs
        )
        for key, error in fused.items():
            assert error <= 2 * plain[key] + FLOOR[dtype], (
                f"{geometry}, {name}, {key}: {error:.2e}, eager {plain[key]:.2e}"
            )


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_and_their_clamp(act):
    for gain, clamp, residual in [(None, None, False), (0.8, 0.6, False), (None, 0.7, True), (-1.5, None, False)]:
        pointwise = {"bias": True, "act": act, "gain": gain, "clamp": clamp, "residual": residual}
        inputs = make_inputs("3x3", pointwise)
        exact = value_and_grads(inputs, "3x3", pointwise, torch.float64, backend="reference")
        for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
            errors = relative_errors(value_and_grads(inputs, "3x3", pointwise, dtype, backend="cpp"), exact)
            assert max(errors.values()) <= bound, (gain, clamp, residual, dtype, errors)


def test_activations_at_the_ends_of_the_range():
    """Where exp overflows or underflows the result and the gradient stay finite and right."""
    x = torch.tensor([-200.0, -89.0, -88.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 88.0, 89.0, 200.0])
    weight = torch.ones(1, 1, 1, 1)
    for act in ACTIVATIONS:
        results = []
        for dtype, backend in ((torch.float32, "cpp"), (torch.float64, "reference")):
            leaf = x.to(dtype).reshape(1, 1, 1, -1).requires_grad_()
            y = scaled_conv2d(leaf, weight.to(dtype), epilogue=ops.Epilogue(act=act), backend=backend)
            results.append((y.double(), torch.autograd.grad(y.sum(), leaf)[0].double()))
        # Values below e^-87 are flushed to zero.
        # A slope taken from the result (1 - t² for tanh) is exact to a rounding of the result, no better; torch's own
        # are the same.
        for got, want, floor in zip(*results, (1e-36, 1e-7), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=floor, msg=lambda text, act=act: f"{act}: {text}")


@pytest.mark.parametrize("shape", [(2, "C"), (1, "C"), ("C",), (1, 1), ()], ids=str)
def test_every_form_of_scale(shape):
    inputs = make_inputs("4x4 s2", {"bias": True}, scales=False)
    for name, channels in (("in_scale", 3), ("out_scale", 8)):
        size = [channels if s == "C" else s for s in shape]
        inputs[name] = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    exact = value_and_grads(inputs, "4x4 s2", {"bias": True}, torch.float64, backend="reference")
    fused = value_and_grads(inputs, "4x4 s2", {"bias": True}, torch.float64, backend="cpp")
    assert fused["in_scale"].shape == inputs["in_scale"].shape
    assert max(relative_errors(fused, exact).values()) < 1e-13


GRAD_CASES = [
    ("3x3", {"bias": True, "act": "lrelu"}),
    ("4x4 s2", {"bias": True, "act": "tanh"}),
    ("1x1", {"act": "swish", "gain": 1.2}),
    ("4x4 s2 to one pixel", {"act": "softplus"}),
    ("transposed 4x4 s2 from one pixel", {"bias": True, "act": "sigmoid", "residual": True}),
    ("transposed 3x3 s2", {"act": "elu"}),
    ("3x3 replicate", {"noise": True, "act": "selu"}),
    ("dilated groups", {"bias": True, "act": "lrelu", "clamp": 0.9}),
    ("transposed groups", {}),
]


@pytest.mark.parametrize(("geometry", "pointwise"), GRAD_CASES, ids=[f"{g} {p.get('act', '')}" for g, p in GRAD_CASES])
def test_gradcheck_and_gradgradcheck(geometry, pointwise):
    """Both orders, for every input at once: x, weight, both scales, noise, its strength, bias, residual."""
    inputs = make_inputs(geometry, pointwise)
    names = list(inputs)

    def function(*leaves):
        return call(dict(zip(names, leaves, strict=True)), geometry, pointwise, backend="cpp")

    leaves = [v.requires_grad_() for v in inputs.values()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("geometry", ["3x3", "4x4 s2", "transposed 4x4 s2"])
def test_second_order_of_every_pair_of_inputs(geometry):
    """R1's shape: the gradient of the squared norm of each input's gradient, for every input, against the reference."""
    pointwise = {"noise": True, "bias": True, "act": "tanh", "residual": False}
    inputs = make_inputs(geometry, pointwise)
    results = []
    for backend in ("cpp", "reference"):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        y = call(leaves, geometry, pointwise, backend=backend)
        first = torch.autograd.grad((y**3).sum(), list(leaves.values()), create_graph=True)
        second = [
            torch.autograd.grad(g.square().sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
            for g in first
        ]
        results.append(second)
    for row_fused, row_exact in zip(*results, strict=True):
        for fused, exact in zip(row_fused, row_exact, strict=True):
            exact = torch.zeros_like(fused) if exact is None else exact
            torch.testing.assert_close(fused, exact, rtol=1e-9, atol=1e-9 * exact.abs().max().item())


class CountCalls(TorchDispatchMode):
    """Counts what runs below autograd: fastgan's kernels by name, and torch's convolutions."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastgan" or "convolution" in str(func):
            name = func._schema.name.split("::")[1]
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_nothing_is_computed_that_nobody_asked_for():
    epilogue = ops.Epilogue(bias=torch.zeros(4), act="lrelu")
    x, weight, scale = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.rand(2, 4)

    def backward_calls(**requires_grad):
        leaves = {"x": x.clone(), "weight": weight.clone(), "out_scale": scale.clone()}
        for name in requires_grad:
            leaves[name].requires_grad_()
        y = scaled_conv2d(leaves["x"], leaves["weight"], out_scale=leaves["out_scale"], padding=1, epilogue=epilogue)
        with CountCalls() as mode:
            torch.autograd.grad(y.sum(), [leaves[name] for name in requires_grad])
        return mode.counts

    assert backward_calls(x=True) == {"activation_grad": 1, "scaled_conv2d": 1}  # a frozen weight
    assert backward_calls(weight=True) == {"activation_grad": 1, "scaled_conv2d_weight_grad": 1}  # a first layer
    assert backward_calls(out_scale=True) == {"activation_grad": 1, "pixel_dot": 1}
    assert sum(backward_calls(x=True, weight=True, out_scale=True).values()) == 4


def test_calls_of_an_r1_penalty():
    """The inner gradient of R1 asks for the image only: no weight gradient before the outer backward."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    weights = [torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(1, 4, 3, 3, requires_grad=True)]
    hidden = scaled_conv2d(x, weights[0], padding=1, epilogue=ops.Epilogue(act="lrelu"))
    logits = scaled_conv2d(hidden, weights[1], padding=1)
    with CountCalls() as inner:
        (grad,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    assert inner.counts == {"scaled_conv2d": 2, "activation_grad": 1}
    with CountCalls() as outer:
        torch.autograd.grad(grad.square().sum(), weights)
    # The outer backward runs the two transposed convolutions' own backwards; the forward's backward is not entered,
    # since a piecewise linear network has no other second-order path.
    assert outer.counts["scaled_conv2d_weight_grad"] == 2
    assert sum(outer.counts.values()) <= 5


@pytest.mark.parametrize("geometry", ["3x3", "4x4 s2", "transposed 4x4 s2", "transposed groups"])
def test_opcheck(geometry):
    options = GEOMETRIES[geometry][5]
    inputs = {k: v.float() for k, v in make_inputs(geometry, POINTWISE["stylegan"]).items()}
    stride, padding = (options.get("stride", 1),) * 2, (options.get("padding", 0),) * 2
    transposed, groups = options.get("transposed", False), options.get("groups", 1)
    order = ("x", "weight", "in_scale", "out_scale", "noise", "noise_strength", "bias")
    for save_conv, needs_grad in ((False, False), (True, True), (False, True)):
        leaves = [inputs[name].clone().requires_grad_(needs_grad) for name in order]
        args = (
            *leaves,
            None,
            stride,
            padding,
            (0, 0),
            (1, 1),
            transposed,
            groups,
            "high" if save_conv else "fp32",
            "lrelu",
            0.2,
            1.4,
            None,
            1.0,
            save_conv,
        )
        torch.library.opcheck(torch.ops.fastgan.scaled_conv2d.default, args)
    if not transposed:
        y = torch.ops.fastgan.scaled_conv2d.default(*args)[0].detach().requires_grad_()
        args = (leaves[0], y, leaves[2], leaves[3], leaves[1].shape, stride, padding, (1, 1), groups, "fp32")
        torch.library.opcheck(torch.ops.fastgan.scaled_conv2d_weight_grad.default, args)


@pytest.mark.parametrize("act", ["lrelu", "tanh", "swish"])
def test_opcheck_of_the_small_ops(act):
    g, ref = (torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(2))
    for from_output in {ACTIVATIONS[act].invertible, False}:
        args = (g, ref, act, 0.2, 1.3, 0.9, from_output, 1)
        torch.library.opcheck(torch.ops.fastgan.activation_grad.default, args)
    torch.library.opcheck(torch.ops.fastgan.pixel_dot.default, (g, ref))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break(backend):
    inputs = {k: v.float() for k, v in make_inputs("4x4 s2", POINTWISE["stylegan"]).items()}
    names = list(inputs)

    def function(*leaves):
        return call(dict(zip(names, leaves, strict=True)), "4x4 s2", POINTWISE["stylegan"])

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = []
    for f in (function, compiled):
        leaves = [v.clone().requires_grad_() for v in inputs.values()]
        y = f(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_autocast_casts_x_and_weight_only():
    """The same bits as the op on bfloat16 tensors without autocast: nothing inside is cast a second time."""
    x, weight, bias = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.full((4,), 1 + 2.0**-12)
    scales, epilogue = (torch.rand(2, 3), torch.rand(2, 4)), ops.Epilogue(bias=bias, act="tanh")
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    for backend in ("cpp", "reference"):
        want = scaled_conv2d(x.bfloat16(), weight.bfloat16(), *scales, padding=1, epilogue=epilogue, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = scaled_conv2d(x, weight, *scales, padding=1, epilogue=epilogue, backend=backend)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want)
        for a, b in zip(*(torch.autograd.grad(y.float().square().sum(), leaves) for y in (got, want)), strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)


def test_an_unscaled_product_never_exists_in_half_precision():
    """The product overflows float16 by far; 1/σ brings it back. The convolution saved for the backward is float32."""
    x, weight = (
        torch.full((1, 64, 4, 4), 100.0, dtype=torch.float16),
        torch.full((2, 64, 3, 3), 10.0, dtype=torch.float16),
    )
    scale = torch.full((), 1e-3, requires_grad=True)
    y = scaled_conv2d(x, weight, out_scale=scale, backend="cpp")
    assert y.isfinite().all()
    assert abs(y[0, 0, 0, 0].item() - 576) < 0.5
    y.float().sum().backward()
    assert abs(scale.grad.item() / (576e3 * 8) - 1) < 1e-3


def test_layouts_and_strides():
    dense = torch.randn(4, 6, 8, 10)
    weight, in_scale = torch.randn(5, 3, 3, 3), torch.rand(2, 3)
    views = {
        "sliced": dense[::2, 1:4, 1:7, ::2],
        "transposed": dense.transpose(2, 3)[:2, :3],
        "expanded": torch.randn(1, 3, 8, 1).expand(2, 3, 8, 9),
        "channels_last": torch.randn(2, 3, 8, 9).contiguous(memory_format=torch.channels_last),
        "one channel apart": torch.randn(2, 3, 8, 9).contiguous(memory_format=torch.channels_last)[:, :, 1:],
    }
    for name, x in views.items():
        kwargs = {"padding": 1, "epilogue": ops.Epilogue(act="lrelu")}
        want = scaled_conv2d(x.double(), weight.double(), in_scale.double(), backend="reference", **kwargs)
        got = scaled_conv2d(x, weight, in_scale, backend="cpp", **kwargs)
        torch.testing.assert_close(
            got.double(), want, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    y = scaled_conv2d(views["channels_last"], weight, in_scale, padding=1)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_inputs_are_left_alone_and_results_are_fresh():
    inputs = make_inputs("1x1", POINTWISE["residual"])
    before = {k: v.clone() for k, v in inputs.items()}
    first = call(inputs, "1x1", POINTWISE["residual"])
    second = call(inputs, "1x1", POINTWISE["residual"])
    assert all(torch.equal(v, before[k]) for k, v in inputs.items())
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_empty_batch(backend):
    inputs = {k: v.requires_grad_() for k, v in make_inputs("4x4 s2", {"bias": True, "act": "lrelu"}, n=0).items()}
    y = call(inputs, "4x4 s2", {"bias": True, "act": "lrelu"}, backend=backend)
    assert y.shape == (0, 8, 6, 5)
    grads = torch.autograd.grad(y.sum(), list(inputs.values()))
    for leaf, grad in zip(inputs.values(), grads, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


def test_nan_stays_in_its_sample():
    inputs = make_inputs("3x3", POINTWISE["stylegan"])
    inputs["x"][1, 2, 3, 4] = torch.nan
    y = call(inputs, "3x3", POINTWISE["stylegan"], backend="cpp")
    assert not y[0].isnan().any()
    assert y[1, :, 3, 4].isnan().all()


def test_debug_raises_on_nan(monkeypatch):
    monkeypatch.setattr("fastgan.ops._check.DEBUG", True)
    with pytest.raises(FloatingPointError, match=r"scaled_conv2d: result 0 \[1, 2, 4, 4\] contains NaN"):
        scaled_conv2d(torch.full((1, 3, 4, 4), torch.nan), torch.randn(2, 3, 1, 1))


def test_same_result_for_any_number_of_threads():
    inputs = {k: v.float() for k, v in make_inputs("3x3", POINTWISE["stylegan"], n=3).items()}
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(value_and_grads(inputs, "3x3", POINTWISE["stylegan"], torch.float32, torch.channels_last))
    finally:
        torch.set_num_threads(threads)
    for name in ("y", "out_scale", "in_scale"):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-6, atol=1e-6)


def test_matches_the_layer_it_replaces():
    """The sequence that users have: F.conv2d with bias, then leaky ReLU; and a transposed convolution with tanh."""
    x, weight, bias = torch.randn(2, 6, 16, 16), torch.randn(8, 6, 4, 4), torch.randn(8)
    got = scaled_conv2d(x, weight, stride=2, padding=1, epilogue=ops.Epilogue(bias=bias, act="lrelu", gain=1.0))
    torch.testing.assert_close(got, F.leaky_relu(F.conv2d(x, weight, bias, 2, 1), 0.2), rtol=1e-5, atol=1e-5)
    weight = torch.randn(6, 3, 4, 4) / 10
    got = scaled_conv2d(
        x, weight, stride=2, padding=1, transposed=True, epilogue=ops.Epilogue(bias=bias[:3], act="tanh")
    )
    torch.testing.assert_close(got, torch.tanh(F.conv_transpose2d(x, weight, bias[:3], 2, 1)), rtol=1e-5, atol=1e-5)


def test_third_order_of_a_curved_activation_names_the_reference():
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    y = scaled_conv2d(x, torch.randn(2, 2, 1, 1), epilogue=ops.Epilogue(act="tanh"))
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference' differentiates without end"):
        torch.autograd.grad(second.square().sum(), x)
