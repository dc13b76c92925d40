"""What every drawn call is held to: float64's value and gradients, and the inputs left as they were.

A case is a frozen dataclass whose repr is the call: what hypothesis prints for a failing one replays it,

    PYTHONPATH=tests:tests/fuzz python -c "from conv_cases import *; check(ConvCase(...))"
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from helpers import assert_close_to_float64, max_error
from torch import Tensor

from fastgan._native import algorithm_calls

# What is left when both errors are a few roundings, relative to the largest element; half types are rounded once.
FLOORS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROUNDING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Of a result of Winograd's filtering, whatever eager torch's own error is.
WINOGRAD = 1e-5
# A result that changes when its inputs are rounded cannot be more exact than that change: sums that cancel, a
# normalisation of two values. The change is sampled, and of a few elements one sample may be small by luck. Measured:
# the gradient of a scale that 30,000 values share, a sum that cancels to a fifth, had an error of 8 samples' change.
CONDITION = 16.0
FEW_ELEMENTS, SAMPLES_OF_FEW = 16, 3
KINKS = {"relu", "lrelu", "selu"}
# elu's second derivative jumps at 0, and the others' have jumped already.
KINKS_OF_ORDER_2 = {*KINKS, "elu"}

Named = dict[str, Tensor]
cases_run: Counter[str] = Counter()


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One call of an op."""

    dtype: torch.dtype = torch.float32
    threads: int = 1
    order: int = 1  # 0: the value; 1: gradients too; 2: and those of the gradients
    seed: int = 0

    @abstractmethod
    def inputs(self) -> Named:
        """The tensors that gradients are for, in the case's dtype and layouts; the same at every call."""

    @abstractmethod
    def call(self, tensors: Named, backend: str) -> Tensor | tuple[Tensor, ...]:
        """The op; of several results the first is differentiated."""

    def kinks(self, tensors: Named) -> list[Tensor]:
        """From float64 tensors: values that are zero where the op's slope jumps; see :func:`near_kink`."""
        return []


def random(shape: Sequence[int], seed: int) -> Tensor:
    """Normal values that float32 holds, in float64."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).double()


def evaluate(case: Case, inputs: Named, backend: str, order: int, jitter: Callable[[Tensor], Tensor]) -> Named:
    """Results and, up to ``order``, gradients by name. ``jitter`` is applied to each cotangent."""
    leaves = {name: t.detach().requires_grad_(order > 0) for name, t in inputs.items()}
    results = case.call(leaves, backend)
    y, *others = results if isinstance(results, tuple) else (results,)
    found = {"y": y} | {f"result {i + 1}": t for i, t in enumerate(others)}

    def cotangent(like: Tensor, seed: int) -> Tensor:
        # Rounded to the case's dtype first: the same values for all who are compared.
        return jitter(random(like.shape, seed).to(case.dtype).to(like.dtype))

    if order > 0:
        g = cotangent(y, case.seed + 1).requires_grad_(order > 1)
        grads = torch.autograd.grad(y, list(leaves.values()), g, create_graph=order > 1)
        found |= {f"grad {name}": t for name, t in zip(leaves, grads, strict=True)}
    if order > 1:
        inner = sum((t * cotangent(t, case.seed + 2 + i)).sum() for i, t in enumerate(grads))
        wanted = leaves | {"cotangent": g}
        grads = torch.autograd.grad(inner, list(wanted.values()), allow_unused=True, materialize_grads=True)
        found |= {f"second grad {name}": t for name, t in zip(wanted, grads, strict=True)}
    return {name: t.detach() for name, t in found.items()}


def near_kink(case: Case, inputs: Named, distance: float) -> bool:
    """Whether rounding may decide on which side of a kink some value lies: its slope then is not compared."""
    values = case.kinks({name: t.double() for name, t in inputs.items()})
    return any(bool((t.abs() <= distance * t.abs().max().clamp_min(1.0)).any()) for t in values if t.numel())


def check(case: Case) -> None:
    """Hold one case to the rule of accuracy of tests/helpers.py, to float64's conditioning and to its inputs."""
    cases_run[type(case).__name__] += 1
    inputs = case.inputs()
    before = {name: t.clone() for name, t in inputs.items()}
    order = case.order
    if order and near_kink(case, inputs, 8 * ROUNDING[case.dtype] + WINOGRAD):
        order = 0
    winograd = algorithm_calls()["winograd"]
    with threads(case.threads):
        fused = evaluate(case, inputs, "cpp", order, torch.clone)
    winograd = algorithm_calls()["winograd"] - winograd
    for name, t in inputs.items():
        assert torch.equal(t, before[name]), f"{name} was written to"
    eager = evaluate(case, inputs, "reference", order, torch.clone)
    wide = {name: t.double().contiguous() for name, t in inputs.items()}
    exact = evaluate(case, wide, "reference", order, torch.clone)

    generator = torch.Generator().manual_seed(case.seed)

    def jitter(t: Tensor) -> Tensor:
        signs = torch.randint(0, 2, t.shape, generator=generator) * 2 - 1
        return t * (1 + signs * ROUNDING[case.dtype])

    samples = SAMPLES_OF_FEW if any(0 < t.numel() < FEW_ELEMENTS for t in exact.values()) else 1
    moved = [
        evaluate(case, {name: jitter(t) for name, t in wide.items()}, "reference", order, jitter)
        for _ in range(samples)
    ]
    for name, value in exact.items():
        floor = FLOORS[eager[name].dtype] if case.dtype == torch.float32 else FLOORS[case.dtype]
        floor = (WINOGRAD if winograd else floor) * (2 if name.startswith("second") else 1)
        floor += CONDITION * max(max_error(sample[name], value) for sample in moved)
        assert_close_to_float64(fused[name], eager[name], value, floor=floor, what=name)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads, and the former number again."""
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


@contextmanager
def reaching(*algorithms: str) -> Iterator[None]:
    """Fails if the body leaves one of ``algorithms`` unused: a choice that is never made is not tested."""
    before = algorithm_calls()
    yield
    after = algorithm_calls()
    missed = [name for name in algorithms if after[name] == before[name]]
    assert not missed, f"no drawn case reached {', '.join(missed)}"
