"""The convolution of whole numbers under hypothesis: every tile that serves a call sums exactly."""

from __future__ import annotations

from typing import Any

from budget import share
from hypothesis import given
from hypothesis import strategies as st
from oracle import cases_run, threads
from quantized import check, geometry, layer

from fastgan.infer.quantize import Steps


@st.composite
def calls(draw: Any) -> tuple[dict[str, Any], dict[str, Any], Steps]:
    kernel, stride = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (3, 2), (4, 2), (5, 2), (6, 2)]))
    transposed = draw(st.booleans())
    padding = draw(st.integers(0, kernel - 1))
    output_padding = draw(st.integers(0, stride - 1)) if transposed else 0
    least = 1 + padding if transposed else max(1, kernel - 2 * padding)
    sizes = tuple(draw(st.integers(least, least + 9)) for _ in range(2))
    channels = [draw(st.sampled_from([1, 3, 8, 16, 17, 40])) for _ in range(2)]
    k = layer(draw(st.integers(1, 2)), *channels, sizes, kernel, transposed=transposed)
    low = -draw(st.integers(0, 255))
    steps = Steps(draw(st.floats(1e-3, 0.1)), low, low + 255 if low > -255 else 0)
    return k, geometry(stride, padding, output_padding, transposed=transposed), steps


@share(12)
@given(calls(), st.sampled_from([1, 2, 5]))
def test_any_call(call: tuple[dict[str, Any], dict[str, Any], Steps], count: int) -> None:
    cases_run["quantized_conv2d"] += 1
    with threads(count):
        check(*call)
