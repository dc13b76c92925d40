"""patch_loss on its CUDA kernels, thread by thread on the CPU: the whole op against float64, both orders, reads."""

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
module = importlib.import_module("fastgan.ops.patch_loss")
FORMS = list(itertools.product(("vanilla", "lsgan", "wgan", "hinge"), ("critic", "generator"), (False, True)))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODES = {"bce": 0, "square": 1, "linear": 2, "hinge": 3}


class PatchLoss(Simulated):
    """The three registered ops."""

    def forward(self, real, fake, weight, scale, form, real_anchor, fake_anchor, cut, paired, real_slopes, fake_slopes):
        wanted = [*(real if real_slopes else ()), *(fake if fake_slopes else ())]
        wanted = real if paired and wanted else wanted
        results = unwritten(), unwritten(len(real)), unwritten(len(fake)), unwritten(sum(x.numel() for x in wanted))
        arguments = *self.maps(real, fake), *self.weights(weight, scale), CODES[form], real_anchor, fake_anchor, cut
        targets = [flat(x, written=True) for x in results]
        self.run(f"forward_{name_of((real or fake)[0].dtype)}", *arguments, paired, real_slopes, fake_slopes, *targets)
        return results

    def backward(self, grad_loss, slopes, real, fake, weight, scale, form, paired, real_slopes, fake_slopes):
        gradients = [unwritten(like=x) for x in (*(real if real_slopes else ()), *(fake if fake_slopes else ()))]
        self.run(
            f"backward_{name_of((real or fake)[0].dtype)}",
            *(flat(grad_loss), flat(slopes)),
            *(*self.maps(real, fake), *self.weights(weight, scale), paired, real_slopes, fake_slopes),
            [flat(x, written=True) for x in gradients],
        )
        return gradients

    def second(self, cotangents, grad_loss, slopes, real, fake, weight, scale, form, paired, real_slopes, fake_slopes):
        gradients = [unwritten(like=x) for x in (*(real if real_slopes else ()), *(fake if fake_slopes else ()))]
        ordered = [torch.empty_like(x).copy_(c) for c, x in zip(cotangents, gradients, strict=True)]
        grad_grad_loss = unwritten()
        self.run(
            f"second_{name_of((real or fake)[0].dtype)}",
            *([flat(x) for x in ordered], flat(grad_loss), flat(slopes), *self.maps(real, fake)),
            *(*self.weights(weight, scale), CODES[form], paired, real_slopes, fake_slopes),
            flat(grad_grad_loss, written=True),
            [flat(x, written=True) for x in gradients],
        )
        return [grad_grad_loss, *gradients]

    @staticmethod
    def maps(real: Sequence[Tensor], fake: Sequence[Tensor]) -> tuple[Any, ...]:
        return [flat(x) for x in real], [flat(x) for x in fake], [x.shape[0] for x in (*real, *fake)]

    @staticmethod
    def weights(weight: Tensor | None, scale: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        factors = np.array(scale)
        factors.flags.writeable = False
        return flat(torch.empty(0) if weight is None else weight), factors


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[PatchLoss]:
    simulated = PatchLoss(simt_build.load(Path(__file__).parent / "patch_loss.cpp"))
    monkeypatch.setattr(module, "_plans", {})
    registered = {
        "patch_loss_cuda": simulated.forward,
        "patch_loss_bwd_cuda": simulated.backward,
        "patch_loss_bwd_bwd_cuda": simulated.second,
    }
    with on_simulated_kernels(monkeypatch, module, registered):
        yield simulated


def make_maps(seed: int, dtype: torch.dtype, shapes: Sequence[Sequence[int]], scale: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(*shape, generator=generator)).to(dtype) for shape in shapes]


def results(real, fake, *, backend: str, wanted: str = "rf", second: bool = True, **options) -> list[Tensor]:
    """Loss, accuracies, gradients, and the gradients of a function of these that reach maps and the loss's factor."""
    real, fake = (
        [x.detach().requires_grad_(side in wanted) for x in maps] for maps, side in ((real, "r"), (fake, "f"))
    )
    leaves = [x for x in (*real, *fake) if x.requires_grad]
    factor = torch.tensor(3.0, dtype=torch.promote_types(torch.float32, leaves[0].dtype), requires_grad=True)
    found = ops.patch_loss(real or None, fake or None, backend=backend, **options)
    accuracies = [x for x in found[1:] if x is not None]
    loss = (found.loss * factor).to(factor.dtype)
    first = torch.autograd.grad(loss, leaves, create_graph=second, allow_unused=True, materialize_grads=True)
    if not second:
        return [found.loss, *accuracies, *first]
    penalty = sum((g.to(factor.dtype) * (i + 1) * (0.5 + g.detach())).sum() for i, g in enumerate(first))
    more = torch.autograd.grad(penalty, [*leaves, factor], allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (found.loss, *accuracies, *first, *more)]


