"""Tells tests/conftest.py how many cases were held to float64, from a worker of pytest-xdist or not."""

from __future__ import annotations

import pytest
from oracle import cases_run


def pytest_sessionfinish(session: pytest.Session) -> None:
    worker = getattr(session.config, "workeroutput", None)
    if worker is None:
        session.config.fuzz_cases.update(cases_run)
    else:
        worker["fuzz"] = dict(cases_run)
