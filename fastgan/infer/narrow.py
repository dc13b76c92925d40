"""Weights in bfloat16: which of a graph's are, and which stay float32."""

from __future__ import annotations

import torch
from torch import fx

from fastgan.infer import nodes
from fastgan.infer.capture import constant_of
from fastgan.infer.lossy import LossyLayers
from fastgan.infer.nodes import is_a, name_of


class NarrowWeights(LossyLayers):
    """The weights of a graph's convolutions, each stored in bfloat16 or in float32; parts are weights.

    A weight in bfloat16 is rounded in the graph itself, to nearest even, whichever algorithm will compute the layer: so
    the picture hardly depends on the machine, and a file holds half the bytes.
    """

    least_db = 40.0

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._nodes = _convolution_weights(module.graph)
        self._exact = {name: getattr(module, name) for name in self._nodes}
        rounded = {id(tensor): tensor.contiguous().bfloat16().float() for tensor in self._exact.values()}
        self._rounded = {name: rounded[id(tensor)] for name, tensor in self._exact.items()}
        for name in self._nodes:
            self.set(name, lossy=True)

    def set(self, name: str, *, lossy: bool) -> None:
        setattr(self._module, name, (self._rounded if lossy else self._exact)[name])
        (self.lossy.add if lossy else self.lossy.discard)(name)
        for node in self._nodes[name]:
            node.meta["storage"] = "bf16" if lossy else "fp32"

    def layers_of(self, name: str) -> list[str]:
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
