"""The GPU report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

import fastgan
from fastgan.profile.compiled import Compiled, Failure
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
        *_findings(report),
        *_traffic(report),
        *_predictions(report),
        *_code(report),
        *_sources(),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers_from: int = 1) -> list[str]:
    rule = ["---" if i < numbers_from else "---:" for i in range(len(head))]
    return [f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows)]


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
        f"From sm_{GATED_FROM} on a finding fails the report. Before, Triton has no tensor cores: findings are listed, "
        "and the reference may be the better choice there.",
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
        launches = f"{sum(e.launches for e in entries)} + {sum(e.others for e in entries)}"
        rows.append(
            ("**all**", f"{total / _MIB:.2f}", launches, f"{sums[0] / total:.2f}",
             sum(len(e.eager) for e in entries), f"{sums[1] / total:.2f}",
             f"{sum(k.flops for e in entries for k in e.fused) / 1e9:.2f}")
        )  # fmt: skip
        head = ("layer", "compulsory MiB", "launches", "× compulsory", "torch: kernels", "× compulsory", "GFLOP")
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
    head = ("layer", *[device.name for device in DEVICES])
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
        cells.append(" / ".join("–" if t is None else f"{t * 1e6:.1f}" for t in times))
    return cells


def _code(report: Report) -> list[str]:
    lines = [
        "## Compiled code (read)",
        "",
        "Distinct code once, under the first launch that uses it. *spills*: instructions that touch local memory. "
        "*shared*: KiB per block. *occupancy*: theoretical, of the warps that an SM holds. *tensor*: tensor-core "
        "instructions. *loads*, *stores*: global-memory instructions by bits per thread (static counts).",
        "",
    ]
    head = ("launch", "kernel", "warps", "registers", "spills", "shared", "occupancy", "tensor", "loads", "stores")
    for arch in report.archs:
        rows = [_code_row(label, result) for label, _, a, result in report.code if a == arch]
        table = _table(head, rows, 2)
        lines += [f"<details><summary>sm_{arch}: {len(rows)} kernels</summary>", "", *table, "", "</details>", ""]
    return lines


def _code_row(label: str, result: Compiled | Failure) -> tuple[object, ...]:
    if isinstance(result, Failure):
        return (label, f"`{result.kernel}`", "does not compile", *[""] * 7)
    code = result.code
    return (
        label,
        f"`{result.kernel}`",
        result.warps,
        code.registers,
        code.spills,
        f"{result.shared / 1024:.1f}",
        f"{100 * result.occupancy:.0f} %",
        _counts(code.tensor) or "–",
        _counts(code.loads) or "–",
        _counts(code.stores) or "–",
    )


def _counts(counts: dict) -> str:
    return ", ".join(f"{name}: {counts[name]}" for name in sorted(counts, key=lambda n: (isinstance(n, str), n)))


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
