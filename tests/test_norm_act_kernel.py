"""The C++ kernels of norm_act against the reference: accuracy, layouts, both orders, statistics, what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastgan import ops
from fastgan.ops._library import FALLBACKS
from fastgan.reference.activation import ACTIVATIONS
from tests.helpers import CountOps, assert_close_to_float64, gradients, layouts, max_error

# A few roundings of float32; half types are rounded once, gradients of parameters are float32.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
KINDS = ["instance", "batch", "given"]
AFFINE = ["none", "channel", "adaptive", "mixed"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(shape: tuple[int, ...], kind: str, affine: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors that gradients are for, x first, and the other arguments."""
    n, c = shape[:2]
    x = random(*shape) * 2 + 3
    parameters = {
        "none": [],
        "channel": [random(c, seed=1), random(c, seed=2)],
        "adaptive": [random(n, c, seed=1), random(n, c, seed=2)],
        "mixed": [random(n, c, seed=1), random(c, seed=2)],
    }[affine]
    given = (random(c, seed=3) + 3, random(c, seed=4).square() + 0.5)
    return [x, *parameters], {
        "kind": "batch" if kind == "given" else kind,
        "running": given if kind == "given" else None,
    }


def call(backend: str, kwargs: dict[str, Any]) -> Any:
    def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return ops.norm_act(x, weight=weight, bias=bias, backend=backend, **kwargs)

    return function


