"""The memory plan: no two values overlap in memory and in time, and the plan is close to what has to live."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan.infer.memory import ALIGNMENT, Span, most_alive, place

SPANS = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 30), st.integers(0, 10)).map(
        lambda t: Span(t[0], t[1], t[1] + t[2])
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(SPANS)
def test_no_overlap(spans: list[Span]) -> None:
    total = place(spans)
    for i, a in enumerate(spans):
        assert a.offset >= 0 and a.offset % ALIGNMENT == 0 and a.offset + a.bytes <= total
        for b in spans[:i]:
            together = a.first <= b.last and b.first <= a.last
            apart = a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
            assert not together or apart
    assert total >= most_alive(spans)
    assert total <= sum(span.bytes + ALIGNMENT for span in spans)


def test_a_chain_needs_two_places() -> None:
    """Each layer reads the image before it."""
    spans = [Span(640, i, i + 1) for i in range(10)]
    assert place(spans) == most_alive(spans) == 1280
    assert [span.offset for span in spans] == [0, 640] * 5


def test_a_large_value_goes_where_small_ones_were() -> None:
    spans = [Span(64, 0, 1), Span(64, 0, 1), Span(128, 2, 3)]
    assert place(spans) == 128
    assert spans[2].offset == 0


def test_nothing_needs_nothing() -> None:
    assert place([]) == most_alive([]) == 0
