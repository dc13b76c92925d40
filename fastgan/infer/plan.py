"""From a fused graph to a program: steps in their order, each with the kernel that it calls and where its result lies.

Nodes of :mod:`fastgan.infer.nodes` become calls that write into planned memory; whatever is left is torch's own
operator, whose result is a tensor of its own. The parts of a concatenation are written where the concatenation lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fastgan.infer import nodes
from fastgan.infer.capture import aten, constant_of, outputs_of
from fastgan.infer.memory import Span, most_alive, place
from fastgan.infer.nodes import is_a, is_random, name_of, shape_of
from fastgan.ops import _into


@dataclass(frozen=True)
class Slot:
    """A value of the program, by its number."""

    index: int


@dataclass
class Choice:
    """How a convolution is computed: an algorithm of ``_native.ALGORITHMS``, the tile m of Winograd's F(m×m, r×r)."""

    algorithm: str
    tile: int
    predicted_ms: float  # by the cost model; 0 where it has none
    measured_ms: float | None = None  # with tune=True
    storage: str = "fp32"  # of what the algorithm makes of the weight; or "bf16", "int16", "int8"


@dataclass
class Step:
    """One call.

    Attributes:
        name: where in the model it comes from.
        kernel: what is called, with ``args`` and ``kwargs`` whose Slots are replaced by values.
        slot: the value that it makes. A planned one is the kernel's last argument, any other its result.
        node: of the graph.
        fused: what it computes besides, by name.
        reason: why it is torch's operator; None where it is a kernel of ours.
        choice: of a convolution.
        release: values that nobody reads after it.
    """

    name: str
    kernel: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int
    node: fx.Node
    fused: list[str]
    reason: str | None = None
    choice: Choice | None = None
    release: list[int] = field(default_factory=list)


@dataclass
class View:
    """A value's place in the planned memory."""

    slot: int
    shape: tuple[int, ...]
    span: Span
    start: int = 0  # bytes behind the span's beginning

    @property
    def offset(self) -> int:
        return self.span.offset + self.start


def lies_inside(part: View, whole: View, first: int) -> bool:
    """Whether a value is where a concatenation has its channels from ``first`` on."""
    return part.span is whole.span and part.start == whole.start + 4 * first * math.prod(whole.shape[2:])


@dataclass
class Program:
    """Everything that a call needs; shared by all callers.

    Attributes:
        slots: how many values there are.
        constants: slot -> tensor.
        inputs: slot, shape and dtype of each tensor that a call brings.
        outputs: slot of each result, or its value if it is None or a number.
        borrowed: slots of results that may be memory of something else, to be copied.
        results: slot -> shape, of results that kernels of ours write: new memory for every call.
        views: values in planned memory, ``bytes`` of it; ``alive`` is what lives in it at the same time at worst.
    """

    slots: int
    constants: dict[int, Tensor]
    inputs: list[tuple[int, tuple[int, ...], torch.dtype]]
    outputs: list[Any]
    borrowed: set[int]
    results: dict[int, tuple[int, ...]]
    steps: list[Step]
    views: list[View]
    bytes: int
    alive: int


Chooser = Callable[[fx.Node], Choice | None]
# Sees each step's number and value, as soon as it is computed.
Watch = Callable[[int, Any], None]


def make_program(module: fx.GraphModule, choose: Chooser, precision: str) -> Program:
    """The program of a graph.

    ``choose`` says how each convolution is computed; None where the steps are to be told of, not run."""
    return _Planner(module, choose, precision).program()


def hoist(module: fx.GraphModule) -> None:
    """Move what torch computes of the inputs and needs no image, styles and their like, in front of everything else:
    done in a row it costs a fraction of what it costs in between, where each finds the caches full of images."""
    graph = module.graph
    sources = [node for node in graph.nodes if node.op in ("get_attr", "placeholder")]
    if not sources:
        return
    last, *others = sources
    for node in others:
        last.append(node)
        last = node
    hoisted: set[fx.Node] = set()
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        known = all(i.op != "call_function" or i in hoisted for i in node.all_input_nodes)
        value = node.meta.get("val")
        small = not isinstance(value, Tensor) or value.numel() <= _SMALL
        if known and small and node.target not in _KERNELS and not is_random(node):
            hoisted.add(node)
            last.append(node)
            last = node


# Values that a hoisted step may have: more would only wait in memory.
_SMALL = 1 << 16


def _read(graph: fx.Graph) -> list[fx.Node]:
    """The graph's nodes without those that no result depends on; inputs stay."""
    read: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or not read.isdisjoint(node.users):
            read.add(node)
    return [node for node in graph.nodes if node in read]


