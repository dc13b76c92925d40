"""The weights of an engine: nobody else writes to them, so what algorithms make of them is made once and never checked."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from fastgan import _native
from fastgan.infer import nodes
from fastgan.infer.capture import constant_of
from fastgan.infer.nodes import is_a


class FrozenWeights:
    """The convolutions' weights among a graph's constants, each a copy of its own that the kernels know as frozen.

    What they make of a weight (Winograd's transforms) lives as long as this object.
    """

    def __init__(self, modules: Iterable[fx.GraphModule]) -> None:
        self._library = _native.cpu_library()
        self.tensors: list[Tensor] = []
        copies: dict[int, Tensor] = {}
        for module in modules:
            for name in _weight_names(module.graph):
                original = getattr(module, name)
                if id(original) not in copies:
                    copies[id(original)] = original.clone(memory_format=torch.contiguous_format)
                setattr(module, name, copies[id(original)])
        for tensor in copies.values():
            self.tensors.append(tensor)
            if self._library is not None and tensor.dtype == torch.float32:
                self._library.fastgan_freeze_weight(tensor.data_ptr())
        pointers = [tensor.data_ptr() for tensor in self.tensors]
        self._forget = weakref.finalize(self, _forget, self._library, pointers)
        self.dropped = 0

    def prepared_bytes(self) -> int:
        """Memory of what was made of the weights."""
        if self._library is None:
            return 0
        return sum(self._library.fastgan_made_bytes(tensor.data_ptr()) for tensor in self.tensors)

    def drop(self) -> int:
        """Give back the values of which only what was made is read; returns their bytes. There is no way back."""
        if self._library is None:
            return 0
        for tensor in self.tensors:
            size = tensor.numel() * tensor.element_size()
            if self._library.fastgan_drop_weight(tensor.data_ptr(), size):
                self.dropped += size
        return self.dropped


def _forget(library, pointers: list[int]) -> None:
    for pointer in pointers if library is not None else ():
        library.fastgan_forget_weight(pointer)


def _weight_names(graph: fx.Graph) -> list[str]:
    found: dict[str, None] = {}
    for node in graph.nodes:
        weights = [node.kwargs["weight"]] if is_a(node, nodes.convolution) else []
        weights = list(node.kwargs["weights"]) if is_a(node, nodes.dense_block) else weights
        found.update({weight.target: None for weight in weights if constant_of(weight) is not None})
    return list(found)
