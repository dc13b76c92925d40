"""Values that go from one convolution or filter to the next in groups of 16 channels: [N, C / 16, H, W, 16].

Their kernels hold channels in registers, so between two of them planes are laid out for nobody; norms take either. A
value takes the memory that it has in planes, and a part of a concatenation lies where it would: the plan stays.
"""

from __future__ import annotations

import torch
from torch import fx

from fastgan.infer import nodes
from fastgan.infer.capture import constant_of
from fastgan.infer.nodes import is_a, shape_of
from fastgan.infer.plan import Program, Slot, Step, View, lies_inside
from fastgan.ops import _into

_GROUP = 16
# All images of such a step are grouped, or none is.
_ALIKE = (nodes.fir, nodes.instance_norm)


def grouped_images(program: Program) -> dict[int, tuple[bool, bool]]:
    """Slot of a step's value -> whether the x that it reads, and whether that value, is grouped; nothing of a step for
    which neither is."""
    values = _Values(program)
    grouped = values.grouped()
    found = {step.slot: (step.node.kwargs["x"] in grouped, step.node in grouped) for step in values.steps.values()}
    return {slot: images for slot, images in found.items() if any(images)}


class _Values:
    """What could be grouped.

    Attributes:
        steps: that read or make images which are: convolutions and filters.
        views: the values that these steps read and make, and their planned memory.
    """

    def __init__(self, program: Program) -> None:
        planned = {view.slot: view for view in program.views}
        self._takes = {step.node: _may_take(step) for step in program.steps}
        self.steps = {step.node: step for step in program.steps if any(self._takes[step.node])}
        self.views: dict[fx.Node, View] = {}
        for node, step in self.steps.items():
            for value, slot in ((node.kwargs["x"], step.args[0]), (node, Slot(step.slot))):
                if isinstance(slot, Slot) and slot.index in planned:
                    self.views[value] = planned[slot.index]

    def grouped(self) -> set[fx.Node]:
        """Those which every step that makes or reads them can have so."""
        found = set(self.views)
        while wrong := {value for value in found if not (self._is_made(value, found) and self._is_read(value, found))}:
            found -= wrong
        return found

    def _is_made(self, value: fx.Node, found: set[fx.Node]) -> bool:
        if not is_a(value, nodes.concatenate):
            made = value in self.steps and self._takes[value][1]
            return made and (not is_a(value, *_ALIKE) or found.issuperset(_images_of(value)))
        first = 0
        for part in value.kwargs["tensors"]:
            if part not in found or not lies_inside(self.views[part], self.views[value], first):
                return False
            first += shape_of(part)[1]
        return True

    def _is_read(self, value: fx.Node, found: set[fx.Node]) -> bool:
        whole = [user for user in value.users if is_a(user, nodes.concatenate, *_ALIKE)]
        others = [user for user in value.users if not is_a(user, nodes.concatenate)]
        return found.issuperset(whole) and all(self._reads(user, value) for user in others)

    def _reads(self, user: fx.Node, value: fx.Node) -> bool:
        """Whether it does as an image that may be grouped, and as nothing else."""
        if user not in self.steps or not self._takes[user][0]:
            return False
        images = _images_of(user) if is_a(user, *_ALIKE) else [user.kwargs["x"]]
        everywhere, there = (sum(v is value for v in values) for values in (user.kwargs.values(), images))
        return everywhere == there


def _images_of(step: fx.Node) -> list[fx.Node]:
    """What a filter or a norm reads in the layout of its result."""
    return [step.kwargs[name] for name in ("x", "residual") if step.kwargs.get(name) is not None]


def _may_take(step: Step) -> tuple[bool, bool]:
    """Whether a step can read its x, and make its value, in groups."""
    k = step.node.kwargs
    if step.kernel is _into.upfirdn2d_into:
        f, whole = constant_of(k.get("f")), k.get("residual") is None and shape_of(k["x"])[1] % _GROUP == 0
        takes = f is not None and whole and _into.grouped_filter(f, k.get("up", (1, 1)), k.get("down", (1, 1)))
        return takes, takes
    if step.kernel is _into.norm_act_into:
        takes = shape_of(k["x"])[1] % _GROUP == 0
        return takes, takes
    weight = constant_of(k.get("weight"))
    if step.kernel is not _into.scaled_conv2d_into or step.choice is None or weight is None:
        return False, False
    x = torch.empty(shape_of(k["x"]), dtype=torch.float32, device="cpu")
    geometry = (k[name] for name in nodes.GEOMETRY)
    reads, makes = _into.grouped_images(x, weight, *geometry, step.choice.algorithm, step.choice.tile)
    return reads, makes and k.get("residual") is None
