"""Running a program: callers borrow a workspace, its planned memory with every call prepared, and give it back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan.infer.functional import Functional
from fastgan.infer.plan import Program, Slot, Step, View, Watch


class Workspace:
    """One caller's memory, and the program's calls with what lies in it filled in.

    A call is (kernel, arguments, keyword arguments, positions that only the call itself can fill in, slot of the result
    or None, slots to forget). Nearly all arguments are known beforehand, so that a call costs little more than its
    kernel.
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

    def _view(self, view: View) -> Tensor:
        n, c, h, w = view.shape
        return self.memory.as_strided((n, c, h, w), (c * h * w, h * w, w, 1), view.offset // 4)

    def _prepared(self, step: Step) -> tuple[Any, ...]:
        args = list(step.args)
        if step.slot in self.planned:
            args.append(Slot(step.slot))
        late = [i for i, value in enumerate(args) if self._is_late(value)]
        bound = [value if i in late else self._filled(value, self.values) for i, value in enumerate(args)]
        kwargs = {name: self._filled(value, self.values) for name, value in step.kwargs.items()}
        if any(self._is_late(value) for value in step.kwargs.values()):
            kwargs, late = step.kwargs, None
            bound = args
        result = None if step.slot in self.planned else step.slot
        return step.kernel, bound, kwargs, late, result, step.release

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
        """The results of a call."""
        program, values = self.program, list(self.values)
        for (slot, _, _), value in zip(program.inputs, inputs, strict=True):
            values[slot] = value
        for slot, shape in program.results.items():
            values[slot] = torch.empty(shape, dtype=torch.float32, device="cpu")
        for number, (kernel, bound, kwargs, late, result, release) in enumerate(self.calls):
            args = bound
            if late is None:
                args = self._filled(bound, values)
                kwargs = {name: self._filled(value, values) for name, value in kwargs.items()}
            elif late:
                args = list(bound)
                for i in late:
                    args[i] = self._filled(args[i], values)
            value = kernel(*args, **kwargs)
            if result is not None:
                values[result] = value
            if watch is not None:
                watch(number, values[program.steps[number].slot])
            for slot in release:
                values[slot] = None
        return [self._result(output, values) for output in program.outputs]

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
