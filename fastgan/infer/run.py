"""Running a program: callers borrow a workspace, its planned memory with every call prepared, and give it back."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastgan.infer.byte_images import Handover, handovers
from fastgan.infer.functional import Functional
from fastgan.infer.grouped_images import grouped_images
from fastgan.infer.plan import Program, Slot, Step, View, Watch
from fastgan.ops import _into


@dataclass
class Call:
    """A step with the arguments that are known beforehand filled in: nearly all of them.

    Attributes:
        late: positions that only a run of the program fills in; None if some of them are elsewhere.
        result: slot of what it returns; None where it writes into planned memory.
    """

    step: Step
    args: list[Any]
    kwargs: dict[str, Any]
    late: list[int] | None
    result: int | None


@dataclass
class Stretch:
    """Calls that are run as one: of a recording, or a single one that is none of it.

    Attributes:
        first, count: calls of the recording.
        slots: values that a run brings, and at which ``places`` (:meth:`fastgan.ops._into.Recording.run`).
        results: slots of those that it makes, and their ``sizes``.
        release: slots to forget behind it.
    """

    call: Call | None
    first: int = 0
    count: int = 0
    slots: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    results: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    release: list[int] = field(default_factory=list)


class Workspace:
    """One caller's memory, and the program's calls with what lies in it filled in.

    Attributes:
        only_recorded: whether a call, unwatched, runs no operator of torch, so that it does not matter whether the
            caller is recording gradients or autocasts.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        # A tensor of inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.memory = torch.empty(program.bytes // 4, dtype=torch.float32, device="cpu")
        self.values: list[Any] = [None] * program.slots
        for slot, tensor in program.constants.items():
            self.values[slot] = tensor
        for view in program.views:
            self.values[view.slot] = self._view(view)
        self.planned = {*(view.slot for view in program.views), *program.results}
        self.calls = [self._prepared(step) for step in program.steps]
        self.recording = _into.Recording()
        self.stretches = self._stretches(self._with_groups(self._with_bytes(self.calls)))
        made = {slot for stretch in self.stretches for slot in stretch.results}
        self.first_results = [slot for slot in program.results if slot not in made]
        self.only_recorded = all(stretch.call is None for stretch in self.stretches) and not program.borrowed

    def _view(self, view: View) -> Tensor:
        n, c, h, w = view.shape
        return self.memory.as_strided((n, c, h, w), (c * h * w, h * w, w, 1), view.offset // 4)

    def _prepared(self, step: Step) -> Call:
        args = list(step.args)
        if step.slot in self.planned:
            args.append(Slot(step.slot))
        result = None if step.slot in self.planned else step.slot
        if any(self._is_late(value) for value in step.kwargs.values()):
            return Call(step, args, step.kwargs, None, result)
        late = [i for i, value in enumerate(args) if self._is_late(value)]
        args = [value if i in late else self._filled(value, self.values) for i, value in enumerate(args)]
        kwargs = {name: self._filled(value, self.values) for name, value in step.kwargs.items()}
        return Call(step, args, kwargs, late, result)

    def _with_bytes(self, calls: list[Call]) -> list[Call]:
        """The same with what :mod:`fastgan.infer.byte_images` finds: steps that are watched have floats."""
        found, memory = handovers(self.program), self.memory.view(torch.uint8)
        return [
            self._handing_on(call, found[call.step.slot], memory) if call.step.slot in found else call for call in calls
        ]

    @staticmethod
    def _handing_on(call: Call, handover: Handover, memory: Tensor) -> Call:
        out = call.args[-1]
        images = [image.part(memory, first, out.shape) for image, first in handover.results]
        readers = [image.reader.node.kwargs for image, _ in handover.results]
        roundings = [[k[name] for k in readers] for name in ("step", "low", "high")]
        x = handover.x and handover.x.whole(memory)
        return replace(call, args=[*call.args[:-6], x, images, *roundings, out])

    def _with_groups(self, calls: list[Call]) -> list[Call]:
        """The same with what :mod:`fastgan.infer.grouped_images` finds: steps that are watched have planes."""
        found = grouped_images(self.program)
        return [
            replace(call, args=[*call.args, *found[call.step.slot]]) if call.step.slot in found else call
            for call in calls
        ]

    def _stretches(self, calls: list[Call]) -> list[Stretch]:
        found: list[Stretch] = []
        for recordable, group in itertools.groupby(calls, self._is_recordable):
            if recordable:
                found.append(self._recorded(list(group)))
            else:
                found += [Stretch(call, release=call.step.release) for call in group]
        return found

    @staticmethod
    def _is_recordable(call: Call) -> bool:
        known = call.late is not None and all(isinstance(call.args[i], Slot) for i in call.late)
        return known and not call.kwargs and call.step.kernel in _into.RECORDABLE

    def _recorded(self, calls: list[Call]) -> Stretch:
        results = [call.step.slot for call in calls if call.step.slot in self.program.results]
        late = [call.args[i].index for call in calls for i in call.late or []]
        slots = [slot for slot in dict.fromkeys(late) if slot not in results]
        place_of = {slot: place for place, slot in enumerate([*slots, *results])}
        stretch = Stretch(None, self.recording.count, len(calls), slots, results=results)
        for call in calls:
            args = list(call.args)
            for i in call.late or []:
                stretch.places += [self.recording.count, i, place_of[args[i].index]]
                args[i] = torch.empty(0, device="cpu")
            self.recording.add(call.step.kernel, args)
            stretch.release += call.step.release
        for slot in results:
            stretch.sizes += self.program.results[slot]
        return stretch

    def _is_late(self, value: Any) -> bool:
        if isinstance(value, Slot):
            return self.values[value.index] is None
        return isinstance(value, (list, tuple)) and any(self._is_late(item) for item in value)

    def _filled(self, value: Any, values: list[Any]) -> Any:
        if isinstance(value, Slot):
            return values[value.index]
        if isinstance(value, (list, tuple)):
            return type(value)([self._filled(item, values) for item in value])
        return value

    def run(self, inputs: Sequence[Tensor], watch: Watch | None = None) -> list[Any]:
        """The results of a call; ``watch`` sees each step's."""
        program, values = self.program, list(self.values)
        for (slot, _, _), value in zip(program.inputs, inputs, strict=True):
            values[slot] = value
        for slot in self.first_results if watch is None else program.results:
            values[slot] = torch.empty(program.results[slot], dtype=torch.float32, device="cpu")
        if watch is None:
            for stretch in self.stretches:
                self._run_stretch(stretch, values)
        else:
            for number, call in enumerate(self.calls):
                self._run_call(call, values)
                watch(number, values[call.step.slot])
                for slot in call.step.release:
                    values[slot] = None
        return [self._result(output, values) for output in program.outputs]

    def _run_stretch(self, stretch: Stretch, values: list[Any]) -> None:
        if stretch.call is not None:
            self._run_call(stretch.call, values)
        else:
            brought = [values[slot] for slot in stretch.slots]
            made = self.recording.run(stretch.first, stretch.count, brought, stretch.places, stretch.sizes)
            for slot, value in zip(stretch.results, made, strict=True):
                values[slot] = value
        for slot in stretch.release:
            values[slot] = None

    def _run_call(self, call: Call, values: list[Any]) -> None:
        args, kwargs = call.args, call.kwargs
        if call.late is None:
            args = self._filled(args, values)
            kwargs = {name: self._filled(value, values) for name, value in kwargs.items()}
        elif call.late:
            args = list(args)
            for i in call.late:
                args[i] = self._filled(args[i], values)
        value = call.step.kernel(*args, **kwargs)
        if call.result is not None:
            values[call.result] = value

    def _result(self, output: Any, values: list[Any]) -> Any:
        if not isinstance(output, Slot):
            return output
        value = values[output.index]
        return value.clone() if output.index in self.program.borrowed else value


class Pool:
    """The workspaces of one program, each made by ``make``: as many as there were callers at once."""

    def __init__(self, make: Callable[[], Workspace | Functional]) -> None:
        self._make = make
        self._free: list[Workspace | Functional] = []
        self._lock = threading.Lock()
        self.count = 0

    def take(self) -> Workspace | Functional:
        """One that nobody else has, until :meth:`give`."""
        with self._lock:
            workspace = self._free.pop() if self._free else None
            self.count += workspace is None
        return workspace or self._make()

    def give(self, workspace: Workspace | Functional) -> None:
        """Back, for the next caller."""
        with self._lock:
            self._free.append(workspace)

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Workspace | Functional]:
        """One for the length of a block."""
        workspace = self.take()
        try:
            yield workspace
        finally:
            self.give(workspace)
