"""``fastgan gpu-report``: what the GPU's kernels compile to and what they move, on GPUs that need not be here.

Compiled code is read, traffic is *modelled* at launch boundaries, and times are *predicted* from datasheet peaks:
nothing in the report was measured.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastgan.kernels
from fastgan import _native
from fastgan.kernels._dot import planning_for
from fastgan.kernels._launch import Launch
from fastgan.profile.compiled import Compiled, Failure, compile_all, specialise
from fastgan.profile.cuda_cases import CudaTraffic, cuda_traffic
from fastgan.profile.cuda_code import CudaCode, read_library
from fastgan.profile.devices import ARCHITECTURES, DEVICES, Device
from fastgan.profile.gpu_checks import Finding, check, check_cuda
from fastgan.profile.gpu_layers import Layer, report_layers
from fastgan.profile.traffic import Kernel, count

# Before sm_80 Triton multiplies without tensor cores: such code is compiled and reported, but nothing is asked of it.
GATED_FROM = 80
CI_ARCHITECTURES = (80, 90)


@dataclass(frozen=True)
class LayerTraffic:
    """What one layer moves: fused, and by plain torch's sequence."""

    layer: Layer
    fused: tuple[Kernel, ...]
    eager: tuple[Kernel, ...]

    @property
    def launches(self) -> int:
        """Launches of fastgan's kernels."""
        return sum(kernel.launch is not None for kernel in self.fused)

    @property
    def others(self) -> int:
        """Kernels of torch that the fused call still runs."""
        return len(self.fused) - self.launches

    def over_compulsory(self, kernels: Iterable[Kernel]) -> float:
        """Modelled bytes as a multiple of those that any implementation moves."""
        return sum(kernel.bytes for kernel in kernels) / self.layer.compulsory


@dataclass
class Report:
    """Everything that the report says.

    Attributes:
        archs: the architectures, 80 is sm_80.
        traffic: by layer.
        code: (label, launch, arch, what it compiled to), distinct code once, under its first label.
        cuda: the kernels of the CUDA C++ library that is built here, for the architectures that it carries.
        cuda_reason: why there is no such library; None if there is.
        cuda_traffic: what those kernels move, beside the other backends.
        findings: what is wrong.
    """

    archs: tuple[int, ...]
    traffic: list[LayerTraffic] = field(default_factory=list)
    code: list[tuple[str, Launch, int, Compiled | Failure]] = field(default_factory=list)
    cuda: list[CudaCode] = field(default_factory=list)
    cuda_reason: str | None = None
    cuda_traffic: list[CudaTraffic] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def gated(self) -> list[Finding]:
        """The findings that fail the report."""
        return [finding for finding in self.findings if finding.arch >= GATED_FROM]


def shipped_launches() -> Iterator[tuple[str, Launch]]:
    """(label, launch) of what the modules of fastgan.kernels say they ship: their functions ``shipped()``."""
    for module in pkgutil.iter_modules(fastgan.kernels.__path__):
        if module.name.startswith("_"):
            continue
        shipped = getattr(importlib.import_module(f"fastgan.kernels.{module.name}"), "shipped", None)
        for label, launches in shipped() if shipped is not None else ():
            for index, launch in enumerate(launches):
                suffix = f" ({index + 1} of {len(launches)})" if len(launches) > 1 else ""
                yield f"{module.name}: {label}{suffix}", launch


def layer_traffic(layers: Iterable[Layer]) -> list[LayerTraffic]:
    """Count every layer, fused and by plain torch, without gradients."""
    with torch.no_grad():
        return [
            LayerTraffic(layer, tuple(count(layer.fused, layer.inputs)), tuple(count(layer.eager, layer.inputs)))
            for layer in layers
        ]


def compile_launches(
    launches: Iterable[tuple[str, Launch, int]],
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[tuple[str, Launch, int, Compiled | Failure]], list[Finding]]:
    """Compile the distinct code among (label, launch, architecture) and check every launch; -> (code, findings).
    ``processes`` and ``progress`` as for :func:`fastgan.profile.compiled.compile_all`."""
    jobs = [(label, launch, specialise(launch, arch)) for label, launch, arch in launches]
    results = compile_all([job for _, _, job in jobs], processes, progress)
    code: dict[str, tuple[str, Launch, int, Compiled | Failure]] = {}
    findings: dict[tuple[str, str, str], Finding] = {}
    for label, launch, job in jobs:
        result = results[job.key]
        code.setdefault(job.key, (label, launch, job.arch, result))
        for found in check(label, launch, result):
            findings.setdefault((job.key, found.kind, found.message), found)
    return list(code.values()), list(findings.values())


