"""Adds what fastgan knows about the machine to pytest-benchmark's JSON."""

from __future__ import annotations

from typing import Any

from fastgan.profile.latency import environment


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["fastgan"] = environment()
