"""The benches on a device: ``python -m bench.gpu_bench bench.bench_patch_loss --device cuda --rows FILE``.

:mod:`bench.gpu_check` runs this, one process a file: an error of the device (an illegal address, a hang) ends a CUDA
process, and must cost no more than the case that made it. Every line of FILE is a JSON object: ``{"begin": index}``
before a case, its rows, ``{"failed": ...}`` or ``{"left_out": ...}``, and ``{"end": count}`` behind the last.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

import fastgan
from bench.cases import Case
from bench.record import measure_case
from fastgan import backends

# Ops whose inputs may all be given in a half type and in NHWC, as people run them on a GPU; others stay as they are.
HALF = ("scaled_conv2d", "modulated_conv2d")
VARIANTS = (("float32", torch.contiguous_format), ("float16", torch.channels_last), ("bfloat16", torch.channels_last))
# Candidates that call a fastgan op begin with this; the others are plain torch, which no backend changes.
FUSED = "fused"


def prepared(value: Any, device: str, dtype: torch.dtype, layout: torch.memory_format) -> Any:
    """An input of a case on ``device``: floating tensors as ``dtype``, maps in ``layout``; leaves stay leaves."""
    if isinstance(value, (list, tuple)):
        return [prepared(part, device, dtype, layout) for part in value]
    if not isinstance(value, Tensor):
        return value
    moved = value.detach().to(device, dtype if value.is_floating_point() else value.dtype)
    if moved.ndim == 4:
        moved = moved.to(memory_format=layout)
    return moved.requires_grad_(value.requires_grad)


def variants(case: Case, device: str) -> Iterator[Case]:
    """``case`` on ``device``, in each precision and layout that it is timed in there."""
    for name, layout in VARIANTS if case.op in HALF else VARIANTS[:1]:
        dtype = getattr(torch, name)
        as_is = case.op not in HALF
        label = case.layout if as_is else str(layout).removeprefix("torch.").removesuffix("_format")
        keep = torch.preserve_format if as_is else layout

        def inputs(dtype: torch.dtype = dtype, keep: torch.memory_format = keep) -> list[Any]:
            return prepared(case.inputs(), device, dtype, keep)

        # Traffic in half types is half; products are what they were, but their peak is not the one that is measured.
        work = case.work if name == "float32" else {}
        yield dataclasses.replace(case, inputs=inputs, dtype=name, layout=label, work=work)


def on_backends(case: Case) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """The candidates with every fused one on each backend that can run it, and why the others cannot.

    What a backend cannot run it says itself, before anything is computed; any other error is raised.
    """
    found: dict[str, Callable[..., Tensor]] = {}
    left_out: dict[str, str] = {}
    for name, function in case.candidates.items():
        if not name.startswith(FUSED):
            found[name] = function
            continue
        for backend in backends.DEFAULT_ORDER:
            candidate = _on(backend, function)
            try:
                with torch.no_grad():
                    candidate(*case.inputs())
            except ValueError as error:
                if "cannot run this call" not in str(error):
                    raise
                left_out[f"{name} on {backend}"] = str(error).partition("cannot run this call: ")[2]
            else:
                found[f"{name} on {backend}"] = candidate
    return found, left_out


def _on(backend: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        with fastgan.backend(backend):
            return function(*args)

    return call


def run_cases(cases: list[Case], args: argparse.Namespace, file: TextIO) -> None:
    """Time ``cases`` from ``args.start`` on, writing each line as soon as it is known."""

    def write(**line: Any) -> None:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()

    for index, case in enumerate(cases):
        if index < args.start:
            continue
        facts = {"op": case.op, "case": case.name, "dtype": case.dtype, "layout": case.layout}
        write(begin=index, **facts)
        try:
            candidates, left_out = on_backends(case)
            for candidate, reason in left_out.items():
                write(left_out=candidate, reason=reason, **facts)
            timed = dataclasses.replace(case, candidates=candidates)
            for row in measure_case(timed, args.seconds, args.compile, args.device):
                write(**row)
        except Exception as error:  # noqa: BLE001 - one case must not cost the others; what it raised is the result
            write(failed=f"{type(error).__name__}: {error}", trace=traceback.format_exc(limit=-6), **facts)
            if args.device == "cuda" and not _device_works():
                sys.exit(3)
    write(end=len(cases))


def _device_works() -> bool:
    """Whether the CUDA context still computes; after an illegal address it never does again."""
    try:
        return bool(torch.ones(2, device="cuda").sum().item() == 2)
    except RuntimeError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_bench", description=__doc__.splitlines()[0])
    parser.add_argument("module", help="a module with CASES")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rows", type=Path, required=True, help="where the lines are appended")
    parser.add_argument("--start", type=int, default=0, help="leave out so many cases")
    parser.add_argument("--seconds", type=float, default=1.0, help="per pass of a case, all candidates together")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the eager candidate")
    args = parser.parse_args()
    # What the bench files keep outside their inputs is made on import, on the default device.
    torch.set_default_device(args.device)
    module = importlib.import_module(args.module)
    cases = [variant for case in module.CASES for variant in variants(case, args.device)]
    with args.rows.open("a") as file:
        run_cases(cases, args, file)


if __name__ == "__main__":
    main()
