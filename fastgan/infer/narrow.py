"""Weights in bfloat16: which of a graph's are, and which stay float32 because the picture would suffer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fastgan.infer import nodes
from fastgan.infer.capture import constant_of
from fastgan.infer.nodes import is_a, name_of
from fastgan.infer.verify import least_psnr

# What a picture must keep of the original's, as PSNR.
LEAST_DB = 40.0


class NarrowWeights:
    """The weights of a graph's convolutions, each stored in bfloat16 or in float32.

    A weight in bfloat16 is rounded in the graph itself, to nearest even, whichever algorithm will compute the layer: so
    the picture hardly depends on the machine, and a file holds half the bytes.

    Attributes:
        narrow: names of those that are in bfloat16, all of them at first.
        kept: layer -> the PSNR in dB that rounding its weight alone leaves, for layers that went back to float32.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._nodes = _convolution_weights(module.graph)
        self._exact = {name: getattr(module, name) for name in self._nodes}
        rounded = {id(tensor): tensor.contiguous().bfloat16().float() for tensor in self._exact.values()}
        self._rounded = {name: rounded[id(tensor)] for name, tensor in self._exact.items()}
        self.narrow: set[str] = set()
        self.kept: dict[str, float] = {}
        for name in self._nodes:
            self._store(name, narrow=True)

    def widen_most_harmful(self, run: Callable[[], Sequence[Any]], expected: Sequence[Any], db: float) -> None:
        """Store in float32 again what harms the picture most, as many weights as it takes for :data:`LEAST_DB`, at
        least one.

        Each weight's own harm is the mean square error that its rounding alone makes. Errors of different layers add
        up, and what the algorithms' own rounding adds is taken to be the same multiple of each.

        Args:
            run: computes the results of one call from the graph as it is.
            expected: what they should be.
            db: the PSNR with all of ``narrow``.
        """
        harm = self._harms(run, expected)
        factor = max(1.0, 10 ** (-db / 10) / max(sum(harm.values()), 1e-30)) if math.isfinite(db) else 1.0
        left = factor * sum(harm.values())
        for name in sorted(harm, key=lambda name: -harm[name]):
            self._store(name, narrow=False)
            for layer in self._layers_of(name):
                self.kept[layer] = -10 * math.log10(harm[name]) if harm[name] > 0 else math.inf
            left -= factor * harm[name]
            if left <= 10 ** (-LEAST_DB / 10):
                break

    def _harms(self, run: Callable[[], Sequence[Any]], expected: Sequence[Any]) -> dict[str, float]:
        """The mean square error, of the range squared, with each of the narrow weights alone."""
        names, harm = sorted(self.narrow), {}
        for name in names:
            self._store(name, narrow=False)
        for name in names:
            self._store(name, narrow=True)
            harm[name] = 10 ** (-least_psnr(run(), expected) / 10)
            self._store(name, narrow=False)
        for name in names:
            self._store(name, narrow=True)
        return harm

    def _store(self, name: str, *, narrow: bool) -> None:
        setattr(self._module, name, (self._rounded if narrow else self._exact)[name])
        (self.narrow.add if narrow else self.narrow.discard)(name)
        for node in self._nodes[name]:
            node.meta["storage"] = "bf16" if narrow else "fp32"

    def _layers_of(self, name: str) -> list[str]:
        return [name_of(user) for node in self._nodes[name] for user in node.users]


def _convolution_weights(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """name -> nodes of each float32 constant that nothing reads but convolutions, as their weight."""
    found: dict[str, list[fx.Node]] = {}
    others: set[str] = set()
    for node in graph.nodes:
        if node.op != "get_attr" or not node.users:
            continue
        found.setdefault(node.target, []).append(node)
        as_weight = all(_reads_as_weight(user, node) for user in node.users)
        if not as_weight or constant_of(node).dtype != torch.float32:
            others.add(node.target)
    return {name: of_name for name, of_name in found.items() if name not in others}


def _reads_as_weight(user: fx.Node, node: fx.Node) -> bool:
    if not is_a(user, nodes.convolution):
        return False
    return [name for name, value in user.kwargs.items() if value is node] == ["weight"]
