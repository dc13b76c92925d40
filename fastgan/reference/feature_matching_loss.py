"""The oracle of feature_matching_loss: plain torch, any dtype and device, differentiable without end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def feature_matching_loss(
    fake: Sequence[Tensor],
    real: Sequence[Tensor],
    *,
    kind: str,
    map_weight: Sequence[float],
    masks: Sequence[Tensor] | None,
) -> Tensor:
    """Σ over maps of map_weight · (masked) mean of |fake - real| or (fake - real)²; 0-dim, float32 or float64.

    Args:
        fake, real: the same number of maps [N, C, ...] of the same shapes.
        kind: "l1" or "l2".
        map_weight: one factor per map.
        masks: None, or one per map, [N or 1, 1, ...] broadcastable to it. A mask that sums to 0 gives 0.
    """
    compute = torch.float64 if fake[0].dtype == torch.float64 else torch.float32
    loss = torch.zeros((), dtype=compute, device=fake[0].device)
    for i, weight in enumerate(map_weight):
        difference = fake[i].to(compute) - real[i].to(compute)
        distance = difference.abs() if kind == "l1" else difference.square()
        if masks is None:
            loss = loss + distance.sum() * (weight / max(distance.numel(), 1))
        else:
            mask = masks[i].to(compute).expand(distance.shape)
            count = mask.sum()
            loss = loss + weight * (distance * mask).sum() / torch.where(count == 0, 1.0, count)
    return loss
