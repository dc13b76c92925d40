"""The GPU report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

import fastgan
from fastgan.kernels._launch import Launch
from fastgan.profile.compiled import Compiled, Failure, Reference
from fastgan.profile.cuda_code import CudaCode
from fastgan.profile.devices import ARCHITECTURE_SOURCE, DEVICES
from fastgan.profile.gpu_report import GATED_FROM, LayerTraffic, Report, predicted_seconds
from fastgan.profile.traffic import Kernel

_MIB = 2**20


def as_markdown(report: Report) -> str:
    """The whole report."""
    import triton

    archs = ", ".join(f"sm_{arch}" for arch in report.archs)
    lines = [
        "# GPU report",
        "",
        f"Written by `fastgan gpu-report` (fastgan {fastgan.__version__}, torch {torch.__version__}, Triton "
        f"{triton.__version__}) for {archs}. No GPU was used. Compiled code was **read**; bytes, operations and "
        "launches are **modelled** at launch boundaries; times are **predicted, not measured**.",
        "",
        *_summary(report),
        *_findings(report),
        *_traffic(report),
        *_predictions(report),
        *_code(report),
        *_cuda(report),
        *_sources(),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers_from: int = 1) -> list[str]:
    rule = ["---" if i < numbers_from else "---:" for i in range(len(head))]
    return [f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows)]


def _summary(report: Report) -> list[str]:
    lines = [
        "## Summary",
        "",
        "Layers in evaluation, batch 1; bytes over what any implementation moves (**modelled**):",
        "",
    ]
    rows = []
    for model, entries in _models(report.traffic).items():
        dtype = str(entries[0].layer.dtype).removeprefix("torch.")
        launches, compulsory = _launches(entries), sum(e.layer.compulsory for e in entries)
        fused, eager = ([k for e in entries for k in getattr(e, side)] for side in ("fused", "eager"))
        moved = [f"{sum(k.bytes for k in kernels) / compulsory:.2f}" for kernels in (fused, eager)]
        rows.append((f"{model}, {dtype}", len(entries), launches, moved[0], len(eager), moved[1]))
    head = ("model", "layers", "launches", "bytes, ×", "plain torch: kernels", "bytes, ×")
    lines += [*_table(head, rows), "", "Compiled code (**read**):", ""]
    rows = []
    for arch in report.archs:
        codes = [result for _, _, a, result in report.code if a == arch]
        good = [result for result in codes if isinstance(result, Compiled)]
        spill, tensor = (sum(bool(getattr(c.code, what)) for c in good) for what in ("spills", "tensor"))
        count = sum(finding.arch == arch for finding in report.findings)
        rows.append((f"sm_{arch}", len(codes), len(codes) - len(good), spill, tensor, count))
    head = ("architecture", "distinct codes", "do not compile", "spill", "use tensor cores", "findings")
    return [*lines, *_table(head, rows), ""]


def _launches(entries: Sequence[LayerTraffic]) -> str:
    """fastgan's launches + kernels of torch that the fused calls still run."""
    return f"{sum(e.launches for e in entries)} + {sum(e.others for e in entries)}"


def _findings(report: Report) -> list[str]:
    lines = ["## Findings", ""]
    if not report.findings:
        return [
            *lines,
            "None: no code spills or fails to fit its architecture, products of half types use tensor cores, and what "
            "the data allow to be read wide is read wide.",
            "",
        ]
    lines += [
        f"From sm_{GATED_FROM} on a finding fails the report. Before, Triton has no tensor cores, launchers take "
        "smaller tiles and never TF32; findings are listed, and the reference may be the better choice there.",
        "",
    ]
    rows = [(f"sm_{f.arch}", f.kind, f.label, f"`{f.kernel}`", f.message.splitlines()[0]) for f in report.findings]
    return [*lines, *_table(("arch", "kind", "launch", "kernel", "what"), rows, 5), ""]


def _models(traffic: Sequence[LayerTraffic]) -> dict[str, list[LayerTraffic]]:
    found: dict[str, list[LayerTraffic]] = {}
    for entry in traffic:
        found.setdefault(entry.layer.model, []).append(entry)
    return found


def _traffic(report: Report) -> list[str]:
    lines = [
        "## Launches and bytes by layer (modelled)",
        "",
        "Batch 1, evaluation. *Launches* are those of fastgan's kernels + kernels of torch that the fused call still "
        "runs. *× compulsory* is the traffic over what any implementation moves: each activation in and out once, "
        "weights once, Σ W² once. Plain torch is counted by watching its own code: one kernel per operator, each "
        "tensor once, which is a lower bound (the rules are in `fastgan/profile/traffic.py`).",
        "",
    ]
    for model, entries in _models(report.traffic).items():
        dtype = str(entries[0].layer.dtype).removeprefix("torch.")
        rows = [_traffic_row(entry) for entry in entries]
        total = sum(entry.layer.compulsory for entry in entries)
        sums = [sum(k.bytes for e in entries for k in getattr(e, side)) for side in ("fused", "eager")]
        rows.append(
            ("**all**", f"{total / _MIB:.2f}", _launches(entries), f"{sums[0] / total:.2f}",
             sum(len(e.eager) for e in entries), f"{sums[1] / total:.2f}",
             f"{sum(k.flops for e in entries for k in e.fused) / 1e9:.2f}")
        )  # fmt: skip
        head = ("layer", "compulsory MiB", "launches", "× compulsory")
        head += ("plain torch: kernels", "plain torch: × compulsory", "GFLOP")
        lines += [f"### {model}, {dtype}, {entries[0].layer.layout}", "", *_table(head, rows), ""]
    return lines


