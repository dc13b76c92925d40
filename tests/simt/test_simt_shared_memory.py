"""The shared memory that gpu-report counts for a kernel is what its launches ask for."""

from __future__ import annotations

import subprocess
from pathlib import Path

from simt_build import CSRC, compiler

from fastgan.profile.cuda_code import DYNAMIC_SHARED


def test_the_report_knows_what_launches_ask_for(tmp_path: Path) -> None:
    program = tmp_path / "shared_memory"
    source = Path(__file__).parent / "shared_memory.cpp"
    subprocess.run([*compiler(), "-std=c++20", f"-I{CSRC}", str(source), "-o", str(program)], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    assert {name: int(size) for name, size in (line.split("\t") for line in lines)} == DYNAMIC_SHARED
