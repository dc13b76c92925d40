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
        self.run(
            f"forward_{name_of((real or fake)[0].dtype)}", *arguments, paired, real_slopes, fake_slopes, *targets
        )
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
    real, fake = ([x.detach().requires_grad_(side in wanted) for x in maps] for maps, side in ((real, "r"), (fake, "f")))
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
        # Sums of terms that cancel, the loss and the gradient of its factor, are held to the rounding of the terms.
        floor = FLOORS[a.dtype] * (2 + 2 / float(c.abs().clamp_min(1e-3))) if c.ndim == 0 and c.isfinite() else None
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
