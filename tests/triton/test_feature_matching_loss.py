"""feature_matching_loss's Triton kernels: values and gradients of both orders against float64, masks, layouts."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from fastgan.kernels._launch import recorded
from helpers import FLOORS, assert_close_to_float64, layouts
from torch import Tensor

import fastgan
from fastgan import ops
from fastgan.kernels import _reduce
from fastgan.kernels import feature_matching_loss as kernels

# The module, not the function of the same name that the package exports.
feature_matching = importlib.import_module("fastgan.ops.feature_matching_loss")
KINDS = ("l1", "l2")
# Less than a block of signs, whole blocks of programs, a rest with a prime number of elements.
SHAPES = [(2, 3, 5, 7), (2, 4, 16, 16), (2, 5, 17, 19)]
WEIGHTS = [1.0, 0.5, 2.0]


def make_maps(seed: int, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def make_masks(seed: int, shapes=SHAPES) -> list[Tensor]:
    """The middle one is all zeros."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((n, 1, *rest), generator=generator) * (i != 1) for i, (n, _, *rest) in enumerate(shapes)]


def leaves(maps: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in maps]


def both_orders(fake: list[Tensor], real: list[Tensor], backend: str, **options) -> list[Tensor]:
    """Loss, gradients, and the gradients of a penalty on them that also reaches the loss's own gradient."""
    fake, real = leaves(fake), leaves(real)
    loss = ops.feature_matching_loss(fake, real, backend=backend, **options)
    scale = torch.tensor(1.5, dtype=loss.dtype, requires_grad=True)
    first = torch.autograd.grad(loss * scale, [*fake, *real], create_graph=True)
    penalty = sum((g * (g + 1 / (1 + i))).sum() for i, g in enumerate(first)).to(loss.dtype)
    second = torch.autograd.grad(penalty, [*fake, *real, scale], allow_unused=True, materialize_grads=True)
    return [loss.detach(), *[g.detach() for g in first], *second]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        # A 0-dim result is a sum whose terms cancel.
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-9 if b.ndim else 3e-7)


