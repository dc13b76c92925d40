"""Kernels under AddressSanitizer, which is told of every change of fibres, and UBSan: planted bugs and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import simt_build

FOLDER = Path(__file__).parent
# Kernel of planted.cpp -> what the sanitizer has to say of its bug.
SAYS = {
    "global_overrun": "heap-buffer-overflow",
    "shared_pointer": "use-after-poison",
    "misaligned_vector": "misaligned address",
    "shared_index": "index 9 out of bounds for type 'float [9]'",
}


@pytest.fixture(scope="module")
def library() -> Path:
    return simt_build.build(FOLDER / "planted.cpp", sanitize=True)


def call(program: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a program of this folder in a process that preloads the sanitizers' libraries."""
    # libstdc++ as well: the sanitizer looks for its __cxa_throw when the process starts, and Python does not bring it.
    preloaded = [
        subprocess.run(
            [*simt_build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    # Python and NumPy keep memory to the end by intent.
    environment = os.environ | {"LD_PRELOAD": ":".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, str(FOLDER / program), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", SAYS)
def test_a_planted_bug_is_reported(library: Path, name: str) -> None:
    done = call("sanitized_call.py", str(library), name, "1")
    assert done.returncode != 0
    assert "came to its end" not in done.stdout
    assert SAYS[name] in done.stderr, done.stderr
    # The report names the line of the kernel, on the stack of its fibre.
    assert "planted.cpp:" in done.stderr


@pytest.mark.parametrize("name", [*SAYS, "missing_second_barrier", "copy_not_awaited", "producer_and_consumer"])
def test_the_corrected_twin_is_not(library: Path, name: str) -> None:
    done = call("sanitized_call.py", str(library), name, "0")
    assert (done.returncode, done.stdout) == (0, "came to its end\n"), done.stderr


def test_a_real_kernel_is_not() -> None:
    done = call("sanitized_call.py", str(simt_build.build(FOLDER / "spectral_sigma.cpp", sanitize=True)))
    assert (done.returncode, done.stdout) == (0, "came to its end\n"), done.stderr
