"""``fastgan doctor``: what is here, which backends can run, and what the others lack.

It only reads and runs two tiny kernels, so it is the first thing to ask for in a report of a problem.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import fastgan
from fastgan import _native, backends

# What pyproject.toml lists as optional, as distribution names; a test compares the two.
EXTRAS = {
    "train": ("pillow", "scikit-image", "rich", "safetensors"),
    "report": ("jinja2",),
}

# Backend -> the compiled library that holds its kernels.
_LIBRARY_OF = {"cpp": "cpu", "cuda": "cuda"}


def rebuild_command(switches: str = "") -> str:
    """The command that builds the native libraries anew, with environment ``switches`` before it."""
    checkout = Path(fastgan.__file__).resolve().parent.parent
    if (checkout / "setup.py").exists():
        return f"cd {checkout} && {switches}python setup.py build_ext --inplace"
    return f"{switches}pip install --no-build-isolation --force-reinstall --no-deps <the folder with fastgan's sources>"


def distribution_version(name: str) -> str | None:
    """The installed version of a distribution, without importing it; None where it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the system knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of what runs, and of what compiled the native libraries (None where that is absent)."""
    info = _native.read_build_info() or {}
    return {
        "fastgan": fastgan.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "torch cuda": torch.version.cuda,
        "triton": distribution_version("triton"),
        "numpy": distribution_version("numpy"),
        "built against torch": info.get("torch_version"),
        "c++ compiler": info.get("cxx_version"),
        "nvcc": info.get("nvcc_version"),
        "cuda architectures": info.get("cuda_arch_list"),
        "built at": info.get("built_at"),
    }


def devices() -> dict[str, Any]:
    """The CPU and how it is used, and each GPU that torch sees."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = {
        "model": cpu_model(),
        "usable cores": usable,
        "torch threads": torch.get_num_threads(),
        "simd of torch": torch.backends.cpu.get_cpu_capability(),
        "simd of fastgan": _native.simd_level() if _native.load()["cpu"].reason is None else None,
    }
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "index": index,
                "name": properties.name,
                "compute capability": f"{properties.major}.{properties.minor}",
                "memory (GiB)": round(properties.total_memory / 2**30, 1),
            }
        )
    return {"cpu": cpu, "gpus": gpus}


def probe_outcome(device: str) -> str | None:
    """What came of running the smallest kernel of a library: "right", what went wrong, or None if it cannot run."""
    if _native.load()[device].reason is not None or (device == "cuda" and not torch.cuda.is_available()):
        return None
    try:
        return "right" if _native.probe(device) else "the probe kernel computed wrong numbers"
    except RuntimeError as error:
        return f"the probe kernel failed: {str(error).splitlines()[0]}"


def library_report() -> dict[str, dict[str, Any]]:
    """Each compiled library by device: its path, whether it is loaded or why not, and what its probe kernel did."""
    return {
        name: {
            "path": str(library.path),
            "loaded": library.reason is None,
            "reason": library.reason,
            "probe": probe_outcome(name),
        }
        for name, library in _native.load().items()
    }


def rebuild_advice(backend: str) -> str:
    """What to do about a library that was built but does not work here."""
    if backend == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"rebuild for this GPU: {rebuild_command(f'TORCH_CUDA_ARCH_LIST={major}.{minor} ')}"
    return f"rebuild here: {rebuild_command()}"