@pytest.mark.parametrize(("kind", "masked"), list(itertools.product(KINDS, (False, True))))
def test_both_orders_against_float64(kind, masked, launches):
    options = {"kind": kind, "map_weight": WEIGHTS, "mask": make_masks(2) if masked else None}
    fake, real = make_maps(0), make_maps(1)
    fused = both_orders(fake, real, "triton", **options)
    assert [launch.kernel.__name__ for launch in launches] == ["forward_kernel", "backward_kernel", "second_kernel"]
    eager = both_orders(fake, real, "reference", **options)
    exact = both_orders([x.double() for x in fake], [x.double() for x in real], "reference", **options)
    for i, (a, b, c) in enumerate(zip(fused, eager, exact, strict=True)):
        assert_close_to_float64(a, b, c, floor=2 * FLOORS[torch.float32], what=f"output {i}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "masked"), list(itertools.product(KINDS, (False, True))))
def test_half_types_are_rounded_once(kind, masked, dtype):
    fake, real = make_maps(3, dtype), make_maps(4, dtype)
    masks = make_masks(5) if masked else None
    results = []
    for backend, wide in (("triton", dtype), ("reference", torch.float64)):
        maps = leaves([x.to(wide) for x in (*fake, *real)])
        loss = ops.feature_matching_loss(maps[:3], maps[3:], kind=kind, mask=masks, backend=backend)
        results.append([loss.detach(), *torch.autograd.grad(loss * 64.0, maps)])
    (loss, *found), (exact_loss, *exact) = results
    assert loss.dtype == torch.float32
    assert abs(float(loss - exact_loss)) <= 1e-6 * float(exact_loss)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == dtype
        scale = b.abs().max().clamp_min(1e-30)
        assert float((a.double() - b).abs().max() / scale) <= FLOORS[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fake_layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("real_layout", ["contiguous", "channels_last"])
def test_layouts(kind, masked, fake_layout, real_layout):
    shape = [(3, 5, 13, 19)]
    fake = layouts(make_maps(6, shapes=shape)[0])[fake_layout]
    real = layouts(make_maps(7, shapes=shape)[0])[real_layout]
    options = {"kind": kind, "mask": make_masks(8, shape)[0] if masked else None}
    found = both_orders([fake], [real], "triton", **options)
    expected = both_orders([fake.contiguous().double()], [real.contiguous().double()], "reference", **options)
    assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_unaligned_maps_and_other_ranks(kind):
    """A map that begins in the middle of 16 bytes is read element by element."""
    store = torch.randn(2 * 2400 + 1)
    fake, real = store[1:2401].view(2, 3, 400), store[2401:].view(2, 3, 400)
    mask = torch.rand(1, 1, 400)
    for options in ({}, {"mask": mask}):
        found = both_orders([fake], [real], "triton", kind=kind, **options)
        expected = both_orders([fake.double()], [real.double()], "reference", kind=kind, **options)
        assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_side_alone(kind, launches):
    fake, real = leaves(make_maps(9)), make_maps(10)
    found = torch.autograd.grad(ops.feature_matching_loss(fake, real, kind=kind), fake)
    assert launches[1].arguments["real_out_ptrs"] is None
    wide = leaves([x.double() for x in make_maps(9)])
    loss = ops.feature_matching_loss(wide, [x.double() for x in real], kind=kind, backend="reference")
    for a, b in zip(found, torch.autograd.grad(loss, wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_values_nan_and_infinity(kind):
    fake = torch.tensor([[1.0, 2.0, 3.0, float("nan"), 5.0]], requires_grad=True)
    real = torch.tensor([[1.0, 3.0, 2.0, 4.0, float("-inf")]])
    loss = ops.feature_matching_loss(fake, real, kind=kind)
    assert torch.isnan(loss)
    (gradient,) = torch.autograd.grad(loss, fake)
    expected = [0.0, -0.2, 0.2, float("nan"), 0.2] if kind == "l1" else [0.0, -0.4, 0.4, float("nan"), float("inf")]
    torch.testing.assert_close(gradient, torch.tensor([expected]), equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_and_mask_of_zeros(kind):
    empty = torch.empty(0, 3, 4, 4, requires_grad=True)
    loss = ops.feature_matching_loss(empty, empty.detach(), kind=kind)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, empty)[0].shape == empty.shape
    fake = torch.randn(2, 3, 4, 4, requires_grad=True)
    mask = torch.zeros(1, 1, 4, 1, dtype=torch.bool)
    loss = ops.feature_matching_loss(fake, torch.zeros_like(fake), kind=kind, mask=mask)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, fake)[0].any()


def test_signs_are_packed_as_the_plain_kernels_do():
    fake, real = make_maps(11), make_maps(12)
    fake[0][0, 0, 0, :2] = torch.tensor([float("nan"), 1.0])
    real[0][0, 0, 0, 1] = 1.0
    last = torch.channels_last
    fake[1], real[1] = fake[1].contiguous(memory_format=last), real[1].contiguous(memory_format=last)
    _, signs, factors = kernels.feature_matching_loss(fake, real, [], WEIGHTS, "l1", True)
    _, plain_signs, plain_factors = feature_matching._forward_plain(fake, real, [], WEIGHTS, "l1", True)
    assert torch.equal(signs, plain_signs)
    torch.testing.assert_close(factors, plain_factors)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_order_of_programs(kind, shuffled):
    shapes = [(2, 8, 33, 35), (2, 3)]
    fake, real, masks = make_maps(13, shapes=shapes), make_maps(14, shapes=shapes), make_masks(15, shapes)
    results = []
    for seed in range(4):
        if seed:
            shuffled(seed)
        with recorded() as launches:
            results.append(both_orders(fake, real, "triton", kind=kind, mask=masks))
        assert launches[0].grid[0] > 8
        assert not any(counter.any() for counter in _reduce._counters.values())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_the_kernel_does_not_take_runs_on_the_fallback():
    maps = [torch.randn(2, 3) for _ in range(65)]
    with recorded() as launches:
        found = ops.feature_matching_loss(maps, maps[::-1])
    assert not launches
    torch.testing.assert_close(found, ops.feature_matching_loss(maps, maps[::-1], backend="reference"))
    assert fastgan.explain(ops.feature_matching_loss, maps[0], maps[1]).backend == "triton"


def test_shipped_configurations_are_planned_without_data():
    launches = dict(kernels.shipped())
    assert len(launches) == len(list(kernels.shipped())) == 18
    elements = 16 * (64 * 128 * 128 + 128 * 64 * 64 + 256 * 32 * 32 + 512 * 31 * 31)
    (forward,) = launches["4 maps, float16, l1: forward"]
    # Both sides are read; two bits per value, four factors and the loss are written.
    words = 16 * sum(-(-16 * n // 256) for n in (64 * 128 * 128, 128 * 64 * 64, 256 * 32 * 32, 512 * 31 * 31))
    assert forward.bytes == 4 * elements + 4 * words + 4 * 5
