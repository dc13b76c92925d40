"""bias_act against the activations' definitions, in value, first and second order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastgan
from fastgan import ops
from fastgan.reference.activation import ACTIVATIONS
from tests.helpers import CountOps, assert_close_to_float64, gradients, layouts

# Values are within 3 ulp of their own size at worst (vector_math.h), gradients taken from them likewise; half types are
# rounded once.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}

DEFINITIONS = {
    "linear": (lambda z, a: z, 1.0),
    "relu": (lambda z, a: max(z, 0.0), math.sqrt(2)),
    "lrelu": (lambda z, a: z if z > 0 else a * z, math.sqrt(2)),
    "tanh": (lambda z, a: math.tanh(z), 1.0),
    "sigmoid": (lambda z, a: 1 / (1 + math.exp(-z)), 1.0),
    "elu": (lambda z, a: z if z > 0 else math.expm1(z), 1.0),
    "selu": (
        lambda z, a: 1.0507009873554805 * (z if z > 0 else 1.6732632423543772 * math.expm1(z)),
        1.0,
    ),
    "softplus": (lambda z, a: math.log1p(math.exp(z)), 1.0),
    "swish": (lambda z, a: z / (1 + math.exp(-z)), math.sqrt(2)),
}


def by_definition(x: Tensor, b: Tensor, act: str, alpha: float, gain: float | None, clamp: float | None) -> Tensor:
    """One number at a time, with Python's own arithmetic; the bias runs along dimension 1."""
    function, default = DEFINITIONS[act]
    result = torch.empty_like(x)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        value = function(x[tuple(index)].item() + b[index[1]].item(), alpha) * (default if gain is None else gain)
        result[tuple(index)] = value if clamp is None else min(max(value, -clamp), clamp)
    return result


def operands(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    return x, torch.randn(shape[1], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("act", DEFINITIONS)
@pytest.mark.parametrize(("alpha", "gain", "clamp"), [(None, None, None), (0.3, 1.7, 0.8), (None, -0.5, 256.0)])
def test_against_the_definition(act: str, alpha: float | None, gain: float | None, clamp: float | None) -> None:
    x, b = operands(2, 3, 5, 7)
    want = by_definition(x, b, act, 0.2 if alpha is None else alpha, gain, clamp)
    got = ops.bias_act(x, b, act=act, alpha=alpha, gain=gain, clamp=clamp)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", DEFINITIONS)
@pytest.mark.parametrize("clamp", [None, 0.8])
def test_first_and_second_order(act: str, clamp: float | None) -> None:
    x, b = (t.requires_grad_() for t in operands(2, 3, 4))
    assert gradcheck(lambda x, b: ops.bias_act(x, b, act=act, clamp=clamp), (x, b))
    assert gradgradcheck(lambda x, b: ops.bias_act(x, b, act=act, clamp=clamp), (x, b))


def test_gradient_is_zero_where_the_clamp_holds() -> None:
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0], requires_grad=True)
    ops.bias_act(x, act="linear", gain=2, clamp=2.0).sum().backward()
    assert x.grad.tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_bias_runs_along_dim(dim: int) -> None:
    x = torch.randn(3, 4, 5)
    b = torch.randn(x.shape[dim])
    want = (x.movedim(dim, -1) + b).movedim(-1, dim)
    assert torch.equal(ops.bias_act(x, b, dim=dim), want)
    assert torch.equal(ops.bias_act(x, dim=dim), x)


def test_bias_of_a_vector() -> None:
    """x of one dimension: the bias's gradient is summed over none."""
    x, b = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(lambda x, b: ops.bias_act(x, b, dim=0, act="tanh"), (x, b))


@pytest.mark.parametrize("act", DEFINITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(act: str, dtype: torch.dtype) -> None:
    x, b = operands(2, 3, 31)
    x, b = x.to(dtype), b.float()
    got = ops.bias_act(x, b, act=act, gain=1.3, clamp=2.5)
    want = ops.bias_act(x.double(), b.double(), act=act, gain=1.3, clamp=2.5)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=torch.finfo(torch.float32).eps)


