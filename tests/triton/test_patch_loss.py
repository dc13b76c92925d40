"""patch_loss's Triton kernels: values and gradients of both orders against float64, layouts, launches."""

from __future__ import annotations

import itertools

import pytest
import torch
from fastgan.kernels._launch import recorded
from helpers import FLOORS, assert_close_to_float64, layouts
from torch import Tensor

import fastgan
from fastgan import ops
from fastgan.kernels import _reduce
from fastgan.kernels import patch_loss as kernels

MODES = ("vanilla", "lsgan", "wgan", "hinge")
FORMS = list(itertools.product(MODES, ("critic", "generator"), (False, True)))
# Less than a block, a prime number of elements, more than one block and program with a rest.
SHAPES = [(3, 1, 7, 5), (3, 1, 1, 1), (3, 2, 13, 31)]
WEIGHT = torch.tensor([0.5, 2.0, 1.0])


def make_maps(seed: int, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]


def leaves(maps: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in maps]


def both_orders(real: list[Tensor], fake: list[Tensor], backend: str, **options) -> list[Tensor]:
    """Loss, accuracies, gradients, and the gradients of a penalty on them that also reaches the loss's own gradient."""
    real, fake = leaves(real), leaves(fake)
    result = ops.patch_loss(real, fake, backend=backend, **options)
    scale = torch.tensor(1.5, dtype=result.loss.dtype, requires_grad=True)
    first = torch.autograd.grad(result.loss * scale, [*real, *fake], create_graph=True, allow_unused=True)
    first = [g for g in first if g is not None]
    penalty = sum((g * (g + 1 / (1 + i))).sum() for i, g in enumerate(first))
    second = torch.autograd.grad(
        penalty.to(result.loss.dtype), [*real, *fake, scale], allow_unused=True, materialize_grads=True
    )
    accuracies = [a for a in (result.real_accuracy, result.fake_accuracy) if a is not None]
    return [result.loss.detach(), *accuracies, *[g.detach() for g in first], *second]


