"""``python -m bench.table [--brief] [README.md]``: the recorded rows as Markdown, into a file between its markers.

``--brief`` has one line per case and candidate, forward and forward + backward, and leaves out the spread.

Of every op, case, pass and candidate the newest row of a device counts; slow cases are in it like fast ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.cases import BASELINE
from bench.record import RESULTS

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
# Rows that have tables of their own, made by the modules of these names.
TARGETS = ("cpu_targets", "infer_targets")


def newest_rows(path: Path) -> dict[tuple[str, str, str], dict[str, dict[str, Any]]]:
    """(op, case, pass) -> candidate -> its newest row; those of TARGETS are left out."""
    found: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["op"] in TARGETS:
            continue
        found.setdefault((row["op"], row["case"], row["pass"]), {})[row["candidate"]] = row
    return found


def heading(rows: dict[tuple[str, str, str], dict[str, dict[str, Any]]]) -> str:
    """Where a device's numbers come from."""
    last = next(reversed(rows.values()))[BASELINE]
    commits = ", ".join(sorted({str(row["commit"]) for by in rows.values() for row in by.values()}))
    return (
        f"**{last['device']}, {last['threads']} threads** ({last['cpp']}), torch {last['torch']}, {last['date'][:10]}, "
        f"commit {commits}. Median (p20–p80) of interleaved rounds; speed-up is the median of the rounds' ratios. "
        f"Measured limits: {last['limits']['read_bytes'] / 1e9:.1f} GB/s read, "
        f"{last['limits']['sgemm_flops'] / 1e9:.0f} GFLOP/s sgemm."
    )


def brief_table(path: Path) -> str:
    """One device's speed-ups, a line per case and candidate."""
    rows = newest_rows(path)
    lines = [
        heading(rows),
        "",
        "| op | case | candidate | eager → candidate, ms: forward | speed-up | forward + backward | speed-up |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for op, case in dict.fromkeys((op, case) for op, case, _ in rows):
        passes = {which: rows.get((op, case, which), {}) for which in ("fwd", "fwd+bwd")}
        for name in passes["fwd"]:
            if name == BASELINE:
                continue
            cells = [f"`{op}`", case, name]
            for by_candidate in passes.values():
                eager, row = by_candidate.get(BASELINE), by_candidate.get(name)
                found = eager is not None and row is not None
                cells += (
                    [f"{eager['median_ms']:.2f} → {row['median_ms']:.2f}", f"{row['speedup']:.2f}×"]
                    if found
                    else ["", ""]
                )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def device_table(path: Path) -> str:
    """One device's table, with where its numbers come from above it."""
    rows = newest_rows(path)
    lines = [
        heading(rows),
        "",
        "| op | case | pass | eager, ms | candidate | ms | speed-up | GB/s | of the roofline |",
        "|---|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for (op, case, which), by_candidate in rows.items():
        for name, row in by_candidate.items():
            if name == BASELINE:
                continue
            rate = f"{row['gb_per_s']:.1f}" if row.get("gb_per_s") else ""
            share = f"{100 * row['of_roofline']:.0f} %" if row.get("of_roofline") else ""
            cells = [f"`{op}`", case, which, _spread(by_candidate[BASELINE]), name, _spread(row)]
            lines.append("| " + " | ".join([*cells, f"{row['speedup']:.2f}×", rate, share]) + " |")
    return "\n".join(lines)


def _spread(row: dict[str, Any]) -> str:
    return f"{row['median_ms']:.3f} ({row['p20_ms']:.3f}–{row['p80_ms']:.3f})"


def put_between(file: Path, begin: str, end: str, table: str) -> None:
    """Replace what stands between two markers in ``file``; exits if either is not there exactly once."""
    text = file.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        sys.exit(f"{file} must have one {begin} and one {end}")
    before, rest = text.split(begin)
    file.write_text(f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help=f"a file with {BEGIN} and {END}; none prints the table")
    parser.add_argument("--brief", action="store_true", help="a line per case, without backward alone and spread")
    args = parser.parse_args()
    paths = sorted(RESULTS.glob("*.jsonl"))
    if not paths:
        sys.exit(f"bench.table: no rows in {RESULTS}: run python -m bench.record first")
    table = "\n\n".join(map(brief_table if args.brief else device_table, paths))
    if args.file is None:
        print(table)
        return
    put_between(args.file, BEGIN, END, table)


if __name__ == "__main__":
    main()
