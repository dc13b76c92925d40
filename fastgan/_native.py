"""Loads the compiled kernels and knows why a library is not loaded.

The libraries only add kernels to ops whose schemas Python defines, so the package works without any of them. They
use the LibTorch stable ABI: one that was built against torch 2.14 runs on every torch 2.x from its target on.
"""

from __future__ import annotations

import ctypes
import json
import os
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent

# Triton reads the same variable when it is imported: its kernels then run on CPU tensors, through NumPy. The CPU
# belongs to them for the life of such a process, which is what their tests want, so the C++ kernels stay out.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Library -> (file, the entry of the build information that says why it was left out).
_LIBRARIES = {"cpu": ("libfastgan_cpu.so", "cpp_reason"), "cuda": ("libfastgan_cuda.so", "cuda_reason")}

# Kept for the life of the process: torch forgets an op's schema together with the Library that defined it.
_SCHEMAS = torch.library.Library("fastgan", "FRAGMENT")
_SCHEMAS.define("_probe(Tensor x) -> Tensor")
# The tile with which a dense block's convolutions share their transformed tiles; 0 where they should not.
_SCHEMAS.define("_dense_block_tile(Tensor x, Tensor[] weights, str precision) -> int")
torch.library.register_fake("fastgan::_dense_block_tile", lambda x, weights, precision: 0, lib=_SCHEMAS)
# What scaled_conv2d would choose on the CPU: the algorithm's name, then one line "name<TAB>why" for each.
_SCHEMAS.define(
    "_explain_scaled_conv2d(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] output_padding,"
    " int[2] dilation, bool transposed, int groups, str precision) -> str"
)


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
        name: the device that the library serves, "cpu" or "cuda".
        folder: where the libraries are.
        info: what their build stored, from :func:`read_build_info`.
    """
    file_name, reason_key = _LIBRARIES[name]
    path = folder / file_name
    if info is None:
        return LibraryStatus(path, "not built")
    if info[reason_key] is not None:
        return LibraryStatus(path, f"not built: {info[reason_key]}")
    if name == "cpu" and TRITON_INTERPRETED:
        return LibraryStatus(path, "TRITON_INTERPRET=1 gives the CPU to Triton's interpreter")
    if name == "cuda" and torch.version.cuda is None:
        return LibraryStatus(path, f"torch {torch.__version__} is built without CUDA")
    reason = misfit(info, torch.__version__)
    if reason is None:
        try:
            torch.ops.load_library(path)
        except OSError as error:
            # torch wraps the loader's own words, which name the missing symbol.
            cause = error.__cause__ or error
            reason = f"built against torch {info['torch_version']}, running torch {torch.__version__}: {cause}"
    if reason is not None:
        warnings.warn(
            f"fastgan: {path.name} cannot be loaded ({reason}). Its kernels are unavailable and other backends are "
            "used; reinstall fastgan with this torch to get them back.",
            RuntimeWarning,
            stacklevel=2,
        )
    return LibraryStatus(path, reason)


@cache
def load() -> dict[str, LibraryStatus]:
    """Load the libraries that were built and fit, once per process; nothing is ever compiled here.

    Returns:
        Each library by the device that it serves ("cpu", "cuda"), with the reason why it is not loaded.
    """
    info = read_build_info()
    return {name: load_library(name, _HERE, info) for name in _LIBRARIES}


@cache
def cpu_library() -> ctypes.CDLL | None:
    """The CPU library's functions that are no ops; None where it is not loaded."""
    library = load()["cpu"]
    if library.reason is not None:
        return None
    functions = ctypes.CDLL(str(library.path))
    functions.fastgan_algorithm_calls.argtypes = [ctypes.c_char_p]
    functions.fastgan_winograd_calls.argtypes = [ctypes.c_int64, ctypes.c_int64]
    for name in ("algorithm_calls", "winograd_calls", "kept_bytes"):
        getattr(functions, f"fastgan_{name}").restype = ctypes.c_int64
    functions.fastgan_simd_level.restype = ctypes.c_char_p
    for name in ("keep", "freeze", "forget"):
        function = getattr(functions, f"fastgan_{name}_weight")
        function.argtypes, function.restype = [ctypes.c_void_p], None
    functions.fastgan_new_recording.restype = ctypes.c_int64
    for name in ("drop_recording", "record"):
        function = getattr(functions, f"fastgan_{name}")
        function.argtypes, function.restype = [ctypes.c_int64], None
    functions.fastgan_made_bytes.argtypes = [ctypes.c_void_p]
    functions.fastgan_drop_weight.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    functions.fastgan_drop_weight.restype = functions.fastgan_made_bytes.restype = ctypes.c_int64
    return functions


# Those of a convolution, then those of the gradient of a weight; in both, "torch" is what is left to torch's own.
# The quantized ones are for whole numbers, which only the inference engine asks for.
ALGORITHMS = (
    *("packed_direct", "few_pixels", "unfolded_conv", "winograd", "direct_conv", "torch"),
    *("quantized_winograd", "quantized_direct"),
    *("unfolded_weight_grad", "dense_weight_grad", "direct_weight_grad", "winograd_weight_grad", "torch_weight_grad"),
)


def algorithm_calls() -> dict[str, int]:
    """How many calls each of ALGORITHMS has served on the CPU in this process, in whichever thread.

    The library chooses by shape and says nothing; this is for who measures or tests the choice. All are 0 without the
    CPU library.
    """
    library = cpu_library()
    return {name: library.fastgan_algorithm_calls(name.encode()) if library else 0 for name in ALGORITHMS}


def explain_convolution(*args: Any) -> tuple[str, dict[str, str]]:
    """Which of ALGORITHMS the CPU library would serve a call of ``scaled_conv2d`` with, and the verdict on each.

    Args:
        *args: the op's x and weight, and its settings from stride to precision.
    """
    algorithm, *lines = torch.ops.fastgan._explain_scaled_conv2d.default(*args).split("\n")
    return algorithm, dict(line.split("\t") for line in lines)


def winograd_calls() -> int:
    """How many convolutions this process has run through Winograd's filtering on the CPU, in whichever thread.

    Its results have an error bound of their own, which who checks them has to know; 0 without the CPU library.
    """
    return algorithm_calls()["winograd"]


# (m, r) of Winograd's F(m x m, r x r) that the CPU library has transforms for.
WINOGRAD_TILES = ((2, 3), (4, 3), (2, 2), (3, 2))


def winograd_tile_calls() -> dict[tuple[int, int], int]:
    """How many of :func:`winograd_calls` ran with each of WINOGRAD_TILES; all are 0 without the CPU library."""
    library = cpu_library()
    return {tile: library.fastgan_winograd_calls(*tile) if library else 0 for tile in WINOGRAD_TILES}


def simd_level() -> str:
    """The instruction set that the CPU kernels run with on this machine, chosen when their library was loaded.

    Raises:
        RuntimeError: the CPU library is not loaded.
    """
    library = cpu_library()
    if library is None:
        raise RuntimeError(f"the CPU library is not loaded: {load()['cpu'].reason}")
    return library.fastgan_simd_level().decode()


def probe(device: torch.device | str) -> bool:
    """Run the smallest compiled kernel on ``device``: True when what it computes is right.

    Raises:
        NotImplementedError: no compiled library serves this device.
        RuntimeError: the kernel could not run there, with the driver's own words.
    """
    load()
    # Longer than one grain of the CPU's threads and than one block of a GPU, and a multiple of neither.
    x = torch.linspace(-1.0, 1.0, 40_009, device=device)
    return torch.equal(torch.ops.fastgan._probe(x), x + torch.arange(x.numel(), device=device))
