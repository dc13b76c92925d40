"""Loads the compiled kernels and knows why a library is not loaded.

The libraries only add kernels to ops whose schemas Python defines, so the package works without any of them. They
use the LibTorch stable ABI: one that was built against torch 2.14 runs on every torch 2.x from its target on.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
_INFO_PATH = _HERE / "_build_info.json"
_LIBRARIES = {"cpu": "libfastgan_cpu.so", "cuda": "libfastgan_cuda.so"}

# Kept for the life of the process: torch forgets an op's schema together with the Library that defined it.
_SCHEMAS = torch.library.Library("fastgan", "FRAGMENT")
_SCHEMAS.define("_probe(Tensor x) -> Tensor")


@dataclass(frozen=True)
class LibraryStatus:
    """One compiled library: where it is, and why it is not loaded (None when it is)."""

    name: str
    path: Path
    reason: str | None

    @property
    def loaded(self) -> bool:
        return self.reason is None


@cache
def build_info() -> dict[str, Any] | None:
    """What the build stored about itself (compilers, flags, torch, switches); None for a checkout never built."""
    if not _INFO_PATH.exists():
        return None
    return json.loads(_INFO_PATH.read_text())


def misfit(info: dict[str, Any], running: str) -> str | None:
    """Why a library of build ``info`` cannot run on torch version ``running``; None when the versions fit.

    The stable ABI promises forward compatibility within one major version, from the target version on.
    """
    target = tuple(int(part) for part in info["torch_target"].split("."))
    version = tuple(int(part) for part in running.split(".")[:2])
    versions = f"built against torch {info['torch_version']}, running torch {running}"
    if version[0] != target[0]:
        return f"{versions}: the major versions differ"
    if version < target:
        return f"{versions}: it needs torch {info['torch_target']} or later"
    return None


def _load_library(name: str) -> LibraryStatus:
    path = _HERE / _LIBRARIES[name]
    info = build_info()
    if info is None or not path.exists():
        left_out = info and info["cpp_reason" if name == "cpu" else "cuda_reason"]
        return LibraryStatus(name, path, f"not built: {left_out}" if left_out else "not built")
    if name == "cuda" and torch.version.cuda is None:
        return LibraryStatus(name, path, f"torch {torch.__version__} is built without CUDA")
    reason = misfit(info, torch.__version__)
    if reason is None:
        try:
            torch.ops.load_library(path)
        except OSError as error:
            reason = f"built against torch {info['torch_version']}, running torch {torch.__version__}: {error}"
    if reason is not None:
        warnings.warn(
            f"fastgan: {path.name} cannot be loaded ({reason}). Its kernels are unavailable and other backends are "
            "used; reinstall fastgan with this torch to get them back.",
            RuntimeWarning,
            stacklevel=2,
        )
    return LibraryStatus(name, path, reason)


@cache
def load() -> dict[str, LibraryStatus]:
    """Load the libraries that were built and fit, once. Never compiles, never raises for a library that is missing."""
    return {name: _load_library(name) for name in _LIBRARIES}


def status() -> dict[str, LibraryStatus]:
    """The libraries by name ("cpu", "cuda"), each with the reason why it is not loaded."""
    return load()


def probe(device: torch.device | str) -> bool:
    """Run the smallest compiled kernel on ``device``: True when what it computes is right.

    Raises:
        NotImplementedError: no compiled library serves this device.
        RuntimeError: the kernel could not run there, with the driver's own words.
    """
    load()
    # Longer than one grain of the CPU's threads and than one block of a GPU, and a multiple of neither.
    x = torch.linspace(-1.0, 1.0, 10_007, device=device)
    return torch.equal(torch.ops.fastgan._probe(x), x + torch.arange(x.numel(), device=device))