class _Planner:
    def __init__(self, module: fx.GraphModule, choose: Chooser, precision: str) -> None:
        self.module, self.choose, self.precision = module, choose, precision
        self.nodes = _read(module.graph)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.slots = {node: i for i, node in enumerate(self.nodes) if node.op != "output"}
        self.outputs = outputs_of(module.graph)
        self.inside = self._parts_of_concatenations()

    def program(self) -> Program:
        steps = [step for node in self.nodes if node.op == "call_function" for step in self._steps_of(node)]
        views, results = self._place()
        self._release(steps)
        constants = {self.slots[n]: constant_of(n) for n in self.nodes if n.op == "get_attr" and n.users}
        inputs = [(self.slots[n], shape_of(n), n.meta["val"].dtype) for n in self.nodes if n.op == "placeholder"]
        outputs = [Slot(self.slots[o]) if isinstance(o, fx.Node) else o for o in self.outputs]
        borrowed = {self.slots[o] for o in self.outputs if isinstance(o, fx.Node) and may_be_view(o)}
        spans = list({id(view.span): view.span for view in views}.values())
        return Program(
            *(len(self.nodes), constants, inputs, outputs, borrowed, results, steps, views),
            *(place(spans), most_alive(spans)),
        )

    # ---- concatenations

    def _parts_of_concatenations(self) -> dict[fx.Node, tuple[fx.Node, int]]:
        """part -> (concatenation that it is written into, its first channel there). Samples of a part are not side by
        side there, so this is for one sample."""
        inside: dict[fx.Node, tuple[fx.Node, int]] = {}
        for node in self.nodes:
            if not is_a(node, nodes.concatenate) or shape_of(node)[0] != 1 or node in self.outputs:
                continue
            first = 0
            for part in node.kwargs["tensors"]:
                if self._is_planned(part) and part not in inside and part not in self.outputs:
                    inside[part] = (node, first)
                first += shape_of(part)[1]
        return inside

    def _is_planned(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _KERNELS

    # ---- steps

    def _steps_of(self, node: fx.Node) -> list[Step]:
        if is_a(node, nodes.concatenate):
            return self._concatenation(node)
        if not self._is_planned(node):
            args, kwargs = self._slotted(node.args), self._slotted(node.kwargs)
            reason = node.meta.get("reason", f"no kernel of ours for {_operator(node)}")
            kernel = node.target
            return [Step(name_of(node), kernel, tuple(args), dict(kwargs), self.slots[node], node, [], reason)]
        kernel, arguments = _KERNELS[node.target]
        choice = self.choose(node) if is_a(node, nodes.convolution, nodes.quantized_convolution) else None
        args = self._slotted(arguments(node, choice or Choice("torch", 0, 0.0), self.precision))
        fused = node.meta.get("fused", [])
        return [Step(name_of(node), kernel, tuple(args), {}, self.slots[node], node, fused, None, choice)]

    def _concatenation(self, node: fx.Node) -> list[Step]:
        """Copies of what is not written into it right away."""
        steps, first = [], 0
        for part in node.kwargs["tensors"]:
            if self.inside.get(part) != (node, first):
                args = (Slot(self.slots[part]), first)
                steps.append(Step(name_of(node), _copy_channels, args, {}, self.slots[node], node, []))
            first += shape_of(part)[1]
        return steps

    def _slotted(self, value: Any) -> Any:
        return fx.map_arg(value, lambda node: Slot(self.slots[node]))

    # ---- memory

    def _place(self) -> tuple[list[View], dict[int, tuple[int, ...]]]:
        spans: dict[fx.Node, Span] = {}
        views, results = [], {}
        ends = self._last_reads()
        for node in self.nodes:
            if not self._is_planned(node):
                continue
            if node in self.outputs:
                results[self.slots[node]] = shape_of(node)
                continue
            root, start = node, 0
            while root in self.inside:
                root, first = self.inside[root]
                start += 4 * first * math.prod(shape_of(root)[2:])
            here = self.position[node]
            span = spans.setdefault(root, Span(4 * math.prod(shape_of(root)), here, here))
            span.first, span.last = min(span.first, here), max(span.last, ends.get(node, here))
            views.append(View(self.slots[node], shape_of(node), span, start))
        return views, results

    def _last_reads(self) -> dict[fx.Node, int]:
        """The last position that reads a value, itself or through a view of it."""
        ends: dict[fx.Node, int] = {}
        for node in reversed(self.nodes):
            users = [user for user in node.users if user in self.position]
            last = max((self.position[user] for user in users), default=self.position[node])
            for user in users:
                if user.op == "call_function" and may_be_view(user):
                    last = max(last, ends[user])
            ends[node] = last
        return ends

    def _release(self, steps: list[Step]) -> None:
        """Results of torch's operators go when nobody reads them any more."""
        ends = self._last_reads()
        last_step = {self.position[step.node]: step for step in steps}
        for node in self.nodes:
            if node.op != "call_function" or self._is_planned(node) or node in self.outputs:
                continue
            step = last_step.get(ends[node])
            if step is not None:
                step.release.append(self.slots[node])


def _operator(node: fx.Node) -> str:
    return str(getattr(node.target, "_name", getattr(node.target, "__name__", node.target)))


def may_be_view(node: fx.Node) -> bool:
    """Whether a node's value may be memory of its input: so it is for items, views, and any operator of torch's that
    does not work element by element, as many return their input where there is nothing to do."""
    if node.op != "call_function" or node.target in _KERNELS:
        return node.op in ("placeholder", "get_attr")
    return torch.Tag.pointwise not in getattr(node.target, "tags", ())


# ----------------------------------------------------------------------------------------------------------------------
# How nodes become calls; the result's memory is the last argument of each


def _epilogue_settings(node: fx.Node) -> tuple[Any, ...]:
    return tuple(nodes.epilogue_of(node)[name] for name in nodes.PLAIN)


def _tensors(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.kwargs.get(name) for name in nodes.TENSORS)


def _convolution(node: fx.Node, choice: Choice, precision: str) -> tuple[Any, ...]:
    k = node.kwargs
    tensors = (k["x"], k["weight"], k.get("in_scale"), k.get("out_scale"), *_tensors(node))
    geometry = tuple(k[name] for name in nodes.GEOMETRY)
    how = (k.get("rectify", False), choice.algorithm, choice.tile, choice.storage)
    return (*tensors, *geometry, *how, *_epilogue_settings(node))


def _quantized_convolution(node: fx.Node, choice: Choice, precision: str) -> tuple[Any, ...]:
    k = node.kwargs
    tensors = (k["x"], k["weight"], k["weight_scale"], k.get("in_scale"), k.get("out_scale"))
    geometry = tuple(k[name] for name in nodes.GEOMETRY)
    rounding = (k["step"], k["low"], k["high"])
    floats = (None, [], [], [], [])
    return (*tensors, *rounding, *_tensors(node), *geometry, choice.tile, *_epilogue_settings(node), *floats)


def _pointwise(node: fx.Node, choice: Choice, precision: str) -> tuple[Any, ...]:
    return (node.kwargs["x"], node.kwargs.get("out_scale"), *_tensors(node), *_epilogue_settings(node))


def _instance_norm(node: fx.Node, choice: Choice, precision: str) -> tuple[Any, ...]:
    k = node.kwargs
    settings = (k.get("eps", 1e-5), k.get("act", "linear"), k.get("alpha", 0.0), k.get("gain", 1.0))
    return (k["x"], k.get("weight"), k.get("bias"), k.get("residual"), *settings, k.get("residual_gain", 1.0))


def _fir(node: fx.Node, choice: Choice, precision: str) -> tuple[Any, ...]:
    k = node.kwargs
    defaults = {"up": (1, 1), "down": (1, 1), "padding": (0,) * 4, "flip_filter": False, "fir_gain": 1.0}
    settings = tuple(k.get(name, default) for name, default in defaults.items())
    return (k["x"], k.get("f"), *_tensors(node), *settings, *_epilogue_settings(node))


def _dense_block(node: fx.Node, choice: Choice, precision: str) -> tuple[Any, ...]:
    k = node.kwargs
    settings = (k["act"], k["alpha"], k["gain"], k["residual_scale"], precision)
    return (k["x"], list(k["weights"]), list(k["biases"]), *settings)


def _pad(node: fx.Node, choice: Choice, precision: str) -> tuple[Any, ...]:
    return (node.kwargs["x"], list(node.kwargs["padding"]), node.kwargs["mode"])


def _pad_into(x: Tensor, padding: list[int], mode: str, out: Tensor) -> None:
    if mode == "reflect":
        aten.reflection_pad2d.out(x, padding, out=out)
    elif mode == "replicate":
        aten.replication_pad2d.out(x, padding, out=out)
    else:
        left, right, top, bottom = padding
        height, width = out.shape[2:]
        out.zero_()
        out[:, :, top : height - bottom, left : width - right].copy_(x)


def _copy_channels(x: Tensor, first: int, out: Tensor) -> None:
    out[:, first : first + x.shape[1]].copy_(x)


_KERNELS: dict[Any, tuple[Callable[..., Any], Callable[..., tuple[Any, ...]] | None]] = {
    nodes.convolution: (_into.scaled_conv2d_into, _convolution),
    nodes.quantized_convolution: (_into.quantized_conv2d_into, _quantized_convolution),
    nodes.pointwise: (_into.epilogue_into, _pointwise),
    nodes.instance_norm: (_into.norm_act_into, _instance_norm),
    nodes.fir: (_into.upfirdn2d_into, _fir),
    nodes.dense_block: (_into.dense_block_into, _dense_block),
    nodes.pad: (_pad_into, _pad),
    nodes.concatenate: (_copy_channels, None),
}