def both_orders(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Value, gradients, and gradients of the gradients' inner product with fixed random tensors."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    cotangent = random(*y.shape, seed=5).requires_grad_()
    first = torch.autograd.grad(y, leaves, cotangent, create_graph=True)
    inner = sum((g * random(*g.shape, seed=6 + i)).sum() for i, g in enumerate(first))
    second = torch.autograd.grad(inner, [*leaves, cotangent], allow_unused=True, materialize_grads=True)
    return [t.detach() for t in (y, *first, *second)]


# Short planes, which are gathered; planes of several blocks; one pixel, which is walked as rows; many channels.
SHAPES = [(2, 3, 5, 7), (2, 3, 53, 47), (4, 5, 1, 1), (3, 70, 11, 9), (2, 3000, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_both_orders_against_the_reference(shape: tuple[int, ...], kind: str, affine: str, layout: str) -> None:
    if kind == "instance" and shape[2:] == (1, 1):
        with pytest.raises(ValueError, match="more than 1 value"):
            ops.norm_act(random(*shape))
        return
    inputs, kwargs = arguments(shape, kind, affine)
    for act in ("lrelu", "softplus"):
        options = kwargs | {"eps": 0.1, "act": act, "gain": 1.3}
        want = both_orders(call("reference", options), inputs)
        got = both_orders(call("cpp", options), [layouts(inputs[0])[layout], *inputs[1:]])
        for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
            assert max_error(ours, theirs) < 1e-11, (act, i)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_activation(act: str, channels_last: bool) -> None:
    for kind in KINDS:
        inputs, kwargs = arguments((2, 3, 5, 7), kind, "channel")
        options = kwargs | {"act": act, "alpha": -0.3 if act == "lrelu" else None, "gain": None}
        want = both_orders(call("reference", options), inputs)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        got = both_orders(call("cpp", options), [inputs[0].contiguous(memory_format=layout), *inputs[1:]])
        for ours, theirs in zip(got, want, strict=True):
            assert max_error(ours, theirs) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", ["none", "channel", "adaptive"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(kind: str, affine: str, layout: str) -> None:
    inputs, kwargs = arguments((2, 2, 2, 3), kind, affine)
    function = call("cpp", kwargs | {"eps": 0.1, "act": "tanh"})
    leaves = [t.requires_grad_() for t in (layouts(inputs[0])[layout], *inputs[1:])]
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 47, 53), (3, 67, 7, 5)], ids=str)
def test_accuracy(dtype: torch.dtype, layout: str, kind: str, shape: tuple[int, ...]) -> None:
    # tanh, whose slope has no jump that a rounding could step over.
    inputs, kwargs = arguments(shape, kind, "channel")
    kwargs |= {"act": "tanh"}
    kept = [t.float() for t in kwargs["running"]] if kind == "given" else None
    kwargs["running"] = None if kept is None else tuple(kept)
    x = layouts(inputs[0].to(dtype))[layout]
    parameters = [t.float() for t in inputs[1:]]
    exact = gradients(call("reference", kwargs), [x.double(), *(t.double() for t in parameters)], 9)
    fused = gradients(call("cpp", kwargs), [x, *parameters], 9)
    plain = gradients(call("reference", kwargs), [x, *parameters], 9)
    for name, got, other, want in zip(("y", "x", "weight", "bias"), fused, plain, exact, strict=True):
        assert_close_to_float64(got, other, want, floor=FLOOR[got.dtype], what=name)
    channels_last = layout == "channels_last"
    assert fused[0].is_contiguous(memory_format=torch.channels_last) == channels_last
    assert fused[1].is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("kind", ["instance", "batch"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [5, 80])
def test_large_mean_against_small_spread(kind: str, layout: str, size: int) -> None:
    """float32 around 1000 with a spread of 0.01: E[x²] − E[x]² would be noise, and a mean in float32 1e-3 off."""
    x = layouts((random(2, 3, size, size) * 0.01 + 1000).float())[layout]
    exact = gradients(call("reference", {"kind": kind, "eps": 1e-12}), [x.double()], 9)
    fused = gradients(call("cpp", {"kind": kind, "eps": 1e-12}), [x], 9)
    for got, want in zip(fused, exact, strict=True):
        assert max_error(got, want) < 2e-6


def test_one_outlier_does_not_spoil_the_variance() -> None:
    x = random(1, 1, 64, 64).float()
    x[0, 0, 0, 0] = 1e6
    got = ops.norm_act(x, backend="cpp")
    assert max_error(got, ops.norm_act(x.double(), backend="reference")) < 1e-5


@pytest.mark.parametrize("kind", ["instance", "batch"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_result_for_any_number_of_threads(kind: str, layout: str) -> None:
    x = layouts(random(3, 65, 37, 41).float())[layout]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = x.detach().requires_grad_()
            y = ops.norm_act(leaf, kind=kind, act="swish", backend="cpp")
            (first,) = torch.autograd.grad(y, leaf, x, create_graph=True)
            (second,) = torch.autograd.grad(first, leaf, x)
            results.append((y, first, second))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", ["instance", "batch", "given"])
def test_nothing_is_computed_that_no_gradient_asked_for(kind: str) -> None:
    inputs, kwargs = arguments((2, 3, 4, 5), kind, "channel")
    x, weight, bias = (t.requires_grad_() for t in inputs)
    asked: list[tuple[bool, ...]] = []

    class Watch(CountOps):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._opname in ("norm_act_grad", "norm_act_grad_grad"):
                asked.append(tuple(args[-3:] if func._opname == "norm_act_grad" else args[-4:]))
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Watch() as mode:
        y = call("cpp", kwargs)(x, weight, bias)
        torch.autograd.grad(y, bias, torch.ones_like(y), retain_graph=True)
        (first,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        torch.autograd.grad(first, weight, torch.ones_like(y))
        call("cpp", kwargs)(x.detach(), weight.detach(), bias.detach())
    assert asked == [(False, False, True), (True, False, False), (False, False, True, False)]
    fused = {k: v for k, v in mode.calls.items() if k.startswith("fastgan")}
    assert fused == {"fastgan.norm_act": 2, "fastgan.norm_act_grad": 2, "fastgan.norm_act_grad_grad": 1}


def test_gradients_of_parameters_alone_to_second_order() -> None:
    """No cotangent for the gradient of x: what is missing counts as zeros."""
    for channels_last in (False, True):
        found = []
        for backend in ("cpp", "reference"):
            (x, weight, bias), kwargs = arguments((2, 3, 4, 5), "instance", "adaptive")
            x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y = call(backend, kwargs | {"act": "tanh"})(*leaves)
            first = torch.autograd.grad(y, leaves[1:], random(*y.shape, seed=5), create_graph=True)
            found.append(torch.autograd.grad(sum(g.pow(3).sum() for g in first), leaves))
        for ours, theirs in zip(*found, strict=True):
            assert max_error(ours, theirs) < 1e-11


def test_third_order_names_the_reference() -> None:
    x = random(1, 2, 3, 4).requires_grad_()
    value = ops.norm_act(x, act="tanh", backend="cpp").pow(3).sum()
    for _ in range(2):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        value = grad.pow(3).sum()
    with pytest.raises(NotImplementedError, match=r"norm_act_grad_grad: the third order .* backend='reference'"):
        torch.autograd.grad(value, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", ["none", "adaptive"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_and_fallbacks(kind: str, affine: str, layout: str) -> None:
    """Registration, and the plain torch that stands in for each kernel."""
    inputs, _ = arguments((2, 3, 4, 5), kind, affine)
    x, weight, bias = [*inputs, None, None][:3]
    x, gy, h = (layouts(t)[layout] for t in (x, random(2, 3, 4, 5, seed=7), random(2, 3, 4, 5, seed=8)))
    h_weight, h_bias = (None if t is None else torch.randn_like(t) for t in (weight, bias))
    leaves = [None if t is None else t.requires_grad_() for t in (x, weight, bias)]
    given = kind == "given"
    statistics = [random(3, seed=3), random(3, seed=4).square() + 0.5] if given else [None, None]
    settings = (kind != "instance", 0.1, "softplus", 0.0, 1.5)
    names = ["norm_act", "norm_act_grad", "norm_act_grad_grad"]
    with torch.no_grad():
        _, *seen = torch.ops.fastgan.norm_act(*leaves, *statistics, *settings)
    seen = statistics if given else seen
    settings = (settings[0], given, *settings[1:])
    needs = (True, weight is not None, bias is not None)
    calls = [
        (*leaves, *statistics, settings[0], *settings[2:]),
        (gy.requires_grad_(), *leaves, *seen, *settings, *needs),
        (h, h_weight, h_bias, gy, *leaves, *seen, *settings, True, *needs),
    ]
    for name, args in zip(names, calls, strict=True):
        op = getattr(torch.ops.fastgan, name).default
        checks = ["test_schema", "test_faketensor"] + (["test_autograd_registration"] if name != names[2] else [])
        torch.library.opcheck(
            op, args, test_utils=[*checks, "test_aot_dispatch_dynamic"] if name == names[0] else checks
        )
        with torch.no_grad():
            for got, want in zip(op(*args), FALLBACKS[name](*args), strict=True):
                assert got.stride() == want.stride()
                assert max_error(got, want) < 1e-11


@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_autocast_leaves_x_as_it_is(kind: str) -> None:
    x = random(2, 3, 5, 7).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.norm_act(x, kind=kind, act="lrelu")
    assert y.dtype == torch.float32
    assert torch.equal(y, ops.norm_act(x, kind=kind, act="lrelu"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_two_threads_at_once(layout: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    images = [layouts(random(2, 33, 19, 23, seed=i).float())[layout] for i in range(8)]
    want = [ops.norm_act(x, act="lrelu") for x in images]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda x: ops.norm_act(x, act="lrelu"), images))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
