"""Compiles a file of kernels for csrc/simt and loads it as a Python module; runs its functions under every schedule.

csrc/simt/README.md says what is compiled with which flags and why. Objects are kept in build/simt by a hash of all that
goes into them, so that a change of one kernel costs the compilation of one file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pybind11

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KEPT = ROOT / "build" / "simt"
# As in binding.cpp. Python looks for PyInit_ and the last part of a module's name; the parts before tell modules apart.
MODULE = "simt_kernels"
JOBS = 2

COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{CSRC}"]
# Sanitizers that kernels are compiled with: their calls end in csrc/simt/hooks.cpp.
CHECKED = ["-O1", "-g1", "-fsanitize=thread,alignment,bounds"]
RUNTIME = ["-O2"]
# With the real AddressSanitizer and UBSan in place of these checks.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer", *SANITIZERS]

# (order, seed): the machine's schedules, under all of which a kernel has to give the same bits.
SCHEDULES = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))


@cache
def compiler() -> list[str]:
    """The command of CXX, else g++.

    Raises:
        RuntimeError: it is not GCC, whose calls the machine answers.
    """
    command = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"the tests of CUDA kernels need g++, and there is no {command[0]}")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    if "Free Software Foundation" not in version:
        raise RuntimeError(f"csrc/simt needs GCC, got {version.splitlines()[0]}")
    return command


@cache
def _toolchain() -> bytes:
    version = subprocess.run([*compiler(), "--version"], capture_output=True, check=True).stdout
    return version + f"{sys.version} {pybind11.__version__}".encode()


def _digest(command: Sequence[str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256(_toolchain() + "\0".join(command).encode())
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def _headers(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.iterdir() if path.suffix in (".h", ".cuh"))


def _compile(source: Path, flags: list[str], headers: list[Path]) -> Path:
    """The object of one source, compiled unless it is kept."""
    command = [*compiler(), *COMMON, *flags, "-c", str(source)]
    target = KEPT / f"{source.stem}-{_digest(command, [source, *headers])}.o"
    _make(target, command)
    return target


def _make(target: Path, command: list[str]) -> None:
    if target.exists():
        return
    KEPT.mkdir(parents=True, exist_ok=True)
    # Under another name first: whoever runs beside this never sees half a file.
    partial = target.with_suffix(f".{os.getpid()}{target.suffix}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    partial.rename(target)


def _unity(sources: list[Path]) -> Path:
    """One file that includes all sources: most of their time is that of the C++ library's headers."""
    text = "".join(f'#include "{path}"\n' for path in sources)
    KEPT.mkdir(parents=True, exist_ok=True)
    unity = KEPT / f"machine-{hashlib.sha256(text.encode()).hexdigest()[:24]}.cpp"
    if not unity.exists():
        partial = unity.with_suffix(f".{os.getpid()}.cpp")
        partial.write_text(text)
        partial.rename(unity)
    return unity


def build(source: Path, *, sanitize: bool = False) -> Path:
    """The shared library of ``source``, the machine and the binding.

    Args:
        source: exports functions with SIMT_EXPORT.
        sanitize: compile for AddressSanitizer and UBSan, for a process that preloads them.
    """
    simt = _headers(CSRC / "simt")
    everything = _headers(CSRC / "simt", CSRC / "cuda", source.parent)
    includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    apart = ["binding.cpp", *(["hooks.cpp"] if sanitize else [])]
    machine = [path for path in sorted((CSRC / "simt").glob("*.cpp")) if path.name not in apart]
    # The machine's objects first: of a function that the kernels' file has too, of the C++ library's, the linker takes
    # the first, and the machine must not be checked by itself.
    jobs = [
        (_unity(machine), SANITIZED if sanitize else RUNTIME, [*simt, *machine]),
        # pybind11 is not what is tested, and takes long enough.
        (CSRC / "simt" / "binding.cpp", ["-O1", *includes], simt),
        (source, SANITIZED if sanitize else CHECKED, everything),
    ]
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    link = [*compiler(), "-shared", "-Wl,-Bsymbolic", *(SANITIZERS if sanitize else []), *map(str, objects), "-ldl"]
    library = KEPT / f"{source.stem}-{_digest(link, objects)}.so"
    _make(library, link)
    return library


def import_library(library: Path) -> ModuleType:
    """The Python module of a library that :func:`build` made."""
    spec = importlib.util.spec_from_file_location(f"{library.stem}.{MODULE}", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def load(source: Path) -> ModuleType:
    """The functions that ``source`` exports, compiled with all checks."""
    return import_library(build(source))


def _arrays(arguments: Sequence[Any]) -> Iterator[np.ndarray]:
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from (item for item in argument if isinstance(item, np.ndarray))


def run(
    module: ModuleType, function: str, *arguments: Any, schedules: Sequence[tuple[str, int]] = SCHEDULES
) -> list[tuple[str, int, int]]:
    """Call ``module.function(*arguments)`` once under each schedule, from the same contents of all arrays.

    Returns:
        (name, bytes read, bytes written) of each array, in the order of the arguments; the arrays hold the results.

    Raises:
        RuntimeError: what the machine found.
        AssertionError: two schedules gave different bits.
    """
    call: Callable[..., list[tuple[str, int, int]]] = getattr(module, function)
    arrays = list(_arrays(arguments))
    before = [array.copy() for array in arrays]
    first: list[bytes] = []
    for order, seed in schedules:
        for array, original in zip(arrays, before, strict=True):
            if array.flags.writeable:
                array[...] = original
        module.set_schedule(order, seed)
        traffic = call(*arguments)
        results = [array.tobytes() for array in arrays]
        for i, (one, other) in enumerate(itertools.zip_longest(first or results, results)):
            assert one == other, f"{function}: array {i} has other bits under schedule {order}, seed {seed}"
        first = first or results
    return traffic
