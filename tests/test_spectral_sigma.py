"""spectral_sigma: values, gradients, registration, layouts, threads and messages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import spectral_norm as hook_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan.ops import spectral_sigma
from fastgan.ops.spectral_sigma import advanced_sigma, known_sigma
from fastgan.reference import spectral_sigma as reference

BACKENDS = [name for name in ("cpp", "reference") if fastgan.backends.available()[name] is None]
ORDERS = ("parametrization", "hook")
# Prime sizes, one row, one column, several chunks, the critic's first layer.
SHAPES = [(13, 7, 3, 3), (1, 31, 4, 4), (17, 1), (131, 97, 2, 3), (64, 6, 4, 4), (5, 3, 2, 7, 2)]
# More columns, and more rows, than a chunk has.
LONG_SHAPES = [(3, 70001), (70001, 3)]
OPS = torch.ops.fastgan


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised tensors hold NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def unit(size: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(size, dtype=torch.float64), dim=0).to(dtype)


def vectors(weights: list[Tensor], dims: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    us = [unit(w.shape[d], dtype) for w, d in zip(weights, dims, strict=True)]
    return us, [unit(w.numel() // w.shape[d], dtype) for w, d in zip(weights, dims, strict=True)]


def oracle(weights, us, vs, **options):
    """The float64 reference."""
    return reference.spectral_sigma(
        [w.double() for w in weights], [u.double() for u in us], [v.double() for v in vs], eps=1e-12, **options
    )


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max())


def layouts(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    weight = torch.randn(shape).to(dtype)
    if shape in LONG_SHAPES:
        return {"contiguous": weight}
    found = {"contiguous": weight, "expanded": weight[:, :1].expand(shape)}
    found["sliced"] = torch.randn(*shape[:-1], 2 * shape[-1] + 1).to(dtype)[..., 1::2]
    found["reversed"] = torch.randn(shape[::-1]).to(dtype).permute(*range(len(shape) - 1, -1, -1))
    if len(shape) == 4:
        found["channels_last"] = weight.contiguous(memory_format=torch.channels_last)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_iter", [0, 1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_is_as_exact_as_eager(dtype, order, n_iter, backend):
    for shape in SHAPES + LONG_SHAPES:
        for name, weight in layouts(shape, dtype).items():
            for dim in (0, 1):
                options = {"n_iter": n_iter, "order": order, "dims": [dim]}
                us, vs = vectors([weight], [dim])
                want = oracle([weight], us, vs, **options)
                eager = reference.spectral_sigma([weight], us, vs, eps=1e-12, **options)
                # Without iterations σ of random vectors is a sum that cancels: measured against |u|ᵀ |W| |v|.
                scale = 1.0
                if n_iter == 0:
                    scale = float(oracle([weight.abs()], [us[0].abs()], [vs[0].abs()], **options)[0] / want[0].abs())
                sigma = spectral_sigma([weight], us, vs, backend=backend, **options)
                assert sigma.dtype == us[0].dtype
                # float64 is the oracle itself: 70,001 terms summed in another order differ by 1.4e-14 (measured).
                floor = 5e-14 if dtype == torch.float64 else 4e-7
                assert error(sigma, want[0]) <= 2 * error(eager[0], want[0]) + floor * scale, (shape, name, dim)
                if n_iter > 0:
                    for got, plain, exact in ((us, eager[1], want[1]), (vs, eager[2], want[2])):
                        assert error(got[0], exact[0]) <= 2 * error(plain[0], exact[0]) + 4 * floor, (shape, name, dim)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("transposed", [False, True])
def test_torch_itself_gives_the_same_vectors_and_weight(order, transposed):
    make = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    module = (spectral_norm if order == "parametrization" else hook_spectral_norm)(make(5, 7, 3))
    if order == "parametrization":
        weight = module.parametrizations.weight.original
        u, v = module.parametrizations.weight[0]._u, module.parametrizations.weight[0]._v
    else:
        weight, u, v = module.weight_orig, module.weight_u, module.weight_v
    us, vs = [u.clone()], [v.clone()]
    module(torch.randn(1, 5, 4, 4))
    if order == "parametrization":
        module.eval()
    sigma = spectral_sigma([weight], us, vs, order=order, dims=[int(transposed)])
    torch.testing.assert_close(us[0], u)
    torch.testing.assert_close(vs[0], v)
    torch.testing.assert_close(weight / sigma, module.weight)


@pytest.mark.parametrize("order", ORDERS)
def test_the_number_of_threads_changes_nothing(order):
    weights = [torch.randn(300, 200, 3, 3), torch.randn(40, 70, 4, 4), torch.randn(1, 5000)]
    dims = [0, 1, 0]
    us, vs = vectors(weights, dims)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            now = [u.clone() for u in us], [v.clone() for v in vs]
            results.append([spectral_sigma(weights, *now, order=order, dims=dims), *now[0], *now[1]])
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
def test_degenerate_weights(order, backend):
    weights = [torch.randn(6, 5), torch.zeros(4, 3), torch.full((2, 3), float("nan")), torch.randn(3, 8) * 1e-18]
    us, vs = vectors(weights, [0] * 4)
    want, want_us, want_vs = reference.spectral_sigma(weights, us, vs, n_iter=1, order=order, eps=1e-12, dims=[0] * 4)
    sigma = spectral_sigma(weights, us, vs, order=order, backend=backend)
    assert sigma[1] == 0
    assert us[1].abs().max() == 0
    assert sigma[2].isnan()
    assert us[2].isnan().all()
    assert vs[2].isnan().all()
    torch.testing.assert_close([sigma, us, vs], [want, want_us, want_vs], equal_nan=True)


def test_empty_list_and_eps():
    assert spectral_sigma([], [], []).shape == (0,)
    weight = torch.eye(3)
    us, vs = [torch.tensor([1.0, 0, 0])], [torch.tensor([1.0, 0, 0])]
    spectral_sigma([weight], us, vs, eps=2.0)
    torch.testing.assert_close(us[0], torch.tensor([0.5, 0, 0]))


def test_one_dimensional_weight_of_the_hook():
    weight = torch.randn(9)
    module = hook_spectral_norm(torch.nn.LayerNorm(9))
    us, vs = [module.weight_u.clone()], [module.weight_v.clone()]
    module.weight_orig.data.copy_(weight)
    module(torch.randn(2, 9))
    sigma = spectral_sigma([weight], us, vs, order="hook")
    torch.testing.assert_close(weight / sigma, module.weight)
    with pytest.raises(ValueError, match=r"spectral_sigma: weights\[0\] must have at least 2 dimensions, got \[9\]"):
        spectral_sigma([weight], us, vs)


def double_weights() -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    shapes, dims = [(5, 3, 2, 2), (4, 7), (3, 6, 2, 3)], [0, 0, 1]
    weights = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return weights, *vectors(weights, dims), dims


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_gradgradcheck(backend):
    weights, us, vs, dims = double_weights()

    def fixed(*weights: Tensor) -> Tensor:
        # Without iterations: u and v are constants of the formula, while finite differences would move them.
        return spectral_sigma(weights, us, vs, n_iter=0, dims=dims, backend=backend)

    assert torch.autograd.gradcheck(fixed, weights)
    assert torch.autograd.gradgradcheck(fixed, weights)

    def known(*weights: Tensor) -> Tensor:
        u, v = torch.cat(us), torch.cat(vs)
        with torch.no_grad():
            sigma = spectral_sigma(weights, us, vs, n_iter=0, dims=dims)
        return known_sigma(weights, sigma, u, v, dims) ** 2

    assert torch.autograd.gradgradcheck(known, weights)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_against_the_double_reference(order, dtype):
    shapes, dims = [(13, 7, 3, 3), (11, 5), (3, 6, 4, 4), (8, 6, 3, 3)], [0, 0, 1, 0]
    weights = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    weights[3] = weights[3].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    us, vs = vectors(weights, dims)
    cotangent = torch.randn(4)
    exact = [w.detach().double().requires_grad_() for w in weights]
    want = torch.autograd.grad(oracle(exact, us, vs, n_iter=1, order=order, dims=dims)[0], exact, cotangent.double())
    eager = reference.spectral_sigma(weights, us, vs, n_iter=1, order=order, eps=1e-12, dims=dims)[0]
    plain = torch.autograd.grad(eager, weights, cotangent)
    got = torch.autograd.grad(spectral_sigma(weights, us, vs, order=order, dims=dims), weights, cotangent)
    for g, p, w, weight in zip(got, plain, want, weights, strict=True):
        assert g.dtype == dtype
        assert g.shape == weight.shape
        assert error(g, w) <= 2 * error(p, w) + 1e-6


def test_second_order_reaches_what_multiplies_sigma():
    """A penalty on a gradient that went through σ, as R1 makes one, against the reference."""
    results = []
    for backend in BACKENDS:
        torch.manual_seed(1)
        weights, us, vs, dims = double_weights()
        x = torch.randn(3, dtype=torch.float64, requires_grad=True)
        sigma = spectral_sigma(weights, us, vs, dims=dims, backend=backend)
        first = torch.autograd.grad((sigma * x).square().sum(), [x, *weights], create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *weights]))
    torch.testing.assert_close(results[0], results[-1])


def test_opcheck():
    weights, us, vs, dims = double_weights()
    for hook in (False, True):
        torch.library.opcheck(OPS.spectral_sigma.default, (weights, us, vs, 1, hook, 1e-12, dims))
    sigma, u, v = (t.detach() for t in OPS.spectral_sigma.default(weights, us, vs, 1, False, 1e-12, dims))
    torch.library.opcheck(OPS.spectral_sigma_known.default, (weights, sigma, u, v, dims))
    blocks = [1, 5, 12, 1, 4, 7, 3, 6, 6]
    grad = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OPS.spectral_sigma_bwd.default, (grad, u, v, blocks, [0, 2], torch.float64))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_forward_and_first_order(compiler):
    weights, us, vs, dims = double_weights()

    def loss(weights: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> Tensor:
        return (spectral_sigma(weights, us, vs, dims=dims) * torch.arange(1.0, 4.0)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    results = []
    for function in (loss, compiled):
        now = [u.clone() for u in us], [v.clone() for v in vs]
        value = function(weights, *now)
        results.append([value.detach(), *torch.autograd.grad(value, weights), *now[0], *now[1]])
    torch.testing.assert_close(*results)


class Calls(TorchDispatchMode):
    """Names and arguments of the fastgan kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastgan":
            self.made.append((func._opname, args))
        return func(*args, **(kwargs or {}))

    def names(self) -> list[str]:
        return [name for name, _ in self.made]


