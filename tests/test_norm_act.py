"""norm_act against the definition of each normalisation, and against torch's layers and their running statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastgan
from fastgan import ops


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Each channel (of each sample) on its own."""
    y = torch.empty_like(x)
    for c in range(x.shape[1]):
        groups = [slice(None)] if kind == "batch" else [slice(n, n + 1) for n in range(len(x))]
        for group in groups:
            values = x[group, c]
            mean = values.sum() / values.numel()
            var = (values - mean).square().sum() / values.numel()
            y[group, c] = (values - mean) / (var + eps).sqrt()
    for parameter, combine in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            y = combine(y, parameter.expand(len(x), x.shape[1])[:, :, None, None])
    return y


AFFINE = {
    "none": (None, None),
    "channel": (random(3, seed=1), random(3, seed=2)),
    "adaptive": (random(2, 3, seed=1), random(2, 3, seed=2)),
    "mixed": (random(2, 3, seed=1), random(3, seed=2)),
    "bias": (None, random(3, seed=2)),
}


@pytest.mark.parametrize("kind", ["instance", "batch"])
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("act", ["linear", "lrelu", "swish"])
def test_against_the_definition(kind: str, affine: str, act: str) -> None:
    x, (weight, bias) = random(2, 3, 5, 7) * 3 + 1, AFFINE[affine]
    got = ops.norm_act(x, kind=kind, weight=weight, bias=bias, eps=0.1, act=act, alpha=0.1, gain=1.5)
    z = by_definition(x, kind, weight, bias, 0.1)
    want = 1.5 * {"linear": z, "lrelu": F.leaky_relu(z, 0.1), "swish": F.silu(z)}[act]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_defaults() -> None:
    x = random(2, 3, 5, 7)
    torch.testing.assert_close(ops.norm_act(x), F.instance_norm(x))
    torch.testing.assert_close(ops.norm_act(x, act="lrelu"), F.leaky_relu(F.instance_norm(x), 0.2))
    torch.testing.assert_close(ops.norm_act(x, act="lrelu", gain=None), F.leaky_relu(F.instance_norm(x), 0.2) * 2**0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_running_statistics_are_torchs(dtype: torch.dtype) -> None:
    """Statistics in float32 for every dtype of x, as torch keeps them."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    layer = nn.BatchNorm2d(3, momentum=0.3).to(kept)
    mean, var = torch.zeros(3, dtype=kept), torch.ones(3, dtype=kept)
    for step in range(3):
        x = (random(2, 3, 5, 7, seed=step) * 2 + 1).to(dtype)
        got = ops.norm_act(x, kind="batch", running=(mean, var, 0.3))
        want = layer(x.to(kept)).detach()
        assert got.dtype == dtype
        torch.testing.assert_close(got, want.to(dtype))
    torch.testing.assert_close(mean, layer.running_mean)
    torch.testing.assert_close(var, layer.running_var)
    before = mean.clone(), var.clone()
    got = ops.norm_act(x, kind="batch", running=(mean, var), act="relu")
    torch.testing.assert_close(got, torch.relu(layer.eval()(x.to(kept))).detach().to(dtype))
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert not mean.requires_grad


def test_running_statistics_of_another_dtype() -> None:
    x, mean, var = random(2, 3, 5, 7).float(), torch.zeros(3).bfloat16(), torch.ones(3).bfloat16()
    ops.norm_act(x, kind="batch", running=(mean, var, 1.0))
    torch.testing.assert_close(mean.float(), x.mean((0, 2, 3)), rtol=0.01, atol=0.01)
    torch.testing.assert_close(var.float(), x.var((0, 2, 3)), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind", ["instance", "batch", "running"])
@pytest.mark.parametrize("affine", ["channel", "adaptive"])
def test_first_and_second_order(kind: str, affine: str) -> None:
    x = random(2, 3, 2, 2).requires_grad_()
    weight, bias = (t.clone().requires_grad_() for t in AFFINE[affine])
    running = (random(3), random(3).square() + 0.5) if kind == "running" else None
    kind = "batch" if kind == "running" else kind

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.norm_act(x, kind=kind, weight=weight, bias=bias, running=running, eps=0.1, act="softplus")

    assert gradcheck(function, (x, weight, bias))
    assert gradgradcheck(function, (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("kind", ["instance", "batch"])
@pytest.mark.parametrize("affine", ["channel", "adaptive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(kind: str, affine: str, dtype: torch.dtype) -> None:
    x, (weight, bias) = (random(2, 3, 11, 13) * 3 + 5).to(dtype), AFFINE[affine]
    want = ops.norm_act(x.double(), kind=kind, weight=weight, bias=bias, act="lrelu")
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.norm_act(x, kind=kind, weight=weight.float(), bias=bias.float(), act="lrelu")
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=3e-6)


@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_layouts(kind: str) -> None:
    x, (weight, bias) = random(2, 3, 7, 5), AFFINE["channel"]
    kwargs = {"kind": kind, "weight": weight, "bias": bias, "act": "lrelu"}
    want = ops.norm_act(x, **kwargs)
    for other in (x.contiguous(memory_format=torch.channels_last), x.repeat_interleave(2, 3)[..., ::2]):
        torch.testing.assert_close(ops.norm_act(other, **kwargs), want)
    one = x[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(ops.norm_act(one, **kwargs), ops.norm_act(one.contiguous(), **kwargs))


@pytest.mark.parametrize("kind", ["instance", "batch"])
@pytest.mark.parametrize("affine", ["channel", "adaptive"])
def test_empty_batch(kind: str, affine: str) -> None:
    weight, bias = (t[:0] if t.ndim == 2 else t for t in AFFINE[affine])
    x, weight, bias = (t.clone().requires_grad_() for t in (random(0, 3, 5, 7), weight, bias))
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    running = (mean, var, 0.1) if kind == "batch" else None
    y = ops.norm_act(x, kind=kind, weight=weight, bias=bias, running=running)
    y.sum().backward()
    assert y.shape == (0, 3, 5, 7)
    assert not weight.grad.any()
    assert not bias.grad.any()
    assert not mean.any()
    assert (var == 1).all()


def test_nan_stays_in_its_sample() -> None:
    x = random(2, 3, 5, 7)
    x[0, 1, 2, 2] = float("nan")
    y = ops.norm_act(x, kind="instance", act="lrelu")
    assert y[0, 1].isnan().all()
    assert y[0, [0, 2]].isfinite().all()
    assert y[1].isfinite().all()


def test_compiles_without_breaks() -> None:
    x, weight, bias = (t.clone().requires_grad_() for t in (random(2, 3, 5, 7), *AFFINE["channel"]))
    states = [[torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)] for _ in range(2)]

    def function(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = ops.norm_act(x, kind="batch", weight=weight, bias=bias, running=(mean, var, 0.1), act="lrelu")
        return ops.norm_act(y, kind="instance", act="relu")

    inputs = (x, weight, bias)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs, *states[0])
    want = function(*inputs, *states[1])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(states[0], states[1])
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), inputs) for y in (got, want)))


def test_backend_choice() -> None:
    assert fastgan.explain("norm_act", random(1, 1, 4, 4)).backend == "cpp"
    with pytest.raises(ValueError, match=r"norm_act: backend 'triton' .* has no kernel for this op"):
        ops.norm_act(random(1, 1, 4, 4), backend="triton")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.ones(3, 4, 4)}, r"x must have 4 dimensions, got \[3, 4, 4\]"),
        ({"x": torch.ones(2, 3, 0, 4)}, r"x must have C, H and W of at least 1, got \[2, 3, 0, 4\]"),
        ({"x": torch.ones(2, 3, 1, 1)}, r"x must have more than 1 value per channel .* got \[2, 3, 1, 1\]"),
        (
            {"x": torch.ones(1, 3, 1, 1), "kind": "batch", "running": (torch.zeros(3), torch.ones(3), 0.1)},
            r"x must have more than 1 value per channel .* got \[1, 3, 1, 1\]",
        ),
        ({"kind": "layer"}, "kind must be one of instance, batch, got 'layer'"),
        ({"weight": torch.ones(4)}, r"weight must be \[C\] = \[3\] or \[N, C\] = \[2, 3\], got \[4\]"),
        ({"bias": torch.ones(1, 3)}, r"bias must be \[C\] = \[3\] or \[N, C\] = \[2, 3\], got \[1, 3\]"),
        ({"act": "gelu"}, "act must be one of linear, .*, got 'gelu'"),
        ({"running": (torch.zeros(3), torch.ones(3))}, "running must be None for kind 'instance', got tuple"),
        ({"kind": "batch", "running": (torch.zeros(3),)}, r"running must be \(mean, var\) or \(mean, var, momentum\)"),
        (
            {"kind": "batch", "running": (torch.zeros(4), torch.ones(3))},
            r"running mean must be \[C\] = \[3\], got \[4\]",
        ),
        (
            {"kind": "batch", "running": (torch.zeros(3), torch.ones(2))},
            r"running var must be \[C\] = \[3\], got \[2\]",
        ),
        (
            {"kind": "batch", "running": (torch.zeros(3), torch.ones(3), 1.5)},
            "running momentum must be within 0 .. 1, got 1.5",
        ),
    ],
)
def test_error_text(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"norm_act: {text}"):
        ops.norm_act(**{"x": torch.ones(2, 3, 4, 5), **change})


def test_evaluation_of_a_single_value() -> None:
    x = torch.full((1, 3, 1, 1), 3.0)
    got = ops.norm_act(x, kind="batch", running=(torch.ones(3), torch.full((3,), 4.0)), eps=0.0)
    assert torch.equal(got, torch.ones(1, 3, 1, 1))


@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_second_order_of_a_bias_alone(kind: str) -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x, b: ops.norm_act(x, kind=kind, bias=b, backend="reference"), (x, bias))
