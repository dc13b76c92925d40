"""docs/ops.md: which op was differentiated to which order, on which backend and in which dtype, by tests that passed.

    make ops-table        runs the tests with FASTGAN_RECORD_OPS=<folder>, then ``python tests/ops_table.py <folder>``

With that variable every pytest process, those that tests start included, notes for each test what the library's ops
were asked for while it ran: the backend that :func:`fastgan.backends.choose` gave, the dtype of x, and whether
torch.autograd was then asked for gradients with regard to tensors of that dtype (order 1), and for gradients of a
gradient that had kept its graph (order 2). Only a file's own op counts (tests/test_<op>*.py and
tests/triton/test_<op>*.py), and only tests that passed. So the table says what ran in a passing test; what that test
demands is in the test.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

VARIABLE = "FASTGAN_RECORD_OPS"
DOCS = Path(__file__).resolve().parent.parent / "docs"
ROWS, TABLE = DOCS / "ops.json", DOCS / "ops.md"
DTYPES = ("float64", "float32", "bfloat16", "float16")
BACKENDS = ("reference", "cpp", "triton (interpreter)", "triton", "cuda")


class Use(NamedTuple):
    """One way of using an op; order 0 is the value alone."""

    op: str
    backend: str
    dtype: str
    order: int


class Recorder:
    """The pytest plugin."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: Counter[Use] = Counter()
        self.test = _Test()

    def pytest_sessionstart(self) -> None:
        from fastgan import backends

        # Before the test files are imported, so that what they import by name is already watched.
        choose = backends.choose

        def watched_choose(op: str, argument: str | None, can_run: Any, /, *args: Any, **facts: Any) -> str:
            name = choose(op, argument, can_run, *args, **facts)
            dtype = facts.get("dtype", next((x for x in args if isinstance(x, torch.dtype)), None))
            self.test.called(op, name, dtype)
            return name

        backends.choose = watched_choose
        torch.autograd.grad = self._watched(torch.autograd.grad)
        torch.autograd.backward = self._watched(torch.autograd.backward)

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            result = function(tensors, *args, **kwargs)
            wanted = kwargs.get("inputs", args[0] if args and function.__name__ == "grad" else None)
            found = tensors if wanted is None else wanted
            found = [found] if isinstance(found, Tensor) else list(found)
            dtypes = {_name(x.dtype) for x in found if isinstance(x, Tensor)}
            self.test.differentiated(dtypes, bool(kwargs.get("create_graph")))
            return result

        watched.__name__ = function.__name__
        return watched

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        from fastgan.ops._plans import forget_plans

        # Checked calls are kept, and a kept one does not ask for its backend again.
        forget_plans()
        self.test = _Test()
        outcome = yield
        stem = item.path.stem.removeprefix("test_")
        if outcome.excinfo is None:
            self.counts.update(use for use in self.test.uses if f"{stem}_".startswith(f"{use.op}_"))

    def pytest_sessionfinish(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [[*use, count] for use, count in sorted(self.counts.items())]
        (self.folder / f"{os.getpid()}.json").write_text(json.dumps(rows))


class _Test:
    """What one test has done so far."""

    def __init__(self) -> None:
        self.uses: set[Use] = set()
        self.recent: set[tuple[str, str, str]] = set()
        self.graphs: set[tuple[str, str, str]] = set()
        self.has_differentiated = False

    def called(self, op: str, backend: str, dtype: torch.dtype | None) -> None:
        if self.has_differentiated:
            self.recent, self.has_differentiated = set(), False
        if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            backend = "triton (interpreter)"
        call = (op, backend, _name(dtype) if dtype is not None else "")
        self.recent.add(call)
        self.uses.add(Use(*call, 0))

    def differentiated(self, dtypes: set[str], create_graph: bool) -> None:
        self.has_differentiated = True
        reached = {call for call in self.recent if call[2] in dtypes}
        self.uses |= {Use(*call, 1) for call in reached}
        self.uses |= {Use(*call, 2) for call in self.graphs & reached}
        if create_graph:
            self.graphs |= reached


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def collect(folder: Path) -> list[list[Any]]:
    """The rows of all processes, added up: [op, backend, dtype, order, tests]."""
    total: Counter[Use] = Counter()
    for path in sorted(folder.glob("*.json")):
        for *use, count in json.loads(path.read_text()):
            total[Use(*use)] += count
    return [[*use, count] for use, count in sorted(total.items()) if use.dtype in DTYPES]


def render(rows: Iterable[Iterable[Any]]) -> str:
    """The rows as docs/ops.md."""
    highest: dict[tuple[str, str, str], int] = {}
    tests: Counter[tuple[str, str, str]] = Counter()
    for op, backend, dtype, order, count in rows:
        key = (op, backend, dtype)
        highest[key] = max(highest.get(key, 0), order)
        tests[key] = max(tests[key], count)
    used = [backend for backend in BACKENDS if any(key[1] == backend for key in highest)]
    lines = [
        "# What is tested",
        "",
        "The order of differentiation that a passing test reached (0: the value alone, 1: gradients, 2: gradients of "
        "gradients) and, in brackets, how many tests ran the op so. An empty cell: none did. Made by `make ops-table` "
        "from the tests themselves (`tests/ops_table.py` says how); what each test demands is in the test.",
        "",
        "*triton (interpreter)* is the Triton kernel run by Triton's interpreter on a CPU: it shows neither TF32's "
        "rounding nor bfloat16 tensor cores. Columns of GPUs fill when the tests run on one (`make gpu-check`).",
        "",
        f"| op | dtype | {' | '.join(used)} |",
        f"|---|---|{'---|' * len(used)}",
    ]
    for op in sorted({key[0] for key in highest}):
        for dtype in DTYPES:
            cells = [(op, backend, dtype) for backend in used]
            if any(key in highest for key in cells):
                texts = [f"{highest[key]} ({tests[key]})" if key in highest else "" for key in cells]
                lines.append(f"| `{op}` | {dtype} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/ops_table.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help=f"what {VARIABLE} was while the tests ran")
    parser.add_argument("--out", type=Path, default=DOCS, help="the folder for ops.json and ops.md")
    args = parser.parse_args()
    rows = collect(args.folder)
    if not rows:
        parser.error(f"nothing is recorded in {args.folder}: run pytest with {VARIABLE}={args.folder} first")
    args.out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    (args.out / ROWS.name).write_text(f"[\n{lines}\n]\n")
    (args.out / TABLE.name).write_text(render(rows))


if __name__ == "__main__":
    main()