def remedy(name: str) -> str:
    """What a person can do to make backend ``name`` available; called only where it is not."""
    info = _native.read_build_info()
    if name in ("triton", "cuda"):
        if torch.version.cuda is None:
            return "install a CUDA build of torch, on a machine with an NVIDIA GPU"
        if not torch.cuda.is_available():
            return "needs an NVIDIA GPU and its driver; if one is here, check nvidia-smi and CUDA_VISIBLE_DEVICES"
    if name == "triton":
        return "pip install triton" if distribution_version("triton") is None else "use a later version of fastgan"
    if info is None:
        return rebuild_command()
    if name == "cpp" and not info["build_cpp"]:
        return f"install g++ (or set CXX), then {rebuild_command('FASTGAN_BUILD_CPP=1 ')}"
    if name == "cuda" and not info["build_cuda"]:
        return f"install the CUDA toolkit (or set CUDA_HOME), then {rebuild_command('FASTGAN_BUILD_CUDA=1 ')}"
    if _native.load()[_LIBRARY_OF[name]].reason is not None:
        return rebuild_advice(name)
    return "use a later version of fastgan"


def backend_report(libraries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each backend: whether it can be used here, and if not why and what to do.

    Args:
        libraries: from :func:`library_report`; a backend whose probe kernel fails is not available.
    """
    report = {}
    for name, reason in backends.available().items():
        probe = libraries[_LIBRARY_OF[name]]["probe"] if name in _LIBRARY_OF else None
        if probe not in (None, "right"):
            report[name] = {"available": False, "reason": probe, "remedy": rebuild_advice(name)}
        elif reason is not None:
            report[name] = {"available": False, "reason": reason, "remedy": remedy(name)}
        else:
            report[name] = {"available": True, "reason": None, "remedy": None}
    return report


def examine() -> dict[str, Any]:
    """Everything that doctor knows, as plain values fit for JSON."""
    libraries = library_report()
    return {
        "versions": versions(),
        "devices": devices(),
        "backends": backend_report(libraries),
        "libraries": libraries,
        "extras": {extra: {name: distribution_version(name) for name in names} for extra, names in EXTRAS.items()},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTGAN_")},
        "build": _native.read_build_info(),
    }


def _rows(title: str, rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]


def _text_or(value: Any, absent: str) -> str:
    return absent if value is None else str(value)


def render(facts: dict[str, Any]) -> str:
    """The facts of :func:`examine` as aligned text."""
    lines = _rows("Versions", [(name, _text_or(value, "-")) for name, value in facts["versions"].items()])

    cpu = [(name, _text_or(value, "-")) for name, value in facts["devices"]["cpu"].items()]
    gpus = [
        (f"gpu {gpu['index']}", f"{gpu['name']}, {gpu['compute capability']}, {gpu['memory (GiB)']} GiB")
        for gpu in facts["devices"]["gpus"]
    ]
    lines += _rows("Devices", [*cpu, *(gpus or [("gpu", "none that torch can use")])])

    backend_rows = []
    for name, entry in facts["backends"].items():
        backend_rows.append((name, "available" if entry["available"] else f"not available: {entry['reason']}"))
        if not entry["available"]:
            backend_rows.append(("", f"to get it: {entry['remedy']}"))
    lines += _rows("Backends", backend_rows)

    library_rows = []
    for name, entry in facts["libraries"].items():
        outcome = f", its probe kernel: {entry['probe']}" if entry["probe"] else ""
        library_rows.append((name, f"loaded{outcome}" if entry["loaded"] else f"not loaded: {entry['reason']}"))
        if entry["loaded"]:
            library_rows.append(("", entry["path"]))
    lines += _rows("Compiled libraries", library_rows)

    extras = []
    for extra, found in facts["extras"].items():
        absent = [name for name, version in found.items() if version is None]
        present = ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)
        missing = f"absent: {', '.join(absent)} (pip install 'fastgan[{extra}]')" if absent else ""
        extras.append((extra, "; ".join(part for part in (present, missing) if part)))
    lines += _rows("Optional extras", extras)

    if facts["environment"]:
        lines += _rows("Environment", list(facts["environment"].items()))
    return "\n".join(lines).rstrip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print everything as JSON, the build's flags included")


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit status is 0 whatever it says, since the reference backend always works."""
    facts = examine()
    print(json.dumps(facts, indent=2) if args.json else render(facts), file=sys.stdout)
    return 0
