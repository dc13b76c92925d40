"""feature_matching_loss on its CUDA kernels, thread by thread on the CPU: the whole op against float64, both orders."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simt_build
import torch
from helpers import FLOORS, assert_close_to_float64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simt_maps import ONE_SCHEDULE, Simulated, flat, name_of, on_simulated_kernels, unwritten
from torch import Tensor

from fastgan import ops

# The module, not the function of the same name that the package exports.
module = importlib.import_module("fastgan.ops.feature_matching_loss")
KINDS = ("l1", "l2")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_last(x: Tensor) -> bool:
    return not x.is_contiguous()


class FeatureMatchingLoss(Simulated):
    """The three registered ops."""

    def forward(self, fake, real, masks, weight, kind, keep_signs):
        words = sum(-(-x.numel() // 256) * 16 for x in fake) if keep_signs and kind == "l1" else 0
        # A pattern that no sign leaves behind.
        results = unwritten(), torch.full((words,), 0x5A5A5A5A, dtype=torch.int32), unwritten(len(fake))
        weights = np.array(weight)
        weights.flags.writeable = False
        self.run(
            f"forward_{name_of(fake[0].dtype)}",
            *(*self.maps(fake, real, masks), weights, kind == "l2", keep_signs and kind == "l1"),
            *[flat(x, written=True) for x in results],
        )
        return results

    def backward(self, grad_loss, signs, factors, fake, real, masks, kind, want_fake, want_real):
        gradients = [unwritten(like=x) for x in (*(fake if want_fake else ()), *(real if want_real else ()))]
        self.run(
            f"backward_{name_of(fake[0].dtype)}",
            *(flat(grad_loss), flat(signs), flat(factors), *self.maps(fake, real, masks)),
            *(kind == "l2", want_fake, want_real, [flat(x, written=True) for x in gradients]),
        )
        return gradients

    def second(self, cotangents, grad_loss, signs, factors, fake, real, masks, kind, want_fake, want_real):
        gradients = [unwritten(like=x) for x in (*(fake if want_fake else ()), *(real if want_real else ()))]
        ordered = [torch.empty_like(x).copy_(c) for c, x in zip(cotangents, gradients, strict=True)]
        grad_grad_loss = unwritten()
        self.run(
            f"second_{name_of(fake[0].dtype)}",
            *([flat(x) for x in ordered], flat(grad_loss), flat(signs), flat(factors)),
            *(*self.maps(fake, real, masks), kind == "l2", want_fake, want_real),
            flat(grad_grad_loss, written=True),
            [flat(x, written=True) for x in gradients],
        )
        return [grad_grad_loss, *gradients]

    @staticmethod
    def maps(fake: Sequence[Tensor], real: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Any, ...]:
        geometry = [n for x in fake for n in (x.shape[0], x.shape[1], int(is_last(x)))]
        return [flat(x) for x in fake], [flat(x) for x in real], [flat(x) for x in masks], geometry


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[FeatureMatchingLoss]:
    simulated = FeatureMatchingLoss(simt_build.load(Path(__file__).parent / "feature_matching_loss.cpp"))
    registered = {
        "feature_matching_loss_cuda": simulated.forward,
        "feature_matching_loss_bwd_cuda": simulated.backward,
        "feature_matching_loss_bwd_bwd_cuda": simulated.second,
    }
    with on_simulated_kernels(monkeypatch, module, registered):
        yield simulated


def make_maps(seed: int, dtype: torch.dtype, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def make_masks(seed: int, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((n, 1, *rest), generator=generator) * (i != 1) for i, (n, _, *rest) in enumerate(shapes)]


def results(fake, real, *, backend: str, wanted: str = "f", second: bool = True, **options) -> list[Tensor]:
    """Loss, gradients, and the gradients of a function of these that reach the maps and the loss's factor."""
    fake, real = (
        [x.detach().requires_grad_(side in wanted) for x in maps] for maps, side in ((fake, "f"), (real, "r"))
    )
    leaves = [x for x in (*fake, *real) if x.requires_grad]
    factor = torch.tensor(3.0, dtype=torch.promote_types(torch.float32, fake[0].dtype), requires_grad=True)
    loss = ops.feature_matching_loss(fake, real, backend=backend, **options)
    first = torch.autograd.grad(loss * factor, leaves, create_graph=second)
    if not second:
        return [loss.detach(), *first]
    penalty = sum((g.to(factor.dtype) * (i + 1) * (0.5 + g.detach())).sum() for i, g in enumerate(first))
    more = torch.autograd.grad(penalty, [*leaves, factor], allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (loss, *first, *more)]


