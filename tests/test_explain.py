"""fastgan.explain of convolutions on the CPU: the algorithm that it names is the one that then runs; the reasons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import CountOps
from test_direct_conv import ALL, run
from torch import Tensor, nn

import fastgan
from fastgan import ops
from fastgan._native import algorithm_calls, winograd_tile_calls
from fastgan.backends import Decision

OURS = {"packed_direct", "few_pixels", "unfolded_conv", "winograd", "direct_conv", "torch"}


@contextmanager
def serving(decision: Decision) -> Iterator[None]:
    """Fails unless exactly one convolution runs in the body, by the algorithm and the tile that were named."""
    calls, tiles = algorithm_calls(), winograd_tile_calls()
    yield
    ran = [name for name, count in algorithm_calls().items() if name in OURS for _ in range(count - calls[name])]
    found = [f" F({m}x{m}, {r}x{r})" for (m, r), count in winograd_tile_calls().items() if count > tiles[m, r]]
    assert [name + "".join(found) for name in ran] == [decision.algorithm]


@pytest.mark.parametrize("precision", ["fp32", "high"])
@pytest.mark.parametrize("name", ALL)
def test_names_what_runs(name: str, precision: str) -> None:
    call, inputs = ALL[name], ALL[name].inputs()
    with fastgan.precision(precision), torch.set_grad_enabled(not call.kept):
        decision = fastgan.explain("scaled_conv2d", **inputs, **call.options)
        with serving(decision):
            run(call, inputs)


def image(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(**options)


def weight(c_out: int, c_in: int, *kernel: int) -> Tensor:
    return image(c_out, c_in, *kernel)


X, W = image(1, 64, 24, 24), weight(64, 64, 3, 3)
X16, W16 = image(1, 16, 24, 24), weight(16, 16, 3, 3)
LAYOUTS = [torch.contiguous_format, torch.channels_last]
LAST = {"memory_format": torch.channels_last}
# A call, the algorithm asked about, and what is said of it.
VERDICTS = {
    "the rule of few pixels": ((image(1, 9, 4, 4), weight(9, 9, 3, 3), 1, {}), "few_pixels", "taken wherever"),
    "a rule comes first": ((image(1, 9, 4, 4), weight(9, 9, 3, 3), 1, {}), "winograd", "not asked: few_pixels comes"),
    "torch takes the rest": ((X.half(), W.half(), 1, {}), "torch", "serves whatever no other does"),
    "pixels": ((X, W, 1, {}), "few_pixels", "it takes at most 32 pixels, got 576"),
    "more pixels": ((X, W, 1, {}), "unfolded_conv", "it takes at most 128 pixels, got 576"),
    "taps of few pixels": ((X, weight(2, 64, 9, 9), 0, {}), "few_pixels", "it takes at most 64 taps, got 81"),
    "taps": ((X, weight(2, 64, 17, 17), 0, {}), "direct_conv", "it takes at most 256 taps, got 289"),
    "taps unfolded": ((X, weight(2, 64, 17, 17), 0, {}), "unfolded_conv", "it takes at most 256 taps, got 289"),
    "double": ((X.double(), W.double(), 1, {}), "winograd", "it takes float32"),
    "half": ((X.half(), W.half(), 1, {}), "winograd", "not what half types are widened to"),
    "groups": ((X, W[:, :32], 1, {"groups": 2}), "winograd", "it takes groups = 1, got 2"),
    "empty": ((X[:0], W, 1, {}), "direct_conv", "x or the weight is empty"),
    "channels_last": ((X.to(**LAST), W, 1, {}), "winograd", "it takes NCHW, got channels_last"),
    "channels_last weight": ((X, W.to(**LAST), 1, {}), "few_pixels", "it takes a contiguous NCHW weight"),
    "strides": ((X, W, 1, {"stride": (1, 2)}), "winograd", "it takes equal strides, got 1 and 2"),
    "dilation": ((X, W, 1, {"dilation": 2}), "winograd", "it takes dilation = 1, got 2 and 2"),
    "dilation of few pixels": ((X, W, 1, {"dilation": (1, 2)}), "few_pixels", "it takes dilation = 1, got 1 and 2"),
    "dilation of a transposed one": ((X, W, 1, {"dilation": 2, "transposed": True}), "unfolded_conv", "no dilation"),
    "not square": ((X, weight(64, 64, 3, 5), 1, {}), "winograd", "it takes square kernels, got 3x5"),
    "taps of a tile": ((X, weight(64, 64, 7, 7), 1, {}), "winograd", "2 to 4 taps per stride, got 7 for stride 1"),
    "too small": ((X16, W16, 1, {}), "winograd", "it costs more per call than the rest would in all"),
    "a tile's time": ((X, W, 1, {}), "winograd F(4x4, 3x3)", "predicted "),
    "torch's time": ((X, W, 1, {}), "torch", "predicted "),
    "channels": ((X16, W16, 1, {}), "direct_conv", "it takes at most 8 channels on one side"),
    "a direct form": ((image(1, 5, 24, 24), weight(64, 5, 3, 3), 1, {}), "direct_conv", "taken wherever"),
    "pixels of a phase": (
        (X16, W16, 1, {"stride": 2, "transposed": True}),
        "direct_conv",
        "it takes this form from 8192 pixels a phase on, got 576",
    ),
    "few transposed weights": (
        (X, W, 1, {"stride": 2, "transposed": True}),
        "unfolded_conv",
        "transposed, it takes weights of at least 4194304 values, got 36864",
    ),
    "a weight of steps": ((X, weight(64, 64, 3, 6)[..., ::2], 1, {}), "winograd", "it takes a weight of dense kernels"),
    "a transposed view": ((X, W.transpose(0, 1), 1, {}), "unfolded_conv", "it takes a contiguous weight"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_every_verdict(name: str) -> None:
    (x, w, padding, options), algorithm, said = VERDICTS[name]
    decision = fastgan.explain(ops.scaled_conv2d, x, w, padding=padding, **options)
    assert said in decision.algorithms[algorithm]
    line = next(line for line in str(decision).splitlines() if line.startswith(f"  {algorithm}"))
    assert said in line
    with serving(decision):
        ops.scaled_conv2d(x, w, padding=padding, **options)


def test_a_refused_tile_says_what_it_would_have_taken() -> None:
    x, w = image(1, 512, 32, 32), weight(512, 512, 3, 3)
    fast = fastgan.explain("scaled_conv2d", x, w, padding=1)
    with fastgan.precision("high"):
        exact = fastgan.explain("scaled_conv2d", x, w, padding=1)
    assert (fast.algorithm, exact.algorithm) == ("winograd F(4x4, 3x3)", "winograd F(2x2, 3x3)")
    predicted = fast.algorithms["winograd F(4x4, 3x3)"]
    refused = "precision high takes tiles of at most 3: its error would not stay within 3x torch's"
    assert exact.algorithms["winograd F(4x4, 3x3)"] == f"{predicted}, but cannot serve: {refused}"


def test_kept_weights_change_the_prediction_and_the_choice() -> None:
    x, w = image(1, 256, 20, 20), nn.Parameter(weight(256, 256, 3, 3))
    anew = fastgan.explain("scaled_conv2d", x, w, padding=1)
    with torch.no_grad():
        again = fastgan.explain("scaled_conv2d", x, w, padding=1)
        with serving(again):
            ops.scaled_conv2d(x, w, padding=1)
    assert anew.algorithms["torch"] == again.algorithms["torch"]
    assert anew.algorithms["winograd F(2x2, 3x3)"] != again.algorithms["winograd F(2x2, 3x3)"]


@pytest.mark.parametrize(
    "options",
    [
        {"padding": (2, 1, 1, 1)},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": (1, 0, 0, 1), "padding_mode": "replicate"},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_explicit_padding_is_part_of_the_call(options: dict[str, Any], layout: torch.memory_format) -> None:
    for x in (image(1, 64, 10, 10), image(1, 128, 40, 40)):
        x = x.contiguous(memory_format=layout)
        w = weight(64, x.shape[1], 3, 3)
        decision = fastgan.explain("scaled_conv2d", x, w, **options)
        with serving(decision):
            ops.scaled_conv2d(x, w, **options)


@pytest.mark.parametrize("energy", [False, True], ids=["", "energy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": (1, 0, 1, 2)},
        {"padding": 1, "flip_weight": False},
        {"up": 2, "padding": 1},
        {"up": 2, "padding": 1, "flip_weight": True},
        {"down": 2, "padding": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_a_modulated_convolution(
    options: dict[str, Any], kernel: int, dtype: torch.dtype, energy: bool, layout: torch.memory_format
) -> None:
    f = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    for c, size in ((12, 4), (130, 10), (256, 24)):
        x, w = image(2, c, size, size, dtype=dtype), nn.Parameter(weight(c, c, kernel, kernel))
        x = x.contiguous(memory_format=layout)
        call = {**options, "resample_filter": f, "weight_energy": ops.weight_energy(w.detach()) if energy else None}
        with torch.no_grad():
            decision = fastgan.explain("modulated_conv2d", x, w, image(2, c), **call)
            with serving(decision):
                ops.modulated_conv2d(x, w, image(2, c), **call)


def test_nothing_is_computed() -> None:
    x, w, style = image(1, 64, 24, 24), weight(64, 64, 3, 3), image(1, 64)
    calls = algorithm_calls()
    with CountOps() as count:
        fastgan.explain("scaled_conv2d", x, w, padding=(1, 0, 1, 0), padding_mode="reflect")
        fastgan.explain("modulated_conv2d", x, w, style, down=2, padding=1, resample_filter=torch.ones(4) / 4)
        fastgan.explain("scaled_conv2d", x.half(), w.half(), padding=1)
    assert algorithm_calls() == calls
    assert count.calls["fastgan._explain_scaled_conv2d"] == 3
    ops_called = {name for name in count.calls if name.startswith("fastgan.")}
    assert ops_called == {"fastgan._explain_scaled_conv2d"}


def test_only_of_the_cpp_backend() -> None:
    for decision in (
        fastgan.explain("scaled_conv2d", X, W, backend="reference"),
        fastgan.explain("scaled_conv2d", X.to("meta"), W.to("meta")),
        fastgan.explain("bias_act", X),
    ):
        assert decision.algorithm is None and decision.algorithms == {}
        assert len(str(decision).splitlines()) == 5


def test_arguments_that_only_the_op_itself_can_be_given() -> None:
    settings = ((1, 1), (1, 1), (0, 0), (1, 1), False, 1)
    explain = torch.ops.fastgan._explain_scaled_conv2d.default
    for x, w in ((X[0], W), (X, W.double()), (X[:, :9], W)):
        assert "torch has to say what is wrong with the arguments" in explain(x, w, *settings, "fp32")
    with pytest.raises(RuntimeError, match="scaled_conv2d: precision must be one of fp32, high, got 'tf32'"):
        explain(X, W, *settings, "tf32")