def test_frozen_weights_cost_nothing():
    weights, us, vs, dims = double_weights()
    weights[1].requires_grad_(False)
    with Calls() as calls:
        spectral_sigma(weights, us, vs, dims=dims).sum().backward()
    assert calls.names() == ["spectral_sigma", "spectral_sigma_bwd"]
    assert calls.made[1][1][4] == [0, 2]
    assert weights[1].grad is None

    for weight in weights:
        weight.requires_grad_(False)
    with Calls() as calls:
        assert not spectral_sigma(weights, us, vs, dims=dims).requires_grad
    assert calls.names() == ["spectral_sigma"]

    for weight in weights:
        weight.requires_grad_()
    with Calls() as calls:
        torch.autograd.grad(spectral_sigma(weights, us, vs, dims=dims).sum(), weights[2])
    assert calls.made[1][1][4] == [2]

    # What is asked for depends on σ, but not on what σ depends on.
    x = torch.randn((), dtype=torch.float64, requires_grad=True)
    with Calls() as calls:
        sigma = spectral_sigma(weights, us, vs, dims=dims)
        torch.autograd.grad((sigma[0] * x).square(), x)
    assert calls.names() == ["spectral_sigma"]


def test_known_sigma_reads_no_weight_and_has_the_same_gradient():
    weights, us, vs, dims = double_weights()
    now = [u.clone() for u in us], [v.clone() for v in vs]
    want = spectral_sigma(weights, us, vs, dims=dims)
    options = {"n_iter": 1, "order": "parametrization", "eps": 1e-12, "dims": dims}
    sigma, u, v = advanced_sigma(weights, *now, **options)
    assert not sigma.requires_grad
    torch.testing.assert_close([*now[0], *now[1]], [*us, *vs])
    with Calls() as calls:
        got = known_sigma(weights, sigma, u, v, dims)
    assert calls.names() == ["spectral_sigma_known"]
    cotangent = torch.randn(3, dtype=torch.float64)
    grads = [torch.autograd.grad(s, weights, cotangent) for s in (got, want)]
    torch.testing.assert_close(*grads)


