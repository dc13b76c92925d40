"""Says at the end how many cases were held to float64."""

from __future__ import annotations

import time

import pytest
from oracle import cases_run

_started = time.perf_counter()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if cases_run:
        seconds = time.perf_counter() - _started
        parts = ", ".join(f"{name} {count}" for name, count in cases_run.most_common())
        terminalreporter.write_line(f"fuzz: {cases_run.total()} cases in {seconds:.0f} s ({parts})")
