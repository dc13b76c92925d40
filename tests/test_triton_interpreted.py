"""The tests of tests/triton in a process with TRITON_INTERPRET=1, which must be set before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "triton"


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_under_the_interpreter(file, tmp_path):
    report = tmp_path / "report.xml"
    # A cache of its own: the folder above belongs to the pytest that runs this one.
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(FOLDER / file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    assert 'skipped="0"' in report.read_text(), run.stdout


def test_without_the_variable_the_folder_says_what_is_missing():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "set TRITON_INTERPRET=1" in run.stdout + run.stderr
