"""Values that go from one convolution in 8 bits to the next as bytes, rounded as that one rounds what it reads.

Whoever makes such a value writes it once for each reader, into the planned memory of the floats that nobody needs then.
So the plan stays as it is, and so do the results, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fastgan.infer import nodes
from fastgan.infer.capture import constant_of
from fastgan.infer.memory import ALIGNMENT
from fastgan.infer.nodes import is_a, shape_of
from fastgan.infer.plan import Program, Slot, Step, View, lies_inside
from fastgan.ops import _into


@dataclass
class ByteImage:
    """A value as one of its readers finds it.

    Attributes:
        reader: the step.
        layout: rows, columns and depth, and the row and the column of the first pixel.
        offset: bytes from the beginning of the planned memory.
    """

    reader: Step
    layout: list[int]
    offset: int = 0

    @property
    def bytes(self) -> int:
        return -(math.prod(self.layout[:3]) // -ALIGNMENT) * ALIGNMENT

    def whole(self, memory: Tensor) -> Tensor:
        """[rows, columns, depth] of ``memory``, in bytes."""
        rows, columns, depth, _, _ = self.layout
        return memory.as_strided((rows, columns, depth), (columns * depth, depth, 1), self.offset)

    def part(self, memory: Tensor, first: int, shape: Sequence[int]) -> Tensor:
        """[C, H, W] of ``memory``, where a result of this shape goes whose channels are those from ``first`` on."""
        _, columns, depth, top, left = self.layout
        start = self.offset + (top * columns + left) * depth + first
        return memory.as_strided(tuple(shape[1:]), (1, columns * depth, depth), start)


@dataclass
class Handover:
    """What a step reads and writes as bytes: x, and its results with their first channel there."""

    x: ByteImage | None = None
    results: list[tuple[ByteImage, int]] = field(default_factory=list)


def handovers(program: Program) -> dict[int, Handover]:
    """Slot -> what the step that makes it reads and writes as bytes; nothing of a step that does neither."""
    values = _Values(program)
    found: dict[int, Handover] = {}
    for value in values.handed_on():
        for image in values.images[value]:
            found.setdefault(image.reader.slot, Handover()).x = image
            for step, first in values.makers[value]:
                found.setdefault(step.slot, Handover()).results.append((image, first))
    return found


class _Values:
    """Values of one sample that convolutions in 8 bits read.

    Attributes:
        images: of each, one for each of these readers.
        views: of each, its planned memory.
        makers: of each, the steps that make it, and the first channel of each; none where others make some of it.
    """

    def __init__(self, program: Program) -> None:
        planned = {view.slot: view for view in program.views}
        self.steps = {step.node: step for step in program.steps if _is_direct(step)}
        self.images: dict[fx.Node, list[ByteImage]] = {}
        self.views: dict[fx.Node, View] = {}
        for step in self.steps.values():
            value, slot = step.node.kwargs["x"], step.args[0]
            if isinstance(slot, Slot) and slot.index in planned and shape_of(value)[0] == 1:
                self.views[value] = planned[slot.index]
                self.images.setdefault(value, []).append(ByteImage(step, _layout_of(step)))
        self.makers = {value: self._makers_of(value, planned) for value in self.images}

    def handed_on(self) -> list[fx.Node]:
        """Those of which nobody needs the floats and whose bytes have a place; that place is known then."""
        found = {value for value in self.images if self.makers[value] and self._readers_take_bytes(value)}
        while wrong := [v for v in found if not (self._has_no_other_use(v, found) and self._fits(v, found))]:
            found.difference_update(wrong)
        return [value for value in self.images if value in found]

    def _makers_of(self, value: fx.Node, planned: dict[int, View]) -> list[tuple[Step, int]]:
        view, first, makers = self.views[value], 0, []
        for part in value.kwargs["tensors"] if is_a(value, nodes.concatenate) else [value]:
            step = self.steps.get(part)
            if step is None or not _can_hand_on(step):
                return []
            of_part = planned.get(step.slot)
            if of_part is None or not lies_inside(of_part, view, first):
                return []
            makers.append((step, first))
            first += shape_of(part)[1]
        return makers

    def _readers_take_bytes(self, value: fx.Node) -> bool:
        images = self.images[value]
        readers = [image.reader.node for image in images]
        others = [user for user in value.users if user not in readers and not is_a(user, nodes.concatenate)]
        return not others and all(any(image.layout) and _reads_plainly(image.reader, value) for image in images)

    def _has_no_other_use(self, value: fx.Node, handed_on: set[fx.Node]) -> bool:
        """Whether each step that makes the value makes nothing else of it that is read as floats."""
        for step, _ in self.makers[value]:
            node = step.node
            for user in node.users:
                reads = user if is_a(user, nodes.concatenate) else node
                if reads not in handed_on:
                    return False
        return True

    def _fits(self, value: fx.Node, handed_on: set[fx.Node]) -> bool:
        """Images of a value begin where it begins; of a concatenation they end where it ends, as its parts may be
        values that begin in there."""
        view, images = self.views[value], self.images[value]
        begin, end = view.offset, view.offset + 4 * math.prod(view.shape)
        together = sum(image.bytes for image in images)
        if is_a(value, nodes.concatenate):
            parts = [step.node for step, _ in self.makers[value] if step.node in handed_on]
            begin = max([begin, *(self.views[part].offset + self._bytes(part) for part in parts)])
            at = (end - together) // ALIGNMENT * ALIGNMENT
        else:
            at = begin
        for image in images:
            image.offset = at
            at += image.bytes
        return images[0].offset >= begin and at <= end

    def _bytes(self, value: fx.Node) -> int:
        return sum(image.bytes for image in self.images[value])


def _is_direct(step: Step) -> bool:
    return step.kernel is _into.quantized_conv2d_into and step.choice is not None and step.choice.tile == 0


def _layout_of(step: Step) -> list[int]:
    k = step.node.kwargs
    x, weight = torch.empty(shape_of(k["x"]), dtype=torch.float32, device="cpu"), constant_of(k["weight"])
    return _into.byte_layout(x, weight, *(k[name] for name in nodes.GEOMETRY)) if weight is not None else [0] * 5


def _reads_plainly(step: Step, value: fx.Node) -> bool:
    """Whether a step reads a value once, and does not scale it."""
    k = step.node.kwargs
    return k.get("in_scale") is None and [v for v in k.values() if v is value] == [k["x"]]


def _can_hand_on(step: Step) -> bool:
    k = step.node.kwargs
    return k.get("noise") is None and k.get("residual") is None and shape_of(step.node)[1] % 16 == 0