def _traffic_row(entry: LayerTraffic) -> tuple[object, ...]:
    return (
        entry.layer.name,
        f"{entry.layer.compulsory / _MIB:.2f}",
        f"{entry.launches} + {entry.others}",
        f"{entry.over_compulsory(entry.fused):.2f}",
        len(entry.eager),
        f"{entry.over_compulsory(entry.eager):.2f}",
        f"{sum(k.flops for k in entry.fused) / 1e9:.2f}",
    )


def _predictions(report: Report) -> list[str]:
    lines = [
        "## Roofline (predicted, not measured)",
        "",
        "Microseconds: the sum over kernels of max(bytes / bandwidth, operations / peak), fused / plain torch, from "
        "the datasheet peaks below. No kernel reaches this, launch overhead is not in it (launches are counted above), "
        "and what stays in a cache between kernels is counted as read from memory. It bounds; it does not forecast.",
        "",
    ]
    head = ("layer", *[f"{device.name}, µs" for device in DEVICES])
    for model, entries in _models(report.traffic).items():
        rows = [(e.layer.name, *_cells(e.fused, e.eager)) for e in entries]
        every = [[k for e in entries for k in getattr(e, side)] for side in ("fused", "eager")]
        rows.append(("**all**", *_cells(*every)))
        lines += [f"### {model}", "", *_table(head, rows), ""]
    return lines


def _cells(fused: Iterable[Kernel], eager: Iterable[Kernel]) -> list[str]:
    cells = []
    for device in DEVICES:
        times = [predicted_seconds(kernels, device) for kernels in (fused, eager)]
        cells.append(" / ".join("–" if t is None else f"{t * 1e6:.3g}" for t in times))
    return cells


def _code(report: Report) -> list[str]:
    lines = [
        "## Compiled code (read)",
        "",
        "Over all architectures of this report. *codes*: distinct machine code. *registers* per thread. *spills*: "
        "instructions that touch local memory. *shared*: KiB of shared memory per block, the largest. *occupancy*: "
        "theoretical, of the warps that a multiprocessor holds. *tensor*: which tensor-core instructions. *widest "
        "load*, *store*: bits per thread, the least and the most of any code; TMA counts as 128.",
        "",
        *_by_kernel(report),
        "### By launch",
        "",
        "Distinct code once, under the first launch that uses it. Per architecture: registers per thread / KiB of "
        "shared memory per block / theoretical occupancy in %, and spills where there are any. Instructions as they "
        f"stand in the code for sm_{_shown(report.archs)}: *tensor* cores; *loads* and *stores* by bits per thread "
        "(`fastgan gpu-report --json` has those of every architecture).",
        "",
    ]
    by_kernel: dict[str, dict[str, dict[int, Compiled | Failure]]] = {}
    for label, launch, arch, result in report.code:
        by_kernel.setdefault(_name(launch), {}).setdefault(label, {})[arch] = result
    for kernel, launches in sorted(by_kernel.items()):
        head = (
            "launch",
            "warps",
            *[f"sm_{arch}: registers / KiB / %" for arch in report.archs],
            "tensor",
            "loads",
            "stores",
        )
        rows = [_code_row(report, label, results) for label, results in launches.items()]
        summary = f"<details><summary><code>{kernel}</code>: {len(rows)} launches</summary>"
        lines += [summary, "", *_table(head, rows), "", "</details>", ""]
    return lines


def _by_kernel(report: Report) -> list[str]:
    found: dict[str, list[Compiled]] = {}
    for _, launch, _, result in report.code:
        if isinstance(result, Compiled):
            found.setdefault(_name(launch), []).append(result)
    rows = [
        (
            f"`{kernel}`",
            len(codes),
            _range(c.code.registers for c in codes),
            sum(c.code.spills for c in codes),
            f"{max(c.shared for c in codes) / 1024:.1f}",
            f"{_range(round(100 * c.occupancy) for c in codes)} %",
            ", ".join(sorted({name for c in codes for name in c.code.tensor})) or "–",
            _range(c.code.widest_load for c in codes),
            _range(c.code.widest_store for c in codes),
        )
        for kernel, codes in sorted(found.items())
    ]
    head = ("kernel", "codes", "registers", "spills", "shared", "occupancy", "tensor", "widest load", "widest store")
    return [*_table(head, rows), ""]


