"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import ops_table
import pytest
import torch

# They need a process of their own, which test_triton_interpreted.py gives them.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton"]


def pytest_configure(config: pytest.Config) -> None:
    """Note what the tests do with the ops, for docs/ops.md, if that was asked for."""
    folder = os.environ.get(ops_table.VARIABLE)
    if folder:
        config.pluginmanager.register(ops_table.Recorder(Path(folder).resolve()), "ops-table")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For maps of a few pixels: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