def one_of_each(launches: Iterable[tuple[str, Launch]]) -> Iterator[tuple[str, Launch]]:
    """The first launch of each kind: what CI has time for.

    Launches of a kind have the same kernel, constants, warps, stages and registers, the same types of all arguments
    (None is one), and the same strides are 1. So they differ in sizes: which numbers are 1 or divisible by 16, and how
    a tile of as many pixels is shaped.
    """
    seen = set()
    for label, launch in launches:
        constants = dict(launch.constants)
        pixels = math.prod(constants.pop(name, 1) for name in ("BLOCK_S", "BLOCK_H", "BLOCK_W"))
        traits = [(name, _trait(name, value)) for name, value in launch.arguments.items()]
        kind = launch.kernel, repr((traits, sorted(constants.items()), pixels, launch.settings()))
        if kind not in seen:
            seen.add(kind)
            yield label, launch


def _trait(name: str, value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_trait(name, part) for part in value)
    return value.dtype if isinstance(value, Tensor) else (type(value), "stride" in name and value == 1)


def in_turn(launches: Iterable[tuple[str, Launch]], archs: Sequence[int]) -> Iterator[tuple[str, Launch, int]]:
    """Every distinct code for one of the architectures in turn, each kernel for all of them.

    Launches that share their code share its architecture, so that every launch is checked. A kernel with fewer codes
    than there are architectures has its last one compiled for the rest of them.
    """
    archs_of: dict[str, int] = {}
    last: dict[Any, tuple[int, tuple[str, Launch]]] = {}
    for label, launch in launches:
        key = specialise(launch, archs[0]).key
        if key not in archs_of:
            before = last[launch.kernel][0] if launch.kernel in last else 0
            archs_of[key] = archs[before % len(archs)]
            last[launch.kernel] = before + 1, (label, launch)
        yield label, launch, archs_of[key]
    for codes, entry in last.values():
        yield from ((*entry, arch) for arch in archs[codes:])


def planned_launches(traffic: Iterable[LayerTraffic]) -> Iterator[tuple[str, Launch]]:
    """(label, launch) of what the layers launch."""
    for entry in traffic:
        for kernel in entry.fused:
            if kernel.launch is not None:
                yield f"{entry.layer.model} {entry.layer.name}", kernel.launch