def test_layouts_and_empty() -> None:
    x, b = operands(2, 8, 5, 7)
    want = ops.bias_act(x, b, act="swish")
    last = ops.bias_act(x.contiguous(memory_format=torch.channels_last), b, act="swish")
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, want)
    wide = torch.full((2, 8, 5, 15), float("nan"), dtype=x.dtype)
    wide[..., ::2][..., :7] = x
    assert torch.equal(ops.bias_act(wide[..., ::2][..., :7], b, act="swish"), want)
    assert torch.equal(ops.bias_act(x[:1].expand(3, -1, -1, -1), b, act="swish"), want[:1].expand(3, -1, -1, -1))
    empty, b = x[:0].requires_grad_(), b.requires_grad_()
    y = ops.bias_act(empty, b, act="lrelu")
    y.sum().backward()
    assert y.shape == (0, 8, 5, 7)
    assert not b.grad.any()


@pytest.mark.parametrize("act", DEFINITIONS)
def test_large_values_and_nan(act: str) -> None:
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4, float("nan")], requires_grad=True)
    y = ops.bias_act(x, act=act)
    (grad,) = torch.autograd.grad(y[:4].sum(), x)
    assert y[:4].isfinite().all()
    assert grad[:4].isfinite().all()
    assert y[4].isnan()


def test_compiles_without_breaks() -> None:
    x, b = (t.requires_grad_() for t in operands(2, 3, 5, 7))

    def function(x: Tensor, b: Tensor) -> Tensor:
        return ops.bias_act(x, b, act="lrelu", clamp=2.0)

    got = torch.compile(function, fullgraph=True, backend="aot_eager")(x, b)
    want = function(x, b)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), (x, b)) for y in (got, want)))


def test_backend_choice() -> None:
    assert fastgan.explain(ops.bias_act, torch.ones(2)).backend == "cpp"
    assert fastgan.explain("bias_act", torch.ones(2), backend="reference").chosen_by == "backend= argument"
    with pytest.raises(ValueError, match=r"bias_act: backend 'cuda' .* has no kernel for this op"):
        ops.bias_act(torch.ones(2, 3), backend="cuda")
    with fastgan.backend("triton"), pytest.raises(ValueError, match=r"bias_act: backend 'triton' .* cuda tensors"):
        ops.bias_act(torch.ones(2, 3))


def eager(x: Tensor, b: Tensor, act: str) -> Tensor:
    """What users write, in the dtype of x throughout."""
    y = ACTIVATIONS[act].function(x + b.to(x.dtype)[:, None, None], ACTIVATIONS[act].alpha)
    return y * ACTIVATIONS[act].gain


