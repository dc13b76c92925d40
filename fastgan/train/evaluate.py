"""Held-out quality: how far generated pictures are from photographs that training never saw."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastgan.train.data import Pairs

# L1 is reported in grey levels of 8-bit pictures; pairs are in [-1, 1].
LEVELS = 127.5


@dataclass(frozen=True)
class HeldOut:
    """Mean |difference| over pixels and channels in grey levels (0-255), on crops of photographs that were held out."""

    trained: float
    untrained: float
    mean_colour: float
    crops: int
    photographs: int
    colour: tuple[int, int, int]  # the training photographs' mean, 8-bit sRGB
    pictures: Tensor = field(repr=False)  # what the trained generator drew, [N, 3, S, S] in [-1, 1]

    def gain_over(self, baseline: float) -> float:
        """By which share the trained generator's error is below ``baseline`` (negative: above)."""
        return 1 - self.trained / baseline

    @property
    def improved(self) -> bool:
        """Whether the trained generator beats both answers that need no training."""
        return self.trained < min(self.untrained, self.mean_colour)


@torch.no_grad()
def generate(model: nn.Module, sketch: Tensor, batch: int = 8) -> Tensor:
    """Run ``model`` in eval mode over ``sketch`` [N, 1, S, S] in batches; its mode is restored."""
    training = model.training
    model.eval()
    try:
        return torch.cat([model(part) for part in sketch.split(batch)])
    finally:
        model.train(training)


def mean_l1(pictures: Tensor, photos: Tensor) -> float:
    """Mean |difference| in grey levels of pictures in [-1, 1]."""
    return float((pictures - photos).abs().mean(dtype=torch.float64)) * LEVELS


def evaluate(trained: nn.Module, untrained: nn.Module, pairs: Pairs, photographs: int, colour: Tensor) -> HeldOut:
    """Compare a generator with its own start and with one constant answer.

    Args:
        trained, untrained: generators, drawing -> photograph.
        pairs: held-out pairs.
        photographs: from how many photographs they are cut.
        colour: the training photographs' mean colour [3] in [0, 1]: the best constant that training could know.
    """
    pictures = generate(trained, pairs.sketch)
    constant = (colour * 2 - 1).view(1, 3, 1, 1)
    return HeldOut(
        trained=mean_l1(pictures, pairs.photo),
        untrained=mean_l1(generate(untrained, pairs.sketch), pairs.photo),
        mean_colour=mean_l1(constant, pairs.photo),
        crops=len(pairs.photo),
        photographs=photographs,
        colour=tuple(int(level) for level in (colour * 255).round()),
        pictures=pictures,
    )
