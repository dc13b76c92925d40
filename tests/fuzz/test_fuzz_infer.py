"""infer.optimize under hypothesis: generators of its parts, and of what it leaves to torch, against float64."""

from __future__ import annotations

from budget import share
from generator_cases import LARGE, GeneratorCase, check_generator, generators
from hypothesis import given
from hypothesis import strategies as st

SIDES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 12])


@share(32)
@given(generators(SIDES, st.integers(1, 6)))
def test_small(case: GeneratorCase) -> None:
    check_generator(case)


@share(8)
@given(generators(st.sampled_from([4, 8, 13, 20, 33]), st.sampled_from([3, 16, 64, 67, 96, 128]), most=LARGE))
def test_large(case: GeneratorCase) -> None:
    check_generator(case)


STRATEGIES = {
    "small": generators(SIDES, st.integers(1, 6)),
    "large": generators(st.sampled_from([4, 8, 13, 20, 33]), st.sampled_from([3, 16, 64, 67, 96, 128]), most=LARGE),
}