@pytest.mark.parametrize("act", DEFINITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_accuracy(act: str, dtype: torch.dtype, layout: str) -> None:
    """Value and gradients; planes of several blocks, a plane smaller than a block, an odd number of channels."""
    for shape in ((2, 3, 47, 53), (3, 67, 3, 5)):
        x, b = operands(*shape)
        x, b = layouts(x.to(dtype))[layout], b.float()
        exact = gradients(lambda x, b: eager(x, b, act), [x.double(), b.double()])
        fused = gradients(lambda x, b: ops.bias_act(x, b, act=act, backend="cpp"), [x, b])
        plain = gradients(lambda x, b: eager(x, b, act), [x, b])
        for name, got, other, want in zip(("y", "x", "b"), fused, plain, exact, strict=True):
            assert_close_to_float64(got, other, want, floor=FLOOR[dtype], what=f"{shape} {name}")


@pytest.mark.parametrize("act", ["linear", "relu", "lrelu", "tanh", "swish"])
@pytest.mark.parametrize("gain", [1.3, -1.3])
def test_second_order_against_the_reference(act: str, gain: float) -> None:
    """Of every pair of inputs, also where the backward works from x and not from the result."""
    results = []
    for backend in ("cpp", "reference"):
        x, b = (t.requires_grad_() for t in operands(2, 3, 4, 5))
        y = ops.bias_act(x, b, act=act, gain=gain, clamp=2.0, backend=backend)
        first = torch.autograd.grad((y**3).sum(), (x, b), create_graph=True)
        results += [torch.autograd.grad(g.square().sum(), (x, b), retain_graph=True) for g in first]
    for fused, exact in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(fused, exact, rtol=1e-10, atol=1e-10)


def test_third_order_names_the_reference() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    (first,) = torch.autograd.grad(ops.bias_act(x, act="tanh").sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference' differentiates without end"):
        torch.autograd.grad(second.square().sum(), x)


def test_calls() -> None:
    """One kernel forward; backward nothing for linear, one where act is curved, none for what needs no gradient."""
    x, b = torch.randn(2, 3, 4, 4), torch.randn(3, requires_grad=True)
    for act, kernels in (("linear", 0), ("lrelu", 1), ("swish", 1)):
        with CountOps() as mode:
            y = ops.bias_act(x, b, act=act)
        assert {k: v for k, v in mode.calls.items() if k.startswith("fastgan")} == {"fastgan.bias_act": 1}
        loss = y.sum()
        with CountOps() as mode:
            loss.backward()
        assert sum(v for k, v in mode.calls.items() if k.startswith("fastgan")) == kernels
        assert mode.calls["aten.sum"] == 1  # the bias; x needs none


def test_memory_saved_for_backward() -> None:
    """The result alone, which the next layer saves as well, unless the activation cannot be inverted."""
    x, b = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    for act, expected in (("linear", []), ("lrelu", ["y"]), ("swish", ["x", "b"])):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = ops.bias_act(x, b, act=act)
        pointers = {"x": x.data_ptr(), "b": b.data_ptr(), "y": y.data_ptr()}
        assert [t.data_ptr() for t in saved] == [pointers[name] for name in expected]


@pytest.mark.parametrize("act", ["linear", "lrelu", "swish"])
def test_opcheck(act: str) -> None:
    for x in layouts(torch.randn(2, 3, 4, 5)).values():
        x = x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
        for b in (None, torch.randn(3, requires_grad=True)):
            args = (x.detach().requires_grad_(), b, 1, act, 0.2, 1.4, 0.9)
            torch.library.opcheck(torch.ops.fastgan.bias_act.default, args)


def test_same_result_for_any_number_of_threads() -> None:
    x, b = torch.randn(3, 5, 97, 89), torch.randn(5)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ops.bias_act(x, b, act="tanh"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_nan_stays_in_its_sample_and_debug_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 4, 4)
    x[1, 2, 3, 3] = torch.nan
    y = ops.bias_act(x, torch.ones(3), act="lrelu", clamp=1.0)
    assert y[0].isfinite().all()
    assert y[1, 2, 3, 3].isnan()
    monkeypatch.setattr("fastgan.ops._check.DEBUG", True)
    with pytest.raises(FloatingPointError, match=r"bias_act: result 0 \[2, 3, 4, 4\] contains NaN"):
        ops.bias_act(x)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"b": torch.ones(4)}, r"b must be \[C\] = \[3\], got \[4\]"),
        ({"b": torch.ones(1, 3)}, r"b must be \[C\] = \[3\], got \[1, 3\]"),
        ({"b": torch.ones(3), "dim": 2}, r"dim must be within -2 .. 1 for x \[2, 3\], got 2"),
        ({"x": torch.ones(2, 3, 0)}, r"x must not be empty beyond dimension 0, got \[2, 3, 0\]"),
        ({"x": torch.ones(2, 3, dtype=torch.int32)}, r"x must be floating point, got torch.int32"),
        ({"act": "gelu"}, "act must be one of linear, relu, .*, got 'gelu'"),
        ({"clamp": 0}, "clamp must be above 0 or None, got 0"),
        ({"clamp": float("nan")}, "clamp must be above 0 or None, got nan"),
        ({"b": torch.ones(3, device="meta")}, "b must be on cpu like x, got meta"),
    ],
)
def test_error_text(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"bias_act: {text}"):
        ops.bias_act(**{"x": torch.ones(2, 3), **change})


def test_type_error() -> None:
    with pytest.raises(TypeError, match="bias_act: x must be a Tensor, got list"):
        ops.bias_act([1.0])
