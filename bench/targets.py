"""What is to be reached: a line of work, what it is compared with, by how much it is to win; measured, and as a table.

``bench.cpu_targets`` and ``bench.infer_targets`` are this with their lists of targets.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.record import record, results_file
from bench.table import put_between
from fastgan.profile import latency

OURS = "fused"
# How candidates' names end; of the latter, maps and weights are in channels_last.
NCHW, NHWC = " NCHW", " NHWC"

Rows = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Target(Case):
    """One line of the table.

    Attributes:
        against: what the baselines are, for people.
        at_least: how many times as fast as the fastest baseline ours is to be; below 1 where it may be slower.
        which: the pass that counts.
        group: the line of work that it belongs to.
    """

    against: str = ""
    at_least: float = 1.0
    which: str = "fwd"
    group: str = ""

    @property
    def pass_names(self) -> list[str]:
        return [self.which]

    def passes(self, candidate: str) -> dict[str, Callable[[], object]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inputs = self.inputs()
        if candidate.endswith(NHWC):
            inputs = [_channels_last(value) for value in inputs]
        return latency.passes(self.candidates[candidate], inputs)


@dataclass(frozen=True)
class MadeTarget(Target):
    """One whose candidates, called once, make the function to call again and again; nothing is differentiated around
    it."""

    def passes(self, candidate: str) -> dict[str, Callable[[], object]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return {self.which: self.candidates[candidate]()}


def _channels_last(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return value.to(memory_format=torch.channels_last)
    if not isinstance(value, Tensor) or value.ndim != 4:
        return value
    return value.detach().to(memory_format=torch.channels_last).requires_grad_(value.requires_grad)


def both_layouts(functions: Mapping[str, Callable[..., Tensor]]) -> dict[str, Callable[..., Tensor]]:
    """Each function as two candidates, in NCHW and in NHWC."""
    return {f"{name}{layout}": function for name, function in functions.items() for layout in (NCHW, NHWC)}


# ----------------------------------------------------------------------------------------------------------------------
# The table


def newest_rows(path: Path, targets: Sequence[Target]) -> Rows:
    """Target -> candidate -> its newest row, for the targets that were ever measured."""
    known = {(target.op, target.name, target.which): target.name for target in targets}
    found: Rows = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        name = known.get((row["op"], row["case"], row["pass"]))
        if name is not None:
            found.setdefault(name, {})[row["candidate"]] = row
    return found


def line_of(target: Target, rows: dict[str, dict[str, Any]]) -> str:
    """A target's line; of a target that was never measured it says so."""
    wanted = f"{target.at_least:.3g}×" if target.at_least >= 1 else f"{target.at_least:.2f}×"
    if OURS not in rows:
        return f"| {target.name} | {target.against} | | | | {wanted} | not recorded | |"
    ours = rows[OURS]
    theirs = rows[ours["against"]]
    met = "met" if ours["speedup"] >= target.at_least else "**missed**"
    roofline = f"{100 * ours['of_roofline']:.0f} %" if ours.get("of_roofline") else ""
    name = target.name if ours["dtype"] == "float32" else f"{target.name} (PSNR {ours['psnr_db']:.0f} dB)"
    cells = [name, f"{target.against} ({ours['against']})", f"{theirs['median_ms']:.2f}"]
    cells += [f"{ours['median_ms']:.2f} ({ours['p20_ms']:.2f}–{ours['p80_ms']:.2f})", f"{ours['speedup']:.2f}×"]
    return "| " + " | ".join([*cells, wanted, met, roofline]) + " |"


def versions_of(rows: Rows) -> str:
    """ ", onnxruntime 1.2, openvino 3.4": the packages that candidates name in their rows, with every release there."""
    found = {
        f"{package} {version}"
        for by_candidate in rows.values()
        for row in by_candidate.values()
        for package, version in row.get("versions", {}).items()
    }
    return "".join(f", {name}" for name in sorted(found))


def table(path: Path, targets: Sequence[Target]) -> str:
    """The targets' table of one device, with where its numbers come from above it."""
    rows = newest_rows(path, targets)
    measured = [target for target in targets if OURS in rows.get(target.name, {})]
    if not measured:
        sys.exit(f"bench: no target has a row in {path}: run it without --table first")
    last = rows[measured[-1].name][OURS]
    commits = ", ".join(sorted({str(rows[target.name][OURS]["commit"]) for target in measured}))
    met = sum(rows[target.name][OURS]["speedup"] >= target.at_least for target in measured)
    lines = [
        f"**{last['device']}, {last['threads']} threads** ({last['cpp']}), torch {last['torch']}{versions_of(rows)}, "
        f"Python {last['python']}, {last['date'][:10]}, commit {commits}: **{met} of {len(targets)} targets met.** "
        f"Medians of interleaved rounds in one process; the ratio is the median of the rounds' ratios, against the "
        f"fastest form and layout of what ours is compared with. Measured limits: "
        f"{last['limits']['read_bytes'] / 1e9:.1f} GB/s read, {last['limits']['sgemm_flops'] / 1e9:.0f} GFLOP/s sgemm. "
        f"Above 100 % of the roofline are fewer products than a direct convolution has.",
        "",
        "| work | against | theirs, ms | ours, ms (p20–p80) | ratio | target | | of the roofline |",
        "|---|---|---:|---:|---:|---:|---|---:|",
    ]
    return "\n".join([*lines, *(line_of(target, rows.get(target.name, {})) for target in targets)])


# ----------------------------------------------------------------------------------------------------------------------
# The command


def run(
    name: str,
    description: str,
    targets: Sequence[Target],
    make_table: Callable[[Path], str] | None = None,
    measure: Callable[[Sequence[Target], float], Path] = record,
) -> None:
    """The command line of ``python -m bench.<name>``: measure, and put the table between the markers of a file.

    Args:
        name: of the module; the markers are ``<!-- na-me:begin -->`` and ``<!-- na-me:end -->``.
        description: what --help says.
        targets: all of them, in the order of the table.
        make_table: the table from the file of the rows; :func:`table` of ``targets`` by default.
        measure: measures the targets chosen, given the seconds for each; the file that the rows are in.
    """
    begin, end = (f"<!-- {name.replace('_', '-')}:{side} -->" for side in ("begin", "end"))
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    parser.add_argument("file", nargs="?", type=Path, help=f"a file with {begin} and {end}; none prints the table")
    parser.add_argument("--only", default="", help="a regular expression that 'group: name' of a target must match")
    parser.add_argument("--seconds", type=float, default=3.0, help="per target, all candidates together")
    parser.add_argument("--table", action="store_true", help="measure nothing: the table of what is recorded")
    args = parser.parse_args()
    chosen = [target for target in targets if re.search(args.only, f"{target.group}: {target.name}")]
    if not chosen:
        parser.error(f"--only must match a target, got {args.only!r}")
    path = results_file(latency.environment()) if args.table else measure(chosen, args.seconds)
    if not path.exists():
        sys.exit(f"bench.{name}: {path} does not exist: run it without --table first")
    found = make_table(path) if make_table else table(path, targets)
    if args.file is None:
        print(found)
    else:
        put_between(args.file, begin, end, found)
