"""The oracle of patch_loss: plain torch, any dtype and device, differentiable without end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def bce(x: Tensor, target: float) -> Tensor:
    """-target · log σ(x) - (1 - target) · log(1 - σ(x)), elementwise.

    Both logarithms are taken of a sigmoid, so that neither tail cancels.
    """
    return -(target * F.logsigmoid(x) + (1.0 - target) * F.logsigmoid(-x))


def judge(x: Tensor, mode: str, *, as_real: bool, target: float) -> Tensor:
    """The critic's loss for logits ``x`` that should be judged real, or fake; elementwise, [N, ...]."""
    if mode == "vanilla":
        return bce(x, target)
    if mode == "lsgan":
        return (x - target).square()
    if mode == "wgan":
        return -x if as_real else x
    return F.relu(1.0 - x) if as_real else F.relu(1.0 + x)


def fool(x: Tensor, mode: str, target: float) -> Tensor:
    """The generator's loss for logits ``x`` of its images; elementwise. Hinge is linear here: it must not saturate."""
    return -x if mode == "hinge" else judge(x, mode, as_real=True, target=target)


def pixel_losses(
    real: Tensor | None, fake: Tensor | None, mode: str, side: str, real_target: float, fake_target: float, paired: bool
) -> list[Tensor]:
    """The elementwise terms of one map, each to be averaged: one per side that counts, or one for a pairing."""
    if paired:
        difference = real - fake if side == "critic" else fake - real
        return [judge(difference, mode, as_real=True, target=real_target)]
    if side == "generator":
        return [fool(fake, mode, real_target)]
    terms = [] if real is None else [judge(real, mode, as_real=True, target=real_target)]
    return terms if fake is None else [*terms, judge(fake, mode, as_real=False, target=fake_target)]


def threshold(mode: str, real_target: float, fake_target: float) -> float:
    """The logit above which the critic says "real": midway between lsgan's targets (0.5 by default), else 0."""
    return 0.5 * (real_target + fake_target) if mode == "lsgan" else 0.0


def fraction(right: Tensor) -> Tensor:
    """The fraction of True, float32; 0 for an empty map."""
    return right.float().mean() if right.numel() else torch.zeros((), device=right.device)


@torch.no_grad()
def accuracies(
    real: Sequence[Tensor] | None, fake: Sequence[Tensor] | None, cut: float, paired: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Per map, the fraction of logits on the right side of ``cut``; of pairs, those with real above fake."""
    if paired:
        right = torch.stack([fraction(r > f) for r, f in zip(real, fake, strict=True)])
        return right, right.clone()
    return (
        None if real is None else torch.stack([fraction(x > cut) for x in real]),
        None if fake is None else torch.stack([fraction(x <= cut) for x in fake]),
    )


def patch_loss(
    real: Sequence[Tensor] | None,
    fake: Sequence[Tensor] | None,
    *,
    mode: str,
    side: str,
    real_target: float,
    fake_target: float,
    sample_weight: Tensor | None,
    map_scale: Sequence[float],
    paired: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Σ over maps of map_scale · (mean of the real terms + mean of the fake terms), as ops.patch_loss defines them.

    Args:
        real, fake: maps [N, ...], the same number of them; None leaves a side out. ``real`` is ignored for the
            generator unless ``paired``.
        sample_weight: [N], or None for ones.
        map_scale: one factor per map, 1 / maps of an average included.

    Returns:
        loss (0-dim, float32, or float64 for float64), real accuracy and fake accuracy [maps] float32, None for a side
        left out.
    """
    if side == "generator" and not paired:
        real = None
    first = (real or fake)[0]
    compute = torch.float64 if first.dtype == torch.float64 else torch.float32
    loss = torch.zeros((), dtype=compute, device=first.device)
    for i, scale in enumerate(map_scale):
        r = None if real is None else real[i].to(compute)
        f = None if fake is None else fake[i].to(compute)
        for term in pixel_losses(r, f, mode, side, real_target, fake_target, paired):
            if sample_weight is not None:
                term = term * sample_weight.to(compute).reshape(-1, *[1] * (term.ndim - 1))
            # An empty sum is 0 with a zero gradient, where an empty mean would be NaN.
            loss = loss + term.sum() * (scale / max(term.numel(), 1))
    return loss, *accuracies(real, fake, threshold(mode, real_target, fake_target), paired)