def _name(launch: Launch) -> str:
    """The kernel's: two modules have a ``forward_kernel``."""
    reference = Reference.of(launch.kernel)
    return f"{reference.module.rpartition('.')[2].lstrip('_')}.{reference.name}"


def _range(values: Iterable[int]) -> str:
    least, *_, most = sorted([*values] * 2)
    return str(least) if least == most else f"{least} … {most}"


def _shown(archs: Sequence[int]) -> int:
    """The architecture whose instruction counts are printed: A100's, or the first that there is."""
    return 80 if 80 in archs else archs[0]


def _code_row(report: Report, label: str, results: dict[int, Compiled | Failure]) -> tuple[object, ...]:
    cells = [_code_cell(results.get(arch)) for arch in report.archs]
    shown = results.get(_shown(report.archs))
    if not isinstance(shown, Compiled):
        return (label, "–", *cells, "–", "–", "–")
    counts = (shown.code.tensor, shown.code.loads, shown.code.stores)
    return (label, shown.warps, *cells, *[_counts(part) or "–" for part in counts])


def _code_cell(result: Compiled | CudaCode | Failure | None) -> str:
    if result is None:
        return "–"
    if isinstance(result, Failure):
        return "does not compile"
    spills = f", **{result.code.spills} spills**" if result.code.spills else ""
    return f"{result.code.registers} / {result.shared / 1024:.1f} / {100 * result.occupancy:.0f}{spills}"


def _counts(counts: dict) -> str:
    return ", ".join(f"{name}: {counts[name]}" for name in sorted(counts, key=lambda n: (isinstance(n, str), n)))


def _cuda(report: Report) -> list[str]:
    lines = ["## CUDA C++ kernels", ""]
    if report.cuda_reason is not None:
        return [*lines, f"There is no library of them here: {report.cuda_reason}.", ""]
    archs = sorted({entry.arch for entry in report.cuda})
    lines += [
        'They serve where `backend="cuda"` or `fastgan.backend("cuda")` names them: no GPU has shown yet that they are '
        "faster than what they would replace. The code is **read** from the library that is built here. Per "
        "architecture: registers per thread / KiB of shared memory per block, the most that a launch asks for / "
        "theoretical occupancy in % at that, and spills where there are any; instructions as they stand in the code "
        f"for sm_{_shown(archs)}.",
        "",
    ]
    by_kernel: dict[str, dict[int, CudaCode]] = {}
    for entry in report.cuda:
        by_kernel.setdefault(entry.kernel, {})[entry.arch] = entry
    head = ("kernel", "threads", *[f"sm_{arch}: registers / KiB / %" for arch in archs], "tensor", "loads", "stores")
    rows = []
    for kernel, entries in by_kernel.items():
        shown = entries[_shown(archs)]
        counts = [_counts(part) or "–" for part in (shown.code.tensor, shown.code.loads, shown.code.stores)]
        rows.append((f"`{kernel}`", shown.threads, *[_code_cell(entries.get(arch)) for arch in archs], *counts))
    return [*lines, *_table(head, rows), "", *_cuda_calls(report)]


def _cuda_calls(report: Report) -> list[str]:
    lines = [
        "### Beside Triton's (modelled and predicted, not measured)",
        "",
        "Kernels per call, their bytes in MiB, and the roofline in µs as above; – where a backend has no kernel for "
        "it. *reference* is plain torch in float32, the oracle.",
        "",
    ]
    rows = []
    for entry in report.cuda_traffic:
        for backend, kernels in entry.kernels.items():
            if isinstance(kernels, str):
                rows.append((entry.case.op, entry.case.name, backend, *["–"] * (2 + len(DEVICES))))
                continue
            times = [predicted_seconds(kernels, d) if entry.runs_on(backend, d) else None for d in DEVICES]
            cells = ["–" if seconds is None else f"{seconds * 1e6:.3g}" for seconds in times]
            moved = f"{sum(kernel.bytes for kernel in kernels) / _MIB:.2f}"
            rows.append((entry.case.op, entry.case.name, backend, len(kernels), moved, *cells))
    head = ("op", "call", "backend", "kernels", "MiB", *[f"{device.name}, µs" for device in DEVICES])
    return [*lines, *_table(head, rows, 3), ""]


def _sources() -> list[str]:
    head = ("device", "arch", "SMs", "half TFLOP/s", "TF32", "float32", "GB/s", "source")
    rows = [
        (d.name, f"sm_{d.arch}", d.sms, f"{d.half / 1e12:g}", "–" if d.tf32 is None else f"{d.tf32 / 1e12:g}",
         f"{d.fp32 / 1e12:g}", f"{d.bandwidth / 1e9:g}", d.source)
        for d in DEVICES
    ]  # fmt: skip
    return [
        "## Devices and limits",
        "",
        "Datasheet peaks: dense products, float32 accumulation. *half* is float16, and bfloat16 where there is any.",
        "",
        *_table(head, rows),
        "",
        f"Limits of the architectures: {ARCHITECTURE_SOURCE}.",
    ]
