"""Where every value of a graph lies: one block of memory for all, in which what is dead makes room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# A cache line: no two values share one.
ALIGNMENT = 64


@dataclass
class Span:
    """A value's memory: ``bytes`` of it from step ``first`` to step ``last``, both included."""

    bytes: int
    first: int
    last: int
    offset: int = field(default=-1)


def place(spans: Sequence[Span]) -> int:
    """Give every span its offset, so that no two overlap in memory and in time; returns the bytes that they need.

    The largest first, each at the lowest place that is free for as long as it lives: "greedy by size".

    Source: Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020, section 5.2.
    """
    placed: list[Span] = []
    for span in sorted(spans, key=lambda span: (-span.bytes, span.first)):
        size = _rounded(span.bytes)
        offset = 0
        alive = [other for other in placed if other.first <= span.last and span.first <= other.last]
        for other in sorted(alive, key=lambda other: other.offset):
            if other.offset - offset >= size:
                break
            offset = max(offset, other.offset + _rounded(other.bytes))
        span.offset = offset
        placed.append(span)
    return max((span.offset + _rounded(span.bytes) for span in spans), default=0)


def most_alive(spans: Sequence[Span]) -> int:
    """The bytes that live at the same time at worst: no plan needs less."""
    steps = {span.first for span in spans}
    return max((sum(s.bytes for s in spans if s.first <= step <= s.last) for step in steps), default=0)


def _rounded(count: int) -> int:
    return (count + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
