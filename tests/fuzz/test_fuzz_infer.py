"""infer.optimize under hypothesis: generators of its parts, and of what it leaves to torch, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from budget import share
from generator_cases import HEAVY, GeneratorCase, Step, check_generator, generators
from hypothesis import example, given
from hypothesis import strategies as st

# Of 3 to 12 layers over few channels, or whole groups of them: what the passes make of the graph, whatever computes it.
SMALL = generators(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 12]), st.sampled_from([1, 2, 3, 4, 5, 6, 16, 16, 32]))
# Of 3×3 convolutions over many channels, around the bounds of their algorithms.
LARGE = generators(
    st.sampled_from([4, 8, 19, 20, 24]), st.sampled_from([3, 64, 64, 67, 96]), 120_000, HEAVY, batches=(1, 1, 2)
)


def conv(read: int, c_out: int, **options: Any) -> Step:
    return Step("conv", (read,), {"c_out": c_out, "kernel": 3, "padding": 1, **options})


@contextmanager
def computed_by(*algorithms: str) -> Iterator[set[str]]:
    """Fails where the body adds none of an algorithm to the set: a choice that is never made is not tested."""
    found: set[str] = set()
    yield found
    missed = [name for name in algorithms if not any((algorithm or "").startswith(name) for algorithm in found)]
    assert not missed, f"no drawn generator reached {', '.join(missed)}"


def test_small_generators() -> None:
    with computed_by("packed_direct", "direct_conv", "torch") as found:

        @share(32)
        @given(SMALL)
        @example(GeneratorCase(inputs=((1, 3, 20, 24),), steps=(conv(0, 20),), outputs=(1,)))
        @example(GeneratorCase(inputs=((1, 16, 8, 8),), steps=(conv(0, 16), conv(1, 4, dilation=2)), outputs=(2,)))
        @example(GeneratorCase(inputs=((2, 4, 4, 4),), steps=(conv(0, 4, groups=4),), outputs=(1,)))
        def draw(case: GeneratorCase) -> None:
            found.update(row.algorithm for row in check_generator(case).rows)

        draw()


def test_large_generators() -> None:
    with computed_by("packed_direct", "winograd", "direct_conv") as found:

        @share(8)
        @given(LARGE)
        @example(GeneratorCase(inputs=((1, 64, 24, 24),), steps=(conv(0, 67), conv(1, 64)), outputs=(2,)))
        @example(GeneratorCase(inputs=((1, 64, 48, 48),), steps=(conv(0, 64),), outputs=(1,)))
        @example(GeneratorCase(inputs=((2, 3, 20, 24),), steps=(conv(0, 20),), outputs=(1,)))
        @example(GeneratorCase(inputs=((1, 64, 8, 8),), steps=(conv(0, 130),), outputs=(1,)))
        @example(GeneratorCase(inputs=((1, 96, 4, 4),), steps=(conv(0, 64),), outputs=(1,)))
        def draw(case: GeneratorCase) -> None:
            found.update(row.algorithm for row in check_generator(case).rows)

        draw()


@pytest.mark.parametrize("layers", [3, 5])
def test_dense_blocks(layers: int) -> None:
    """Large enough for the kernel that shares tiles."""
    options = {"growth": 32, "layers": layers, "scale": 0.2, "bias": True, "ours": False}
    steps = tuple(Step("dense", (i,), options) for i in range(2))
    report = check_generator(GeneratorCase(inputs=((1, 64, 33, 40),), steps=steps, outputs=(2,)))
    assert [row.kind for row in report.rows] == ["dense_block"] * 2
