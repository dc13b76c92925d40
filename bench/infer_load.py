"""What a saved engine costs when a process begins with it: seconds to the first picture, and memory at its highest.

``python -m bench.infer_load FOLDER`` is that process; :func:`measure_load` starts it and makes the row.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.infer_cases import OP, OURS, Workload
from fastgan import infer
from fastgan.profile import latency

MAX_MEMORY, MAX_SECONDS = 1.5, 3.0
_ENGINE, _CALL = "engine", "call.pt"


def measure_load(workload: Workload) -> dict[str, Any]:
    """The row of one generator, from a process that only loads and runs it.

    ``peak_bytes`` is the rise of the resident set, ``load_s`` and ``first_call_s`` are seconds, and ``needed_bytes`` is
    what memory is judged by: parameters and buffers, and activations alive at once in eager torch.

    Raises:
        RuntimeError: the process failed; with what it printed.
        ArithmeticError: its picture is not that of the engine that was saved.
    """
    model, example = workload.build()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        fast = infer.optimize(model, (example,), workload.kwargs)
        fast.save(Path(folder) / _ENGINE)
        call = {"args": (example,), "kwargs": dict(workload.kwargs), "picture": fast(example, **workload.kwargs)}
        torch.save(call, Path(folder) / _CALL)
        command = [sys.executable, "-m", "bench.infer_load", folder, str(torch.get_num_threads())]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        activations = latency.peak_memory(lambda: model(example, **workload.kwargs))
    if done.returncode != 0:
        raise RuntimeError(f"bench.infer_load: {workload.name} must load and run in a new process, got\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    if not found["max_error"] <= 1e-5:
        raise ArithmeticError(f"{workload.name}: loaded, the error must be at most 1e-5, got {found['max_error']:.2g}")
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    row = {"op": OP, "case": workload.name, "layout": "contiguous", "dtype": "float32", "pass": "load"}
    return row | {"candidate": OURS, "needed_bytes": weights + activations, "weights_bytes": weights} | found


def described(row: Mapping[str, Any]) -> str:
    """A row, for people, in a line."""
    return (
        f"{row['op']:22} {row['case']:28} {row['pass']:11} {row['candidate']:8} {row['peak_bytes'] / 1e6:9.1f} MB of "
        f"{row['needed_bytes'] / 1e6:.1f}, load {row['load_s']:.2f} s, first call {row['first_call_s']:.2f} s"
    )


def table(rows: Mapping[str, Mapping[str, Any]], names: list[str]) -> str:
    """Markdown: a line per generator of ``names`` from its row, and of one without a row that there is none."""
    lines = [
        "In a process of its own that loads what was saved: memory by which the resident set rises at most, against "
        "weights and the activations that eager torch has alive at once; seconds from load to the first picture.",
        "",
        "| work | weights + activations, MB | memory, MB | of it | at most | | load + first call, s | at most | |",
        "|---|---:|---:|---:|---:|---|---:|---:|---|",
    ]
    for name in names:
        if name not in rows:
            lines.append(f"| {name} | | | | {MAX_MEMORY:g}× | not recorded | | {MAX_SECONDS:g} | not recorded |")
            continue
        row = rows[name]
        share, seconds = row["peak_bytes"] / row["needed_bytes"], row["load_s"] + row["first_call_s"]
        cells = [name, f"{row['needed_bytes'] / 1e6:.0f}", f"{row['peak_bytes'] / 1e6:.0f}", f"{share:.2f}×"]
        cells += [f"{MAX_MEMORY:g}×", _met(share <= MAX_MEMORY)]
        cells += [f"{row['load_s']:.2f} + {row['first_call_s']:.2f}", f"{MAX_SECONDS:g}", _met(seconds <= MAX_SECONDS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def observe(
    load: Callable[[], Callable[..., Tensor]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, dict[str, float]]:
    """Load and call once: the picture, and ``load_s``, ``first_call_s`` and ``peak_bytes`` of this process."""
    before = _resident("VmRSS")
    # Linux: the high-water mark begins anew at what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    start = perf_counter()
    run = load()
    loaded = perf_counter()
    picture = run(*args, **kwargs)
    done = perf_counter()
    rise = max(0, _resident("VmHWM") - before)
    return picture, {"load_s": loaded - start, "first_call_s": done - loaded, "peak_bytes": rise}


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"bench.infer_load: /proc/self/status must have {key}; memory is measured on Linux only")


def _warm_libraries() -> None:
    """Map what torch and its math libraries need for any network, so that it does not count as this one's memory."""
    x, weight = torch.randn(1, 16, 32, 32), torch.randn(16, 16, 3, 3)
    for convolve in (F.conv2d, F.conv_transpose2d):
        F.instance_norm(convolve(x, weight)).relu_()
    torch.mm(torch.randn(256, 256), torch.randn(256, 256))


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    call = torch.load(folder / _CALL, weights_only=True)
    with torch.no_grad():
        _warm_libraries()
        picture, found = observe(lambda: infer.load(folder / _ENGINE, drop_weights=True), call["args"], call["kwargs"])
    error = (picture - call["picture"]).abs().max() / call["picture"].abs().max()
    print(json.dumps(found | {"max_error": error.item()}))


if __name__ == "__main__":
    main()
