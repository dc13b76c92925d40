"""What a benchmark is: inputs, the same computation by several candidates, and the work that it must at least do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgan.profile.latency import BURST_SECONDS, Work, passes

BASELINE = "eager"


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    Attributes:
        op: the op's name.
        name: the shape, for people; unique within the op.
        inputs: makes fresh inputs; gradients are for those that require grad (lists are looked into).
        candidates: name -> function of the inputs, returning one tensor.
        work: what each pass must at least read, write and compute, by hand; a pass without an entry has no roofline.
        double: also time the double backward.
        layout, dtype: recorded with the row.
        baselines: the candidates that the others are compared with; of several, the fastest.
        warmup, min_rounds: calls before a measurement and rounds of it, however long they take.
        memory: also measure peak memory, which takes two more calls.
        burst: seconds that a sample takes at least, in calls one after another.
    """

    op: str
    name: str
    inputs: Callable[[], list[Any]]
    candidates: Mapping[str, Callable[..., Tensor]]
    work: Mapping[str, Work] = field(default_factory=dict)
    double: bool = False
    layout: str = "contiguous"
    dtype: str = "float32"
    baselines: tuple[str, ...] = (BASELINE,)
    warmup: int = 2
    min_rounds: int = 5
    memory: bool = True
    burst: float = BURST_SECONDS

    @property
    def pass_names(self) -> list[str]:
        return ["fwd", "bwd", "fwd+bwd", *(["double bwd"] if self.double else [])]

    def passes(self, candidate: str) -> dict[str, Callable[[], object]]:
        """name of the pass -> a function to time; all candidates see the same values.

        What a function has in its attribute ``facts``, a dictionary, goes into its row.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inputs = self.inputs()
        return passes(self.candidates[candidate], inputs, double=self.double)


def parametrize(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """``case``, ``candidate`` and ``which`` (a pass) for a ``bench_`` function under pytest-benchmark."""
    found = [
        pytest.param(case, candidate, which, id=f"{case.name}-{which}-{candidate}")
        for case in cases
        for which in case.pass_names
        for candidate in case.candidates
    ]
    return pytest.mark.parametrize(("case", "candidate", "which"), found)


def run(benchmark: Any, case: Case, candidate: str, which: str) -> None:
    """Time one pass of one candidate with pytest-benchmark, grouped so that candidates stand side by side."""
    benchmark.group = f"{case.op} {case.name}: {which}"
    benchmark.extra_info.update(op=case.op, case=case.name, layout=case.layout, dtype=case.dtype, which=which)
    benchmark(case.passes(candidate)[which])