def check(real, fake, **options) -> None:
    """The rule of accuracy, against float64 and the reference in the maps' own dtype."""
    fused = results(real, fake, backend="cuda", **options)
    if (weight := options.get("sample_weight")) is not None:
        options["sample_weight"] = weight.double()
    exact = results([x.double() for x in real], [x.double() for x in fake], backend="reference", **options)
    if weight is not None:
        options["sample_weight"] = weight
    eager = results(real, fake, backend="reference", **options)
    for i, (a, b, c) in enumerate(zip(fused, eager, exact, strict=True)):
        # Sums of terms that cancel, the loss and the gradient of its factor, are held to the rounding of the terms; the
        # second one is over gradients in the maps' dtype.
        floor = FLOORS[a.dtype if i == 0 else (real or fake)[0].dtype]
        floor = floor * (2 + 2 / c.abs().clamp_min(1e-3).item()) if c.ndim == 0 else None
        assert_close_to_float64(a, b.to(a.dtype), c, floor=floor, what=f"result {i}")


@pytest.mark.parametrize(("mode", "side", "paired"), FORMS)
def test_every_form_in_both_orders(kernels, mode, side, paired):
    shapes = [(3, 1, 7, 5), (3, 2, 12, 16)]
    options = {"mode": mode, "side": side, "paired": paired, "real_target": 0.9, "fake_target": 0.2}
    weight = torch.tensor([0.5, 2.0, 1.0])
    for dtype in DTYPES:
        kernels.schedules = simt_build.SCHEDULES if dtype == torch.float32 else ONE_SCHEDULE
        real, fake = make_maps(0, dtype, shapes), make_maps(1, dtype, shapes)
        check(real, fake, sample_weight=weight, map_weight=[1.0, 3.0], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", ["r", "f", "rf"])
def test_several_blocks_tails_and_sides(kernels, wanted, dtype):
    """Blocks that begin within a sample, maps that end within a vector, slopes that begin off any vector."""
    shapes = [(3, 1, 37, 41), (3, 5), (3,), (3, 1, 30, 30)]
    real, fake = make_maps(2, dtype, shapes), make_maps(3, dtype, shapes)
    for paired in (False, True):
        kernels.schedules = simt_build.SCHEDULES[2:] if paired else ONE_SCHEDULE
        check(real, fake, wanted=wanted, paired=paired, sample_weight=torch.tensor([0.5, 2.0, 1.0]))


@pytest.mark.parametrize("paired", [False, True])
def test_layouts_and_odd_addresses(kernels, paired):
    kernels.schedules = ONE_SCHEDULE
    for dtype in (torch.float32, torch.float16):
        shapes = [(2, 8, 9, 11)] * 3
        real, fake = make_maps(4, dtype, shapes), make_maps(5, dtype, shapes)
        real[0] = real[0].contiguous(memory_format=torch.channels_last)
        fake[0] = fake[0].contiguous(memory_format=torch.channels_last)
        fake[1] = fake[1].contiguous(memory_format=torch.channels_last)
        # No 16 bytes begin where this does.
        real[2] = torch.cat([torch.zeros(1).to(dtype), real[2].reshape(-1)])[1:].view(shapes[2])
        check(real, fake, paired=paired, sample_weight=torch.tensor([0.5, 2.0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_is_read_and_written_once(kernels, dtype):
    kernels.schedules = ONE_SCHEDULE
    shapes = [(2, 1, 62, 62), (2, 1, 30, 30), (2, 1, 15, 13)]
    real, fake = make_maps(6, dtype, shapes), make_maps(7, dtype, shapes)
    for paired in (False, True):
        results(real, fake, backend="cuda", paired=paired, second=False)
        maps = [x.numel() * x.element_size() for x in (*real, *fake)]
        slopes = sum(x.numel() for x in real) * 4 * (1 if paired else 2)
        (_, forward), (_, backward) = kernels.traffic[-2:]
        # Six maps, weights, scales, the loss, two accuracies, the slopes.
        assert [read for _, read, _ in forward[:6]] == maps
        assert forward[11][1:] == (0, slopes)
        # The loss's gradient, the slopes, the maps, weights, scales, the gradients: the maps are not read again.
        assert backward[1][1:] == (slopes, 0)
        assert [read for _, read, _ in backward[2:8]] == [0] * 6
        assert [entry[1:] for entry in backward[10:16]] == [(0, written) for written in maps]


def test_more_than_one_launch_and_more_than_one_tile(kernels):
    kernels.schedules = simt_build.SCHEDULES[1:3]
    shapes = [(2, 1 + i % 5) for i in range(41)]
    check(make_maps(8, torch.float32, shapes), [], map_weight=[0.1 * i for i in range(41)])
    kernels.schedules = ONE_SCHEDULE
    (large,) = make_maps(10, torch.float32, [(1, 1, 1025, 1026)])
    got = ops.patch_loss(large, None, mode="hinge", backend="cuda")
    want = ops.patch_loss(large.double(), None, mode="hinge", backend="reference")
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=3e-7)
    assert got.real_accuracy.item() == pytest.approx((large > 0).double().mean().item(), rel=1e-7)


@pytest.mark.parametrize(("mode", "side", "paired"), FORMS)
def test_nan_and_infinity_spread(kernels, mode, side, paired):
    kernels.schedules = ONE_SCHEDULE
    for value in (float("nan"), float("inf"), float("-inf")):
        real, fake = make_maps(11, torch.float32, [(2, 9)]), make_maps(12, torch.float32, [(2, 9)])
        fake[0][1, 3] = value
        options = {"mode": mode, "side": side, "paired": paired, "second": False}
        got = results(real, fake, backend="cuda", **options)
        want = results(real, fake, backend="reference", **options)
        torch.testing.assert_close([x.detach() for x in got], [x.detach() for x in want], equal_nan=True)


def test_confident_answers_keep_their_slopes(kernels):
    x = torch.tensor([[-1e4, -100.0, -87.5, -30.0, -20.0, -1e-4, 0.0, 20.0, 30.0, 87.5, 100.0, 1e4]])
    leaf = x.clone().requires_grad_()
    loss = ops.patch_loss(leaf, None, backend="cuda").loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient.double(), -torch.sigmoid(-x.double()) / 12, rtol=1e-6, atol=1e-36)
    assert loss.item() == pytest.approx(float(torch.logaddexp(-x.double(), torch.zeros(1)).mean()), rel=1e-6)


def test_half_gradients_survive_a_small_share(kernels):
    kernels.schedules = ONE_SCHEDULE
    x = (0.1 * torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))).half().requires_grad_()
    (ops.patch_loss(x, None, backend="cuda").loss * 65536.0).backward()
    exact = -65536.0 * torch.sigmoid(-x.detach().double()) / x.numel()
    assert float(((x.grad.double() - exact) / exact).abs().max()) < 6e-4


def test_empty_maps_beside_full_ones(kernels):
    for shapes in ([(0, 1, 3, 3)], [(0, 1, 3, 3), (0, 2)]):
        empty = make_maps(13, torch.float32, shapes)
        check(empty, empty)
        got = ops.patch_loss(empty, empty, backend="cuda")
        assert got.loss == 0
        assert [*got.real_accuracy, *got.fake_accuracy] == [0] * 2 * len(shapes)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    samples=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=4),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
    wanted=st.sampled_from(["r", "f", "rf"]),
    seed=st.integers(0, 99),
)
def test_drawn_shapes(kernels, samples, sizes, form, dtype, weighted, wanted, seed):
    mode, side, paired = form
    if side == "generator" and not paired:
        wanted = "f"
    kernels.schedules = [("forward", 0), ("random", seed)]
    shapes = [(samples, size) for size in sizes]
    weight = torch.rand(samples, generator=torch.Generator().manual_seed(seed)) + 0.5 if weighted else None
    real, fake = make_maps(seed, dtype, shapes), make_maps(seed + 100, dtype, shapes)
    check(real, fake, mode=mode, side=side, paired=paired, sample_weight=weight, wanted=wanted)
