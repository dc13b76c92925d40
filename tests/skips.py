"""A small network with skips, for the tests of what ``infer`` hands on between layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Skips(nn.Module):
    """A value that two layers read, one of them beside another value, and a value that torch, or a sum, reads too."""

    def __init__(self, seen: str = "") -> None:
        super().__init__()
        self.seen = seen
        self.first, self.second = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 4, 2, 1)
        self.third, self.up = nn.Conv2d(32, 64, 3, padding=1), nn.ConvTranspose2d(64, 48, 4, 2, 1)
        self.joined, self.last = nn.Conv2d(80, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.first(x))
        two = F.leaky_relu(self.second(one), 0.2)
        up = F.relu(self.up(F.relu(self.third(two))))
        y = F.relu(self.joined(torch.cat([one, up], 1)))
        if self.seen == "torch":
            y = y + torch.flip(up, [3])[:, :32]
        return self.last(y + one if self.seen == "sum" else y)
