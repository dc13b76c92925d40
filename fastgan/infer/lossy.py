"""Layers that are computed less exactly than in float32: as many of them as the picture can bear."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fastgan.infer.capture import eliminate_dead
from fastgan.infer.verify import least_psnr


class LossyLayers(ABC):
    """What of a graph is computed less exactly, and what went back to float32 because the picture would suffer.

    Args:
        module: the graph; it is changed.

    Attributes:
        least_db: what a picture must keep of the original's, as PSNR.
        lossy: names of the parts that are less exact, at first all that can be.
        kept: layer -> the PSNR in dB that making it alone less exact leaves, for layers that went back to float32.
    """

    least_db: float

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self.lossy: set[str] = set()
        self.kept: dict[str, float] = {}

    @abstractmethod
    def set(self, name: str, *, lossy: bool) -> None:
        """Have a part computed less exactly, or in float32; keeps ``lossy`` up to date."""

    @abstractmethod
    def layers_of(self, name: str) -> list[str]:
        """What a part is called in reports."""

    def drop_other_weights(self) -> None:
        """Keep no weight that nothing reads, once nothing changes any more."""
        graph = self._module.graph
        eliminate_dead(graph)
        used = {node.target for node in graph.nodes if node.op == "get_attr"}
        for name in [name for name, _ in self._module.named_buffers(recurse=False) if name not in used]:
            delattr(self._module, name)

    def give_up_most_harmful(self, run: Callable[[], Sequence[Any]], expected: Sequence[Any], db: float) -> None:
        """Compute in float32 again what harms the picture most, as many parts as it takes for ``least_db``, at least
        one.

        Each part's own harm is the mean square error that it makes alone. Errors of different layers add up, and what
        is more than their sum is taken to be the same multiple of each.

        Args:
            run: computes the results of one call from the graph as it is.
            expected: what they should be.
            db: the PSNR with all of ``lossy``.
        """
        harm = self._harms(run, expected)
        factor = max(1.0, 10 ** (-db / 10) / max(sum(harm.values()), 1e-30)) if math.isfinite(db) else 1.0
        left = factor * sum(harm.values())
        for name in sorted(harm, key=lambda name: -harm[name]):
            self.set(name, lossy=False)
            for layer in self.layers_of(name):
                self.kept[layer] = -10 * math.log10(harm[name]) if harm[name] > 0 else math.inf
            left -= factor * harm[name]
            if left <= 10 ** (-self.least_db / 10):
                break

    def _harms(self, run: Callable[[], Sequence[Any]], expected: Sequence[Any]) -> dict[str, float]:
        """The mean square error, of the range squared, with each of the lossy parts alone."""
        names, harm = sorted(self.lossy), {}
        for name in names:
            self.set(name, lossy=False)
        for name in names:
            self.set(name, lossy=True)
            harm[name] = 10 ** (-least_psnr(run(), expected) / 10)
            self.set(name, lossy=False)
        for name in names:
            self.set(name, lossy=True)
        return harm
