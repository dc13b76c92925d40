"""``python -m bench.cpu_targets [README.md]``: measure what the CPU kernels are to reach; a table of met and missed.

The rows go to bench/results/ like every bench's; the table is made of the newest row of each target there. With
``--table`` nothing is measured. ``make bench-cpu`` runs all of it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.cpu_cases import OURS, TARGETS, Target
from bench.record import record, results_file
from bench.table import put_between
from fastgan.profile import latency

BEGIN, END = "<!-- cpu-targets:begin -->", "<!-- cpu-targets:end -->"

Rows = dict[str, dict[str, dict[str, Any]]]


def newest_rows(path: Path) -> Rows:
    """Target -> candidate -> its newest row, for the targets that were ever measured."""
    known = {(target.op, target.name, target.which): target.name for target in TARGETS}
    found: Rows = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        name = known.get((row["op"], row["case"], row["pass"]))
        if name is not None:
            found.setdefault(name, {})[row["candidate"]] = row
    return found


def line_of(target: Target, rows: dict[str, dict[str, Any]]) -> str:
    """A target's line; of a target that was never measured it says so."""
    wanted = f"{target.at_least:g}×" if target.at_least >= 1 else f"{target.at_least:.2f}×"
    if OURS not in rows:
        return f"| {target.name} | {target.against} | | | | {wanted} | not recorded | |"
    ours = rows[OURS]
    theirs = rows[ours["against"]]
    met = "met" if ours["speedup"] >= target.at_least else "**missed**"
    roofline = f"{100 * ours['of_roofline']:.0f} %" if ours.get("of_roofline") else ""
    cells = [target.name, f"{target.against} ({ours['against']})", f"{theirs['median_ms']:.2f}"]
    cells += [f"{ours['median_ms']:.2f} ({ours['p20_ms']:.2f}–{ours['p80_ms']:.2f})", f"{ours['speedup']:.2f}×"]
    return "| " + " | ".join([*cells, wanted, met, roofline]) + " |"


def table(path: Path) -> str:
    """The targets' table of one device, with where its numbers come from above it."""
    rows = newest_rows(path)
    measured = [target for target in TARGETS if OURS in rows.get(target.name, {})]
    if not measured:
        sys.exit(f"bench.cpu_targets: no target has a row in {path}: run it without --table first")
    last = rows[measured[-1].name][OURS]
    commits = ", ".join(sorted({str(rows[target.name][OURS]["commit"]) for target in measured}))
    met = sum(rows[target.name][OURS]["speedup"] >= target.at_least for target in measured)
    lines = [
        f"**{last['device']}, {last['threads']} threads** ({last['cpp']}), torch {last['torch']}, Python "
        f"{last['python']}, {last['date'][:10]}, commit {commits}: **{met} of {len(TARGETS)} targets met.** Medians "
        f"of interleaved rounds in one process; the ratio is the median of the rounds' ratios, against the fastest "
        f"form and layout of what ours is compared with. Measured limits: {last['limits']['read_bytes'] / 1e9:.1f} "
        f"GB/s read, {last['limits']['sgemm_flops'] / 1e9:.0f} GFLOP/s sgemm. Above 100 % of the roofline are fewer "
        f"products than a direct convolution has.",
        "",
        "| work | against | theirs, ms | ours, ms (p20–p80) | ratio | target | | of the roofline |",
        "|---|---|---:|---:|---:|---:|---|---:|",
    ]
    return "\n".join([*lines, *(line_of(target, rows.get(target.name, {})) for target in TARGETS)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_targets", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help=f"a file with {BEGIN} and {END}; none prints the table")
    parser.add_argument("--only", default="", help="a regular expression that 'group: name' of a target must match")
    parser.add_argument("--seconds", type=float, default=3.0, help="per target, all candidates together")
    parser.add_argument("--table", action="store_true", help="measure nothing: the table of what is recorded")
    args = parser.parse_args()
    chosen = [target for target in TARGETS if re.search(args.only, f"{target.group}: {target.name}")]
    if not chosen:
        parser.error(f"--only must match a target, got {args.only!r}")
    path = results_file(latency.environment()) if args.table else record(chosen, args.seconds)
    if not path.exists():
        sys.exit(f"bench.cpu_targets: {path} does not exist: run it without --table first")
    found = table(path)
    if args.file is None:
        print(found)
    else:
        put_between(args.file, BEGIN, END, found)


if __name__ == "__main__":
    main()
