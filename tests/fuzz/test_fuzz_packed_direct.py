"""The convolution of packed weights under hypothesis, against float64."""

from __future__ import annotations

from typing import Any

from budget import share
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases_run, threads
from packed import check, layer
from quantized import geometry


@st.composite
def calls(draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    kernel, stride = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    dilation = 1 if transposed else draw(st.integers(1, 2))
    span = dilation * (kernel - 1) + 1
    padding = draw(st.integers(0, kernel - 1))
    output_padding = draw(st.integers(0, stride - 1)) if transposed else 0
    least = 1 + 2 * padding if transposed else max(1, span - 2 * padding)
    sizes = tuple(draw(st.integers(least, least + 9)) for _ in range(2))
    reflect = not transposed and padding < min(sizes) and draw(st.booleans())
    channels = [draw(st.sampled_from([1, 3, 8, 16, 17, 40, 70])) for _ in range(2)]
    k = layer(draw(st.integers(1, 3)), *channels, sizes, kernel, transposed=transposed)
    where = geometry(stride, padding, output_padding, transposed=transposed, reflect=reflect)
    return k, where | {"dilation": (dilation, dilation)}


@share(12)
@given(calls(), st.sampled_from(["fp32", "bf16"]), st.sampled_from([1, 2, 5]))
def test_any_call(call: tuple[dict[str, Any], dict[str, Any]], storage: str, count: int) -> None:
    cases_run["packed_direct"] += 1
    with threads(count):
        check(*call, storage)