def check(fake, real, **options) -> None:
    """The rule of accuracy, against float64 and the reference in the maps' own dtype."""
    fused = results(fake, real, backend="cuda", **options)
    exact = results([x.double() for x in fake], [x.double() for x in real], backend="reference", **options)
    eager = results(fake, real, backend="reference", **options)
    for i, (a, b, c) in enumerate(zip(fused, eager, exact, strict=True)):
        # The gradient of the factor is a sum of terms that cancel, over gradients in the maps' dtype: it is held to the
        # rounding of the terms.
        factor = i > 0 and c.ndim == 0
        floor = FLOORS[fake[0].dtype] * (1 + 2 / c.abs().clamp_min(1e-3).item()) if factor else FLOORS[a.dtype]
        assert_close_to_float64(a, b.to(a.dtype), c, floor=floor, what=f"result {i}")


@pytest.mark.parametrize(("kind", "masked", "wanted"), list(itertools.product(KINDS, (False, True), ("f", "r", "fr"))))
def test_several_blocks_and_tails_in_both_orders(kernels, kind, masked, wanted):
    shapes = [(2, 3, 5, 7), (2, 4, 16, 16), (2, 5, 23, 37), (3, 1)]
    for dtype in DTYPES:
        kernels.schedules = simt_build.SCHEDULES if dtype == torch.float32 and wanted == "f" else ONE_SCHEDULE
        fake, real = make_maps(0, dtype, shapes), make_maps(1, dtype, shapes)
        masks = make_masks(2, shapes) if masked else None
        check(fake, real, kind=kind, mask=masks, wanted=wanted, map_weight=[1.0, 0.5, 2.0, 3.0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_odd_addresses(kernels, kind, masked):
    kernels.schedules = ONE_SCHEDULE
    shapes = [(2, 6, 9, 11)] * 4
    masks = make_masks(3, shapes) if masked else None
    for dtype in (torch.float32, torch.float16):
        fake, real = make_maps(4, dtype, shapes), make_maps(5, dtype, shapes)
        fake[0] = fake[0].contiguous(memory_format=torch.channels_last)
        real[0] = real[0].contiguous(memory_format=torch.channels_last)
        fake[1] = fake[1].contiguous(memory_format=torch.channels_last)
        real[2] = real[2].contiguous(memory_format=torch.channels_last)
        # No 16 bytes begin where this does.
        real[3] = torch.cat([torch.zeros(1).to(dtype), real[3].reshape(-1)])[1:].view(shapes[3])
        check(fake, real, kind=kind, mask=masks, wanted="fr")


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_are_packed_as_the_other_backends_pack_them(kernels, dtype):
    fake, real = (
        make_maps(6, dtype, [(2, 3, 5, 7), (1, 4, 27, 41)]),
        make_maps(7, dtype, [(2, 3, 5, 7), (1, 4, 27, 41)]),
    )
    fake[1][0, :, 3] = real[1][0, :, 3]
    fake[0][0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    loss, signs, factors = kernels.forward(fake, real, [], [1.0, 0.5], "l1", True)
    _, plain_signs, plain_factors = module._forward_plain(fake, real, [], [1.0, 0.5], "l1", True)
    assert torch.equal(signs, plain_signs)
    torch.testing.assert_close(factors, plain_factors)
    assert loss.isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_is_read_and_written_once(kernels, dtype):
    kernels.schedules = ONE_SCHEDULE
    shapes = [(2, 8, 31, 33), (2, 16, 15, 15)]
    fake, real = make_maps(8, dtype, shapes), make_maps(9, dtype, shapes)
    maps = [x.numel() * x.element_size() for x in fake]
    words = sum(-(-x.numel() // 256) * 64 for x in fake)
    for kind in KINDS:
        results(fake, real, backend="cuda", kind=kind, second=False)
        (_, forward), (_, backward) = kernels.traffic[-2:]
        # Four maps, weights, the loss, the signs; the loss's gradient, the signs, the factors, four maps, gradients.
        assert [read for _, read, _ in forward[:4]] == maps + maps
        assert forward[6][1:] == (0, words if kind == "l1" else 0)
        assert [read for _, read, _ in backward[3:7]] == ([0] * 4 if kind == "l1" else maps + maps)
        assert [entry[1:] for entry in backward[7:9]] == [(0, written) for written in maps]


def test_more_than_one_launch_and_more_than_one_tile(kernels):
    kernels.schedules = simt_build.SCHEDULES[:2]
    shapes = [(2, 1 + i % 5, 3) for i in range(40)]
    weights = [0.1 * i for i in range(40)]
    check(make_maps(10, torch.float32, shapes), make_maps(11, torch.float32, shapes), map_weight=weights)
    kernels.schedules = ONE_SCHEDULE
    (fake,), (real,) = (make_maps(seed, torch.float16, [(1, 3, 837, 836)]) for seed in (12, 13))
    got = ops.feature_matching_loss(fake, real, backend="cuda")
    want = ops.feature_matching_loss(fake.double(), real.double(), backend="reference")
    assert got.item() == pytest.approx(want.item(), rel=3e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_values_nan_and_infinity(kernels, kind):
    fake = torch.tensor([[1.0, 2.0, 3.0, float("nan"), 5.0]], requires_grad=True)
    real = torch.tensor([[1.0, 3.0, 2.0, 4.0, float("-inf")]])
    loss = ops.feature_matching_loss(fake, real, kind=kind, backend="cuda")
    assert torch.isnan(loss)
    (gradient,) = torch.autograd.grad(loss, fake)
    expected = [0.0, -0.2, 0.2, float("nan"), 0.2] if kind == "l1" else [0.0, -0.4, 0.4, float("nan"), float("inf")]
    torch.testing.assert_close(gradient, torch.tensor([expected]), equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_maps_and_masks_of_zeros(kernels, kind):
    shapes = [(0, 2, 3, 3), (2, 3, 4, 4)]
    fake, real = make_maps(14, torch.float32, shapes), make_maps(15, torch.float32, shapes)
    check(fake, real, kind=kind)
    check(fake[:1], real[:1], kind=kind)
    zeros = [torch.zeros(0, 1, 3, 3), torch.zeros(2, 1, 4, 4)]
    loss, *gradients = results(fake, real, backend="cuda", kind=kind, mask=zeros, second=False)
    assert loss == 0
    assert all(g.eq(0).all() for g in gradients)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 23), st.integers(1, 23)),
    more=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 300)), max_size=3),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    last=st.booleans(),
    wanted=st.sampled_from(["f", "r", "fr"]),
    seed=st.integers(0, 99),
)
def test_drawn_shapes(kernels, shape, more, kind, dtype, masked, last, wanted, seed):
    kernels.schedules = [("forward", 0), ("random", seed)]
    shapes = [shape, *more]
    fake, real = make_maps(seed, dtype, shapes), make_maps(seed + 100, dtype, shapes)
    if last:
        fake[0] = fake[0].contiguous(memory_format=torch.channels_last)
    check(fake, real, kind=kind, mask=make_masks(seed, shapes) if masked else None, wanted=wanted)
