"""Loads the compiled kernels, once, at import, and knows why a library is not loaded.

The libraries only add kernels to ops whose schemas Python defines, so the package works without any of them. They
use the LibTorch stable ABI: one that was built against torch 2.14 runs on every torch 2.x from its target on.
"""

from __future__ import annotations

import ctypes
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
_LIBRARIES = {"cpp": "libfastgan_cpu.so", "cuda": "libfastgan_cuda.so"}

# Kept for the life of the process: torch forgets an op's schema together with the Library that defined it.
_SCHEMAS = torch.library.Library("fastgan", "FRAGMENT")
_SCHEMAS.define("_probe(Tensor x) -> Tensor")


@dataclass(frozen=True)
class LibraryStatus:
    """One compiled library: where it is or would be, and why it is not loaded (None when it is)."""

    path: Path
    reason: str | None


def read_build_info(folder: Path = _HERE) -> dict[str, Any] | None:
    """What the build stored about itself (compilers, flags, torch, switches); None for a checkout never built."""
    path = folder / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else None


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


def load_library(name: str, folder: Path, info: dict[str, Any] | None) -> LibraryStatus:
    """Load one library from ``folder`` if it was built and fits; a misfit warns and names both torch versions.

    Args:
        name: the backend that the library serves, "cpp" or "cuda".
        folder: where the libraries are.
        info: what their build stored, from :func:`read_build_info`.
    """
    path = folder / _LIBRARIES[name]
    if info is None:
        return LibraryStatus(path, "not built")
    if info[f"{name}_reason"] is not None:
        return LibraryStatus(path, f"not built: {info[f'{name}_reason']}")
    if name == "cuda" and torch.version.cuda is None:
        return LibraryStatus(path, f"torch {torch.__version__} is built without CUDA")
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
    return LibraryStatus(path, reason)


_info = read_build_info()
_status = {name: load_library(name, _HERE, _info) for name in _LIBRARIES}
# torch.compile traces the choice of a backend, so what that reads is plain strings.
_reasons = {name: status.reason for name, status in _status.items()}


def build_info() -> dict[str, Any] | None:
    """What the build of the installed package stored; None for a checkout never built."""
    return _info


def status() -> dict[str, LibraryStatus]:
    """The libraries by backend ("cpp", "cuda"), each with the reason why it is not loaded."""
    return _status


def unavailable(backend: str) -> str | None:
    """Why the compiled library of ``backend`` ("cpp" or "cuda") is not loaded; None when it is."""
    return _reasons[backend]


def simd_level() -> str:
    """The instruction set that the CPU kernels run with on this machine, chosen when their library was loaded.

    Raises:
        RuntimeError: the CPU library is not loaded.
    """
    if _reasons["cpp"] is not None:
        raise RuntimeError(f"the CPU library is not loaded: {_reasons['cpp']}")
    function = ctypes.CDLL(str(_status["cpp"].path)).fastgan_simd_level
    function.restype = ctypes.c_char_p
    return function().decode()


def probe(device: torch.device | str) -> bool:
    """Run the smallest compiled kernel on ``device``: True when what it computes is right.

    Raises:
        NotImplementedError: no compiled library serves this device.
        RuntimeError: the kernel could not run there, with the driver's own words.
    """
    # Longer than one grain of the CPU's threads and than one block of a GPU, and a multiple of neither.
    x = torch.linspace(-1.0, 1.0, 40_009, device=device)
    return torch.equal(torch.ops.fastgan._probe(x), x + torch.arange(x.numel(), device=device))
