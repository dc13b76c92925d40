"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ops_table
import pytest
import torch

# They need a process of their own, which test_triton_interpreted.py gives them.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton"]


def pytest_configure(config: pytest.Config) -> None:
    """Note what the tests do with the ops, for docs/ops.md, if that was asked for."""
    config.fuzz_cases = Counter()
    folder = os.environ.get(ops_table.VARIABLE)
    if folder:
        config.pluginmanager.register(ops_table.Recorder(Path(folder).resolve()), "ops-table")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended."""
    node.config.fuzz_cases.update(getattr(node, "workeroutput", {}).get("fuzz", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How many cases tests/fuzz held to float64."""
    if config.fuzz_cases:
        parts = ", ".join(f"{name} {count}" for name, count in config.fuzz_cases.most_common())
        terminalreporter.write_line(f"fuzz: {config.fuzz_cases.total()} cases ({parts})")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For maps of a few pixels: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
