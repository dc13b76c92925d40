"""docs/ops.md: that it records what a test did, and no more; and that the committed table is what was recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ops_table
import pytest

from fastgan import ops

TEST = """
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from fastgan import ops

def inputs(dtype):
    return torch.randn(1, 2, 3, 3, dtype=dtype, requires_grad=True), torch.randn(2, 2, 1, 1, dtype=dtype)

def test_value():
    ops.scaled_conv2d(*inputs(torch.bfloat16), backend="reference")

def test_value_then_gradients_elsewhere():
    ops.scaled_conv2d(*inputs(torch.float16), backend="reference")
    x, weight = inputs(torch.float32)
    (x + 1).sum().backward()

@pytest.mark.parametrize("repeat", range(2))
def test_backward(repeat):
    x, weight = inputs(torch.float32)
    ops.scaled_conv2d(x, weight, backend="reference").sum().backward(inputs=[x])

def test_second_order():
    x, weight = inputs(torch.float64)
    function = lambda x: ops.scaled_conv2d(x, weight, backend="reference").square()
    assert gradcheck(function, x) and gradgradcheck(function, x)

def test_other_op():
    ops.bias_act(torch.ones(1, 2), act="relu", backend="reference")

def test_failing():
    x, weight = inputs(torch.float16)
    torch.autograd.grad(ops.scaled_conv2d(x, weight, backend="reference").sum(), x)
    assert False
"""


def test_records_what_passing_tests_did(tmp_path: Path) -> None:
    (tmp_path / "test_scaled_conv2d.py").write_text(TEST)
    root = Path(__file__).resolve().parent.parent
    (tmp_path / "conftest.py").write_text((root / "tests" / "conftest.py").read_text())
    environment = {**os.environ, ops_table.VARIABLE: str(tmp_path / "recorded")}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 failed, 6 passed" in done.stdout, done.stdout + done.stderr
    rows = ops_table.collect(tmp_path / "recorded")
    assert rows == [
        ["scaled_conv2d", "reference", "bfloat16", 0, 1],
        ["scaled_conv2d", "reference", "float16", 0, 1],
        ["scaled_conv2d", "reference", "float32", 0, 2],
        ["scaled_conv2d", "reference", "float32", 1, 2],
        ["scaled_conv2d", "reference", "float64", 0, 1],
        ["scaled_conv2d", "reference", "float64", 1, 1],
        ["scaled_conv2d", "reference", "float64", 2, 1],
    ]
    text = ops_table.render(rows)
    assert "| `scaled_conv2d` | float64 | 2 (1) |" in text
    assert "| `scaled_conv2d` | float32 | 1 (2) |" in text


def test_processes_are_added_up(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text(json.dumps([["fold", "cpp", "float32", 0, 2], ["fold", "cpp", "int64", 0, 1]]))
    (tmp_path / "2.json").write_text(json.dumps([["fold", "cpp", "float32", 0, 3]]))
    assert ops_table.collect(tmp_path) == [["fold", "cpp", "float32", 0, 5]]


def test_nothing_recorded_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["ops_table.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        ops_table.main()
    assert "nothing is recorded" in capsys.readouterr().err


def test_committed_table_is_what_was_recorded() -> None:
    rows = json.loads(ops_table.ROWS.read_text())
    assert ops_table.TABLE.read_text() == ops_table.render(rows), "run make ops-table"


def test_committed_table_has_every_op() -> None:
    """A new op, or one whose tests went, makes the table stale."""
    recorded = {op for op, *_ in json.loads(ops_table.ROWS.read_text())}
    public = {name for name in ops.__all__ if name[0].islower()}
    assert recorded == public, "run make ops-table"
