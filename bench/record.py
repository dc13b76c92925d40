"""``python -m bench.record``: time every case, candidates interleaved, and append the rows to bench/results/.

One JSON object a line, one file per device. ``python -m bench.table`` makes the README's table of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.cases import BASELINE, Case
from fastgan.profile import latency

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def all_cases() -> list[Case]:
    """The CASES of every bench_*.py, in the order of the files' names; a file without any is named and left out."""
    found: list[Case] = []
    for path in sorted(HERE.glob("bench_*.py")):
        module = importlib.import_module(f"bench.{path.stem}")
        if not hasattr(module, "CASES"):
            print(f"{path.name} has no CASES: it runs under pytest-benchmark only")
        found.extend(getattr(module, "CASES", []))
    return found


def measure_case(case: Case, seconds: float, compiled: bool, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """The rows of one case: every pass by every candidate, and by torch.compile of the baseline if ``compiled``."""
    candidates = {name: case.passes(name) for name in case.candidates}
    if compiled:
        function = torch.compile(case.candidates[BASELINE])
        # torch refuses second order through a compiled function.
        twin = Case(case.op, case.name, case.inputs, {"compile": function})
        candidates["compile"] = twin.passes("compile")
    limits = latency.machine_limits(device)
    for which in case.pass_names:
        functions = {name: found[which] for name, found in candidates.items() if which in found}
        timings = latency.measure(
            functions,
            seconds=seconds,
            min_rounds=case.min_rounds,
            warmup=case.warmup,
            burst=case.burst,
            device=device,
        )
        against = min(case.baselines, key=lambda name: timings[name].median)
        work = case.work.get(which)
        for name, timing in timings.items():
            row: dict[str, Any] = {"op": case.op, "case": case.name, "layout": case.layout, "dtype": case.dtype}
            row |= {"pass": which, "candidate": name, "n": timing.n, "calls": timing.calls}
            row |= {f"{part}_ms": getattr(timing, part) * 1e3 for part in ("median", "p20", "p80")}
            row |= {"against": against, "speedup": latency.speedup(timings, name, against)}
            if case.memory:
                row["peak_bytes"] = latency.peak_memory(functions[name], device)
            row |= latency.throughput(timing, work, limits) if work else {}
            yield row | getattr(functions[name], "facts", {})


def results_file(facts: dict[str, Any]) -> Path:
    """Where the rows of a machine go, one file per device."""
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    return RESULTS / f"{slug}-{facts['threads']}-threads.jsonl"


def described(row: dict[str, Any]) -> str:
    """A row, for people, in a line."""
    spread = f"{row['median_ms']:9.3f} ms ({row['p20_ms']:.3f}–{row['p80_ms']:.3f})"
    return f"{row['op']:22} {row['case']:28} {row['pass']:11} {row['candidate']:8} {spread} {row['speedup']:6.2f}×"


def append(rows: Iterable[dict[str, Any]], describe: Callable[[dict[str, Any]], str] = described) -> Path:
    """Write and print every row as it comes, with where it comes from; the file that the rows are in."""
    facts = latency.environment() | {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "limits": asdict(latency.machine_limits()),
    }
    RESULTS.mkdir(exist_ok=True)
    path = results_file(facts)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row | facts, ensure_ascii=False) + "\n")
            file.flush()
            print(describe(row))
    return path


def record(cases: Sequence[Case], seconds: float, compiled: bool = False) -> Path:
    """Measure ``cases``, append and print every row as it comes; the file that the rows are in."""
    return append(row for case in cases for row in measure_case(case, seconds, compiled))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.record", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression that 'op case' must match")
    parser.add_argument("--seconds", type=float, default=3.0, help="per pass of a case, all candidates together")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the eager candidate")
    args = parser.parse_args()
    cases = [case for case in all_cases() if re.search(args.only, f"{case.op} {case.name}")]
    if not cases:
        parser.error(f"--only must match a case, got {args.only!r}")
    print(f"rows are in {record(cases, args.seconds, args.compile)}")


if __name__ == "__main__":
    main()
