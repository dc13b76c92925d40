"""spectral_sigma's Triton kernels: values and gradients against float64, layouts, launches, order of programs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastgan
from fastgan.kernels import _reduce
from fastgan.kernels import spectral_sigma as kernels
from fastgan.kernels._launch import recorded
from fastgan.ops import spectral_sigma
from fastgan.reference import spectral_sigma as reference

ORDERS = ("parametrization", "hook")
# Prime sizes, one row, one column, several programs and groups of them, the critic's first layer, five dimensions.
SHAPES = [(13, 7, 3, 3), (1, 31, 4, 4), (17, 1), (131, 47, 2, 2), (64, 6, 4, 4), (5, 3, 2, 7, 2)]
# More columns, and more rows, than a tile holds.
LONG_SHAPES = [(3, 9001), (9001, 3)]


def vectors(weights: list[Tensor], dims: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    us = [F.normalize(torch.randn(w.shape[d]), dim=0) for w, d in zip(weights, dims, strict=True)]
    return us, [F.normalize(torch.randn(w.numel() // w.shape[d]), dim=0) for w, d in zip(weights, dims, strict=True)]


def oracle(weights, us, vs, **options):
    """The float64 reference."""
    return reference.spectral_sigma(
        [w.double() for w in weights], [u.double() for u in us], [v.double() for v in vs], eps=1e-12, **options
    )


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max())


def layouts(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    weight = torch.randn(shape).to(dtype)
    found = {"contiguous": weight, "expanded": weight[:, :1].expand(shape)}
    found["sliced"] = torch.randn(*shape[:-1], 2 * shape[-1] + 1).to(dtype)[..., 1::2]
    found["reversed"] = torch.randn(shape[::-1]).to(dtype).permute(*range(len(shape) - 1, -1, -1))
    if len(shape) == 4:
        found["channels_last"] = weight.contiguous(memory_format=torch.channels_last)
    return found


def test_it_is_the_automatic_choice():
    weights = [torch.randn(4, 3)]
    us, vs = vectors(weights, [0])
    assert fastgan.explain(spectral_sigma, weights, us, vs).backend == "triton"
    wide = ([weights[0].double()], [us[0].double()], [vs[0].double()])
    assert fastgan.explain(spectral_sigma, *wide).backend == "reference"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("dtype", "n_iter"),
    [(torch.float32, 0), (torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1), (torch.float16, 1)],
)
def test_values_of_every_layout_in_one_call(dtype, order, n_iter, launches):
    weights = [w for shape in SHAPES for w in layouts(shape, dtype).values()]
    weights, dims = weights + weights, [0] * len(weights) + [1] * len(weights)
    if dtype == torch.float32:
        weights, dims = weights + [torch.randn(shape) for shape in LONG_SHAPES], [*dims, 0, 0]
    us, vs = vectors(weights, dims)
    want = oracle(weights, us, vs, n_iter=n_iter, order=order, dims=dims)
    eager = reference.spectral_sigma(weights, us, vs, eps=1e-12, n_iter=n_iter, order=order, dims=dims)
    # Without iterations σ of random vectors is a sum that cancels: measured against |u|ᵀ |W| |v|.
    scales = oracle(
        [w.abs() for w in weights], [u.abs() for u in us], [v.abs() for v in vs], n_iter=0, order=order, dims=dims
    )[0]
    sigma = spectral_sigma(weights, us, vs, n_iter=n_iter, order=order, dims=dims, backend="triton")
    assert len(launches) == max(n_iter, 1)
    for i, weight in enumerate(weights):
        what = (list(weight.shape), weight.stride(), dims[i])
        size = float(scales[i] if n_iter == 0 else want[0][i])
        allowed = 2 * abs(float(eager[0][i] - want[0][i])) + 4e-7 * size
        assert abs(float(sigma[i] - want[0][i])) <= allowed, what
        if n_iter > 0:
            for got, plain, exact in ((us, eager[1], want[1]), (vs, eager[2], want[2])):
                assert error(got[i], exact[i]) <= 2 * error(plain[i], exact[i]) + 1.6e-6, what


@pytest.mark.parametrize("order", ORDERS)
def test_degenerate_weights_stay_in_their_layer(order):
    weights = [torch.randn(6, 5), torch.zeros(4, 3), torch.full((2, 3), float("nan")), torch.randn(3, 8) * 1e-18]
    us, vs = vectors(weights, [0] * 4)
    want, want_us, want_vs = reference.spectral_sigma(weights, us, vs, n_iter=1, order=order, eps=1e-12, dims=[0] * 4)
    sigma = spectral_sigma(weights, us, vs, order=order)
    assert sigma[1] == 0 and us[1].abs().max() == 0
    assert sigma[2].isnan() and us[2].isnan().all() and vs[2].isnan().all()
    torch.testing.assert_close([sigma, us, vs], [want, want_us, want_vs], equal_nan=True)


def test_vector_of_the_hook_and_eps():
    weight, us, vs = torch.randn(9), [F.normalize(torch.randn(9), dim=0)], [torch.ones(1)]
    want = oracle([weight], us, vs, n_iter=1, order="hook", dims=[0])
    torch.testing.assert_close(spectral_sigma([weight], us, vs, order="hook").double(), want[0])
    us, vs = [torch.tensor([1.0, 0, 0])], [torch.tensor([1.0, 0, 0])]
    spectral_sigma([torch.eye(3)], us, vs, eps=2.0)
    torch.testing.assert_close(us[0], torch.tensor([0.5, 0, 0]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_iter", [0, 2])
def test_same_bits_for_any_order_of_programs(order, n_iter, shuffled):
    """The last program to arrive may be any; the counters are zero afterwards, for the next call."""
    weights, dims = [torch.randn(331, 41, 3, 3), torch.randn(60, 70, 4, 4)], [0, 1]
    us, vs = vectors(weights, dims)
    results = []
    for seed in range(4):
        if seed:
            shuffled(seed)
        now = [u.clone() for u in us], [v.clone() for v in vs]
        with recorded() as launches:
            results.append([spectral_sigma(weights, *now, n_iter=n_iter, order=order, dims=dims), *now[0], *now[1]])
        assert launches[0].grid[0] > 8
        assert not any(counter.any() for counter in _reduce._counters.values())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_is_planned_twice_for_weights_that_stay(monkeypatch):
    made = []
    table = _reduce.device_table
    monkeypatch.setattr(_reduce, "device_table", lambda *args: made.append(args) or table(*args))
    weights = [torch.randn(8, 5, 3, 3), torch.randn(6, 7)]
    us, vs = vectors(weights, [0, 0])
    for _ in range(3):
        spectral_sigma(weights, us, vs)
    assert len(made) == 1
    weights[1] = weights[1].clone()
    want = oracle(weights, us, vs, n_iter=1, order="parametrization", dims=[0, 0])
    torch.testing.assert_close(spectral_sigma(weights, us, vs).double(), want[0])
    assert len(made) == 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_in_one_launch(order, dtype):
    shapes, dims = [(13, 7, 3, 3), (11, 5), (3, 6, 4, 4), (8, 6, 3, 3), (3, 1100)], [0, 0, 1, 0, 0]
    weights = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    weights[3] = weights[3].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    weights[1].requires_grad_(False)
    wanted = [w for w in weights if w.requires_grad]
    us, vs = vectors(weights, dims)
    cotangent = torch.randn(5)
    exact = [w.detach().double().requires_grad_(w.requires_grad) for w in weights]
    want = torch.autograd.grad(
        oracle(exact, us, vs, n_iter=1, order=order, dims=dims)[0],
        [w for w in exact if w.requires_grad],
        cotangent.double(),
    )
    eager = reference.spectral_sigma(weights, us, vs, n_iter=1, order=order, eps=1e-12, dims=dims)[0]
    plain = torch.autograd.grad(eager, wanted, cotangent)
    with recorded() as launches:
        got = torch.autograd.grad(spectral_sigma(weights, us, vs, order=order, dims=dims), wanted, cotangent)
    assert len(launches) == 2
    for g, p, w, weight in zip(got, plain, want, wanted, strict=True):
        assert g.dtype == dtype and g.shape == weight.shape
        assert error(g, w) <= 2 * error(p, w) + 1e-6


def test_many_layers_share_launches():
    weights = [torch.randn(3, 4, requires_grad=True) for _ in range(33)]
    us, vs = vectors(weights, [0] * 33)
    with recorded() as launches:
        found = torch.autograd.grad(spectral_sigma(weights, us, vs).sum(), weights)
    assert len(launches) == 3, "one for σ, two for the gradients: 32 of them fit one"
    for gradient, u, v in zip(found, us, vs, strict=True):
        torch.testing.assert_close(gradient, torch.outer(u, v))


def test_second_order_reaches_what_multiplies_sigma():
    """A penalty on a gradient that went through σ, as R1 makes one, against the float64 reference."""
    shapes, dims = [(5, 3, 2, 2), (4, 7), (3, 6, 2, 3)], [0, 0, 1]
    values, x = [torch.randn(shape) for shape in shapes], torch.randn(3)
    us, vs = vectors(values, dims)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        weights = [w.to(dtype).requires_grad_() for w in values]
        scale = x.to(dtype).requires_grad_()
        now = [u.to(dtype).clone() for u in us], [v.to(dtype).clone() for v in vs]
        sigma = spectral_sigma(weights, *now, dims=dims, backend=backend)
        first = torch.autograd.grad((sigma * scale).square().sum(), [scale, *weights], create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), [scale, *weights]))
    for got, want in zip(*results, strict=True):
        assert error(got, want) <= 3e-6


def test_what_the_kernel_does_not_take_runs_on_the_fallback():
    weight = torch.randn(4, 3, dtype=torch.float64)
    arguments = ([weight], [torch.ones(4).double()], [torch.ones(3).double()], 1, False, 1e-12, [0])
    assert kernels.spectral_sigma(*arguments) is NotImplemented
    with recorded() as launches:
        sigma, _, _ = torch.ops.fastgan.spectral_sigma(*arguments)
    assert not launches and sigma.dtype == torch.float64


def test_shipped_configurations_are_planned_without_data():
    labels = [label for label, _ in kernels.shipped()]
    assert len(labels) == len(set(labels)) == 16
    launches = dict(kernels.shipped())
    (iteration,) = launches["12 x 512x512x3x3, float32: iteration"]
    weights = 12 * 512 * 512 * 9
    assert iteration.bytes == 4 * weights + 8 * 12 * (512 + 4608) + 4 * 12
    assert iteration.flops == 4 * weights
