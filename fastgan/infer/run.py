"""Running a program: callers borrow a workspace, its planned memory with every call prepared, and give it back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgan.infer.functional import Functional
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
        release: slots to forget behind it.
    """

    call: Call | None
    first: int = 0
    count: int = 0
    slots: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    release: list[int] = field(default_factory=list)


class Workspace:
    """One caller's memory, and the program's calls with what lies in it filled in."""

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
        self.stretches = self._stretches()

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

    def _stretches(self) -> list[Stretch]:
        found: list[Stretch] = []
        unknown = torch.empty(0, device="cpu")
        for call in self.calls:
            late = call.late or []
            known = call.late is not None and all(isinstance(call.args[i], Slot) for i in late)
            if not known or call.kwargs or call.step.kernel not in _into.RECORDABLE:
                found.append(Stretch(call, release=call.step.release))
                continue
            if not found or found[-1].call is not None:
                found.append(Stretch(None, first=self.recording.count))
            stretch = found[-1]
            for i in late:
                stretch.places += [self.recording.count, i, len(stretch.slots)]
                stretch.slots.append(call.args[i].index)
            self.recording.add(call.step.kernel, [unknown if i in late else v for i, v in enumerate(call.args)])
            stretch.count += 1
            stretch.release = stretch.release + call.step.release
        return found

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
        for slot, shape in program.results.items():
            values[slot] = torch.empty(shape, dtype=torch.float32, device="cpu")
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
            of_run = [values[slot] for slot in stretch.slots]
            self.recording.run(stretch.first, stretch.count, of_run, stretch.places)
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

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Workspace | Functional]:
        with self._lock:
            workspace = self._free.pop() if self._free else None
            self.count += workspace is None
        workspace = workspace or self._make()
        try:
            yield workspace
        finally:
            with self._lock:
                self._free.append(workspace)
