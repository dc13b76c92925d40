"""The weights of an engine. Nobody else writes to them, so what algorithms make of them is made once and never
checked."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from fastgan import _native
from fastgan.infer import nodes
from fastgan.infer.capture import constant_of
from fastgan.infer.nodes import is_a


def own_constants(module: fx.GraphModule, original: fx.GraphModule) -> None:
    """Replace each constant that is memory of the model by a copy: what happens to the model later is its own.

    Constants of the ``original`` graph are the model's: parameters, buffers, and tensors that are neither.
    """
    tensors = [constant_of(node) for node in original.graph.nodes if node.op == "get_attr"]
    borrowed = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    copies: dict[int, Tensor] = {}
    for node in module.graph.nodes:
        value = constant_of(node)
        if value is None or value.untyped_storage().data_ptr() not in borrowed:
            continue
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        setattr(module, node.target, copies[id(value)])


class FrozenWeights:
    """The convolutions' weights among a graph's constants, which the CPU's kernels know as frozen; None has none.

    What they make of a weight (Winograd's transforms) lives as long as this object.
    """

    def __init__(self, module: fx.GraphModule | None) -> None:
        self._library = _native.cpu_library()
        found: dict[int, Tensor] = {}
        for name in _weight_names(module.graph) if module is not None else ():
            weight = getattr(module, name).contiguous()
            setattr(module, name, weight)
            found[weight.data_ptr()] = weight
        self.tensors = list(found.values())
        readings = Counter(_readings(module)) if module is not None else Counter()
        # What a second layer reads as it is, no matter what a first one made of it, must stay.
        self._droppable = [w for w in self.tensors if readings[w.untyped_storage().data_ptr()] == 1]
        for pointer in found:
            self._library.fastgan_freeze_weight(pointer)
        self._forget = weakref.finalize(self, _forget, self._library, list(found))
        self.dropped = 0

    def release(self) -> None:
        """Have the kernels forget the weights now, so that another program may own them."""
        self._forget()

    def prepared_bytes(self) -> int:
        """Memory of what was made of the weights."""
        return sum(self._library.fastgan_made_bytes(tensor.data_ptr()) for tensor in self.tensors)

    def drop(self) -> int:
        """Give back the values of which only what was made is read; returns their bytes. There is no way back."""
        kept = []
        for tensor in self._droppable:
            size = tensor.numel() * tensor.element_size()
            if self._library.fastgan_drop_weight(tensor.data_ptr(), size):
                self.dropped += size
            else:
                kept.append(tensor)
        self._droppable = kept
        return self.dropped


@contextmanager
def frozen(weight: Tensor) -> Iterator[Tensor]:
    """A copy of a weight, of which the kernels keep what they make as of an engine's, as long as the context lasts."""
    library, copy = _native.cpu_library(), weight.clone(memory_format=torch.contiguous_format)
    library.fastgan_freeze_weight(copy.data_ptr())
    try:
        yield copy
    finally:
        library.fastgan_forget_weight(copy.data_ptr())


def _forget(library: Any, pointers: list[int]) -> None:
    for pointer in pointers:
        library.fastgan_forget_weight(pointer)


def _readings(module: fx.GraphModule) -> Iterator[int]:
    """The storage of each constant, once for every place in the graph that reads it."""
    for user in module.graph.nodes:
        places: list[fx.Node] = []
        fx.map_arg((user.args, user.kwargs), places.append)
        for node in places:
            if node.op == "get_attr":
                yield constant_of(node).untyped_storage().data_ptr()


def _weight_names(graph: fx.Graph) -> list[str]:
    found: dict[str, None] = {}
    for node in graph.nodes:
        weights = [node.kwargs["weight"]] if is_a(node, nodes.convolution, nodes.quantized_convolution) else []
        weights = list(node.kwargs["weights"]) if is_a(node, nodes.dense_block) else weights
        found.update({weight.target: None for weight in weights if constant_of(weight) is not None})
    return list(found)