@pytest.mark.parametrize(("mode", "side", "paired"), FORMS)
def test_both_orders_against_float64(mode, side, paired, launches):
    options = {"mode": mode, "side": side, "paired": paired, "sample_weight": WEIGHT, "map_weight": [1.0, 3.0, 0.5]}
    options |= {"real_target": 0.9, "fake_target": 0.2}
    real, fake = make_maps(0), make_maps(1)
    fused = both_orders(real, fake, "triton", **options)
    assert [launch.kernel.__name__ for launch in launches] == ["forward_kernel", "backward_kernel", "second_kernel"]
    eager = both_orders(real, fake, "reference", **options)
    exact = both_orders([x.double() for x in real], [x.double() for x in fake], "reference", **options)
    for i, (a, b, c) in enumerate(zip(fused, eager, exact, strict=True)):
        # wgan's terms cancel: the loss is held to the rounding of its terms.
        # A gradient of second order is a product of six rounded numbers.
        floor = FLOORS[torch.float32] * (4 + 2 / float(c.abs())) if i == 0 else 2 * FLOORS[torch.float32]
        assert_close_to_float64(a, b, c, floor=floor, what=f"output {i}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("paired", [False, True])
def test_half_types_are_rounded_once(dtype, paired):
    real, fake = make_maps(2, dtype), make_maps(3, dtype)
    results = []
    for backend, wide in (("triton", dtype), ("reference", torch.float64)):
        maps = leaves([x.to(wide) for x in (*real, *fake)])
        loss = ops.patch_loss(maps[:3], maps[3:], paired=paired, backend=backend).loss
        results.append([loss.detach(), *torch.autograd.grad(loss * 64.0, maps)])
    (loss, *found), (exact_loss, *exact) = results
    assert loss.dtype == torch.float32
    assert abs(float(loss - exact_loss)) <= 1e-6 * float(exact_loss)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == dtype
        assert float((a.double() - b).abs().max() / b.abs().max()) <= FLOORS[dtype]


@pytest.mark.parametrize("real_layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("fake_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("paired", [False, True])
def test_layouts(real_layout, fake_layout, paired):
    shape = [(3, 2, 5, 7)]
    real = layouts(make_maps(4, shapes=shape)[0])[real_layout]
    fake = layouts(make_maps(5, shapes=shape)[0])[fake_layout]
    options = {"paired": paired, "sample_weight": WEIGHT}
    found = both_orders([real], [fake], "triton", **options)
    expected = both_orders([real.contiguous().double()], [fake.contiguous().double()], "reference", **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=1e-9)


def test_unaligned_maps():
    """A map that begins in the middle of 16 bytes is read element by element."""
    store = torch.randn(2 * 1500 + 1)
    real, fake = store[1:1501].view(2, 750), store[1501:].view(2, 750)
    found = both_orders([real], [fake], "triton")
    for a, b in zip(found, both_orders([real.double()], [fake.double()], "reference"), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("side", ["real", "fake"])
@pytest.mark.parametrize("paired", [False, True])
def test_gradients_of_one_side(side, paired, launches):
    """Only one side wants gradients, as in R1; of the other one no slope is stored."""
    real, fake = make_maps(6), make_maps(7)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        wanted = leaves([x.to(dtype) for x in (real if side == "real" else fake)])
        other = [x.to(dtype) for x in (fake if side == "real" else real)]
        loss = ops.patch_loss(
            *((wanted, other) if side == "real" else (other, wanted)), paired=paired, backend=backend
        ).loss
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum((g * g).sum() for g in first), wanted)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=2e-6, atol=1e-12)
    assert len(launches) == 3
    assert launches[0].arguments["slopes_ptr"].numel() == sum(x.numel() for x in real)


def test_other_ranks_and_missing_sides():
    for shape in [(5,), (3, 7), (2, 3, 11), (1, 1, 41, 53)]:
        (real,), (fake,) = make_maps(8, shapes=[shape]), make_maps(9, shapes=[shape])
        for sides in ((real, fake), (real, None), (None, fake)):
            found = ops.patch_loss(*sides, mode="lsgan", backend="triton")
            wide = [None if x is None else x.double() for x in sides]
            expected = ops.patch_loss(*wide, mode="lsgan", backend="reference")
            torch.testing.assert_close(found.loss.double(), expected.loss, rtol=6e-7, atol=0)
            assert (found.real_accuracy is None) == (sides[0] is None)
            for a, b in zip(found[1:], expected[1:], strict=True):
                assert a is b is None or torch.allclose(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch_and_an_empty_map_among_others(mode):
    empty = torch.empty(0, 1, 3, 3, requires_grad=True)
    result = ops.patch_loss([empty], [empty], mode=mode)
    assert result.loss.item() == 0.0
    assert result.real_accuracy.tolist() == result.fake_accuracy.tolist() == [0.0]
    assert torch.autograd.grad(result.loss, empty)[0].shape == empty.shape
    full = torch.randn(2, 1, 3, 3)
    mixed = ops.patch_loss([empty, full], [full, empty], mode=mode)
    expected = ops.patch_loss([empty, full], [full, empty], mode=mode, backend="reference")
    torch.testing.assert_close(list(mixed), list(expected))


@pytest.mark.parametrize(("mode", "side", "paired"), FORMS)
def test_nan_spreads(mode, side, paired):
    real, fake = make_maps(10), make_maps(11)
    fake[1][0, 0, 0, 0] = float("nan")
    result = ops.patch_loss(real, fake, mode=mode, side=side, paired=paired)
    assert torch.isnan(result.loss)
    assert torch.isfinite(result.fake_accuracy).all()


def test_extreme_logits():
    """softplus must neither overflow nor lose the slope of a confident answer."""
    x = torch.tensor([[-1e4, -100.0, -30.0, -20.0, 0.0, 20.0, 30.0, 100.0, 1e4]], requires_grad=True)
    loss = ops.patch_loss(x, None).loss
    (gradient,) = torch.autograd.grad(loss, x)
    loss = loss.detach()
    exact = x.detach().double()
    torch.testing.assert_close(gradient.double(), -torch.sigmoid(-exact) / 9, rtol=1e-6, atol=1e-36)
    assert float(loss) == pytest.approx(float(torch.logaddexp(-exact, torch.zeros_like(exact)).mean()), rel=1e-6)
    confident = torch.full((1, 7), 25.0)
    expected = float(torch.nn.functional.softplus(torch.tensor(-25.0, dtype=torch.float64)))
    assert float(ops.patch_loss(confident, None).loss) == pytest.approx(expected, rel=1e-6)


def test_same_bits_for_any_order_of_programs(shuffled):
    real, fake = make_maps(12, shapes=[(3, 1, 41, 43), (3, 5)]), make_maps(13, shapes=[(3, 1, 41, 43), (3, 5)])
    results = []
    for seed in range(4):
        if seed:
            shuffled(seed)
        with recorded() as launches:
            results.append(both_orders(real, fake, "triton"))
        assert launches[0].grid[0] > 12
        assert not any(counter.any() for counter in _reduce._counters.values())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_the_kernel_does_not_take_runs_on_the_fallback():
    maps = [torch.randn(2, 3) for _ in range(65)]
    with recorded() as launches:
        found = ops.patch_loss(maps, None, mode="lsgan").loss
    assert not launches
    torch.testing.assert_close(found, ops.patch_loss(maps, None, mode="lsgan", backend="reference").loss)
    assert fastgan.explain(ops.patch_loss, maps, None).backend == "triton"
    assert fastgan.explain(ops.patch_loss, maps[0].double(), None).backend == "reference"


def test_shipped_configurations_are_planned_without_data():
    labels = [label for label, _ in kernels.shipped()]
    assert len(labels) == len(set(labels)) == 18
    (forward,) = dict(kernels.shipped())["3 x 30x30, batch 16, float32, vanilla: forward"]
    # Both sides are read, their slopes and six accuracies and the loss written.
    assert forward.bytes == 2 * 6 * 16 * 900 * 4 + 7 * 4
