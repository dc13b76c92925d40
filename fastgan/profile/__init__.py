"""Parity, latency and reports: what fastgan's layers compute and cost on the device at hand."""

from fastgan.profile.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