def test_vectors_may_change_between_forward_and_backward():
    """Two critic forwards, then one backward through both; and an optimiser's step before a backward."""
    weights, us, vs, dims = double_weights()
    first = spectral_sigma(weights, us, vs, dims=dims)
    kept = [u.clone() for u in us], [v.clone() for v in vs]
    second = spectral_sigma(weights, us, vs, dims=dims)
    with torch.no_grad():
        weights[0].add_(1.0)
    (first.sum() + 2 * second.sum()).backward()
    want = torch.outer(kept[0][1], kept[1][1]) + 2 * torch.outer(us[1], vs[1])
    torch.testing.assert_close(weights[1].grad, want)


def test_autocast_leaves_sigma_in_float32():
    weights = [torch.randn(8, 5, 3, 3)]
    us, vs = vectors(weights, [0])
    want = spectral_sigma(weights, [us[0].clone()], [vs[0].clone()])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spectral_sigma(weights, us, vs), want)


def test_explain_and_backend_switch():
    weights, us, vs, dims = double_weights()
    before = us[0].clone()
    decision = fastgan.explain(spectral_sigma, weights, us, vs, dims=dims)
    assert decision.backend == BACKENDS[0]
    assert torch.equal(us[0], before)
    with fastgan.backend("reference"), Calls() as calls:
        spectral_sigma(weights, us, vs, dims=dims)
    assert calls.made == []