def make_report(
    archs: Sequence[int] = tuple(ARCHITECTURES),
    layers: Sequence[Layer] | None = None,
    launches: Iterable[tuple[str, Launch]] | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Count the layers, compile their launches and the shipped ones, and check them.

    Args:
        archs: architectures to compile for, 80 is sm_80.
        layers: None takes :func:`fastgan.profile.gpu_layers.report_layers`.
        launches: None takes :func:`shipped_launches`.
        processes: that compile at the same time; None takes one for each CPU of this process.
        progress: called with how many distinct codes are done, and of how many.
    """
    unknown = sorted(set(archs) - set(ARCHITECTURES))
    if unknown:
        raise ValueError(f"gpu-report: arch must be among {', '.join(map(str, ARCHITECTURES))}, got {unknown}")
    layers = report_layers() if layers is None else layers
    given = None if launches is None else list(launches)
    # Where there are no tensor cores launchers choose other tiles.
    plans = {cores: _plan(layers, given, cores) for cores in {arch >= GATED_FROM for arch in archs}}
    entries = [(*entry, arch) for arch in archs for entry in plans[arch >= GATED_FROM]]
    code, findings = compile_launches(entries, processes, progress)
    report = Report(tuple(archs), layer_traffic(layers), code, findings=findings)
    library = _native.load()["cuda"]
    report.cuda_reason = None if library.path.exists() else library.reason
    if report.cuda_reason is None:
        report.cuda = read_library(library.path)
        report.cuda_traffic = cuda_traffic()
        report.findings += check_cuda(report.cuda)
    return report


def _plan(
    layers: Sequence[Layer], launches: Sequence[tuple[str, Launch]] | None, tensor_cores: bool
) -> list[tuple[str, Launch]]:
    """What is launched where there are tensor cores, or where there are none: then nothing is multiplied in TF32."""
    with planning_for((8, 0) if tensor_cores else (7, 5)):
        planned = [*planned_launches(layer_traffic(layers)), *(shipped_launches() if launches is None else launches)]
    return [entry for entry in planned if tensor_cores or entry[1].constants.get("PRECISION") != "tf32"]


def predicted_seconds(kernels: Iterable[Kernel], device: Device) -> float | None:
    """The roofline of a sequence: each kernel's max(bytes / bandwidth, flops / peak), added up.

    None where the device has no native products of the dtype. Launch overhead is not in it.
    """
    total = 0.0
    for kernel in kernels:
        dtype = kernel.dtype if kernel.dtype in (torch.float16, torch.bfloat16) else torch.float32
        seconds = device.roofline(kernel.bytes, kernel.flops, dtype)
        if seconds is None:
            return None
        total += seconds
    return total


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values."""
    layers = []
    for entry in report.traffic:
        row: dict[str, Any] = {"model": entry.layer.model, "layer": entry.layer.name, "up": entry.layer.up}
        row |= {"dtype": str(entry.layer.dtype).removeprefix("torch."), "layout": entry.layer.layout}
        row |= {"compulsory_bytes": entry.layer.compulsory, "launches": entry.launches, "other_kernels": entry.others}
        for name, kernels in (("fused", entry.fused), ("eager", entry.eager)):
            row[name] = _kernels(kernels)
        layers.append(row)
    code = []
    for label, launch, arch, result in report.code:
        row = {"label": label, "arch": arch, "grid": list(launch.grid), "constants": _plain(launch.constants)}
        if isinstance(result, Failure):
            row["failure"] = result.message
        else:
            row |= {"kernel": result.kernel, "warps": result.warps, "shared": result.shared}
            row |= {"occupancy": result.occupancy, **asdict(result.code)}
        code.append(row)
    return {
        "note": "compiled code was read; traffic is modelled; times are predicted from datasheet peaks, not measured",
        "archs": list(report.archs),
        "layers": layers,
        "code": code,
        "cuda_code": [{**asdict(entry), "shared": entry.shared, "occupancy": entry.occupancy} for entry in report.cuda],
        "cuda_missing": report.cuda_reason,
        "cuda_calls": [_cuda_row(entry) for entry in report.cuda_traffic],
        "findings": [asdict(finding) for finding in report.findings],
        "devices": [asdict(device) for device in DEVICES],
    }


def _cuda_row(entry: CudaTraffic) -> dict[str, Any]:
    row: dict[str, Any] = {"op": entry.case.op, "call": entry.case.name}
    for backend, kernels in entry.kernels.items():
        devices = [device for device in DEVICES if entry.runs_on(backend, device)]
        row[backend] = {"cannot_run": kernels} if isinstance(kernels, str) else _kernels(kernels, devices)
    return row


def _kernels(kernels: Sequence[Kernel], devices: Sequence[Device] = DEVICES) -> dict[str, Any]:
    predicted = {device.name: predicted_seconds(kernels, device) for device in devices}
    return {
        "kernels": [kernel.name for kernel in kernels],
        "modelled_bytes": sum(kernel.bytes for kernel in kernels),
        "modelled_flops": sum(kernel.flops for kernel in kernels),
        "predicted_us": {name: None if s is None else s * 1e6 for name, s in predicted.items()},
    }


def _plain(values: Any) -> dict[str, Any]:
    return {name: x if isinstance(x, (int, float, str, bool, type(None))) else str(x) for name, x in values.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), metavar="SM",
                        help="architectures, 80 is sm_80 (default: all)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="write the Markdown there (default: print it)")
    parser.add_argument("--json", action="store_true", help="JSON in place of Markdown")
    parser.add_argument("--processes", type=int, help="that compile at the same time (default: one for each CPU)")


def _show(done: int, total: int) -> None:
    if done % 100 == 0 or done == total:
        print(f"gpu-report: {done} of {total} compiled", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Write the report; 1 if anything from sm_80 on is wrong, 2 if this process cannot compile."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("gpu-report: unset TRITON_INTERPRET: it compiles kernels, the interpreter does not", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("gpu-report: triton is not installed (pip install triton, on Linux)", file=sys.stderr)
        return 2
    from fastgan.profile.gpu_markdown import as_markdown

    try:
        report = make_report(args.arch, processes=args.processes, progress=_show)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    text = json.dumps(as_json(report), indent=2, ensure_ascii=False) if args.json else as_markdown(report)
    if args.out is None:
        print(text)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text.rstrip() + "\n")
        print(f"gpu-report: {len(report.code)} compiled kernels, {len(report.findings)} findings, in {args.out}")
    for finding in report.gated:
        print(f"gpu-report: {finding}", file=sys.stderr)
    return 1 if report.gated else 0
