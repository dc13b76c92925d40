"""Running a graph without a plan: on a GPU, where a captured CUDA graph for each caller takes its place, and on a CPU
without the CPU library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastgan import backends
from fastgan.infer.plan import Program, Slot, Watch

# Calls before a CUDA graph is captured: Triton compiles and tunes in them, torch makes its handles.
_WARM_UP = 3


class Functional:
    """One caller's way through a graph, node by node; what :class:`fastgan.infer.run.Workspace` is to a plan.

    Args:
        program: made of the graph, for its steps and its results.
        module: the graph.
        precision: "fp32" or "high", see :func:`fastgan.precision`.
    """

    only_recorded = False

    def __init__(self, program: Program, module: fx.GraphModule, precision: str) -> None:
        self.program, self.module, self.precision = program, module, precision
        module.recompile()
        self._numbers = {step.node: number for number, step in enumerate(program.steps)}

    def run(self, inputs: Sequence[Tensor], watch: Watch | None = None) -> list[Any]:
        """The results of a call."""
        with backends.precision(self.precision):
            if watch is None:
                results = self.module(*inputs)
            else:
                results = _Watched(self.module, self._numbers, watch).run(*inputs)
        borrowed = [isinstance(o, Slot) and o.index in self.program.borrowed for o in self.program.outputs]
        return [value.clone() if b else value for value, b in zip(results, borrowed, strict=True)]


class _Watched(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, numbers: dict[fx.Node, int], watch: Watch) -> None:
        super().__init__(module)
        self.numbers, self.watch = numbers, watch

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.numbers:
            self.watch(self.numbers[n], value)
        return value


class CudaGraph(Functional):
    """The same in channels_last, captured once as a CUDA graph: a call copies its inputs, replays and copies the
    results, and no kernel is launched from Python."""

    def __init__(self, program: Program, module: fx.GraphModule, precision: str) -> None:
        super().__init__(program, module, precision)
        self._inputs: list[Tensor] | None = None
        self._results: list[Any] = []
        self._graph = torch.cuda.CUDAGraph()

    def run(self, inputs: Sequence[Tensor], watch: Watch | None = None) -> list[Any]:
        if watch is not None:
            return super().run(inputs, watch)
        if self._inputs is None:
            self._capture([in_channels_last(value) for value in inputs])
        for own, value in zip(self._inputs, inputs, strict=True):
            own.copy_(value)
        self._graph.replay()
        return [value.clone() if isinstance(value, Tensor) else value for value in self._results]

    def _capture(self, inputs: list[Tensor]) -> None:
        own = [value.clone() for value in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                super().run(own)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self._graph):
            self._results = super().run(own)
        self._inputs = own


def in_channels_last(value: Tensor) -> Tensor:
    """An image, or a convolution's weight, in channels_last; anything else as it is."""
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def constants_in_channels_last(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            setattr(module, node.target, in_channels_last(getattr(module, node.target)))