def bad_calls():
    w, u, v = torch.randn(4, 3, 2, 2), torch.randn(4), torch.randn(12)
    return {
        "us must have one tensor per weight = 1, got 0": ([w], [], [v], {}),
        "vs must have one tensor per weight = 1, got 2": ([w], [u], [v, v], {}),
        "dims must have one axis per weight = 1, got 2": ([w], [u], [v], {"dims": [0, 0]}),
        "dims[0] must be an axis of weights[0] [4, 3, 2, 2], got 4": ([w], [u], [v], {"dims": [4]}),
        "us[0] must be [4], got [5]": ([w], [torch.randn(5)], [v], {}),
        "vs[0] must be [16], got [12]": ([w], [torch.randn(3)], [v], {"dims": [1]}),
        "us[0] must be torch.float32, got torch.float64": ([w], [u.double()], [v], {}),
        "us[0] must be torch.float32, got torch.bfloat16": ([w.bfloat16()], [u.bfloat16()], [v], {}),
        "weights[1] must be torch.float32 like weights[0], got torch.float64": ([w, w.double()], [u, u], [v, v], {}),
        "weights[0] must not be empty, got [4, 0]": ([torch.randn(4, 0)], [u], [torch.randn(0)], {}),
        "weights[0] must be floating point, got torch.int64": ([w.long()], [u], [v], {}),
        "n_iter must be >= 0, got -1": ([w], [u], [v], {"n_iter": -1}),
        "order must be one of parametrization, hook, got 'both'": ([w], [u], [v], {"order": "both"}),
    }


@pytest.mark.parametrize("message", list(bad_calls()))
def test_bad_arguments(message):
    weights, us, vs, options = bad_calls()[message]
    with pytest.raises(ValueError, match=r"^spectral_sigma: ") as raised:
        spectral_sigma(weights, us, vs, **options)
    assert str(raised.value) == f"spectral_sigma: {message}"


def test_mixed_devices_and_no_tensor():
    w, u, v = torch.randn(4, 3), torch.randn(4), torch.randn(3)
    with pytest.raises(ValueError, match=r"weights\[1\], us\[1\], vs\[1\] must be on cpu, got meta, cpu, cpu"):
        spectral_sigma([w, w.to("meta")], [u, u], [v, v])
    with pytest.raises(TypeError, match=r"spectral_sigma: weights\[0\] must be a Tensor, got list"):
        spectral_sigma([[1.0]], [u], [v])


def test_debug_mode_names_the_result(monkeypatch):
    monkeypatch.setattr("fastgan.ops._check.DEBUG", True)
    with pytest.raises(FloatingPointError, match=r"spectral_sigma: result 0 \[1\] contains NaN"):
        spectral_sigma([torch.full((2, 3), float("nan"))], [torch.randn(2)], [torch.randn(3)])
