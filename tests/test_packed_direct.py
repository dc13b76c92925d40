"""Convolutions of packed weights, with which an inference engine multiplies: every geometry, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed import check, convolve, layer
from quantized import geometry
from torch import Tensor, nn

from fastgan import _native, infer
from fastgan.ops import _into
from tests.helpers import max_error

# Results that fill panels of 6 and end in the midst of them, channels that fill registers and slabs and do not, more
# weights than a chunk holds and several taps in one, taps that meet only padding, phases without a tap.
LAYERS = [
    pytest.param((1, 64, 64, (8, 8), 3), geometry(1, 1), id="3x3"),
    pytest.param((2, 67, 37, (9, 7), 3), geometry(1, 1), id="tails of channels, odd sizes"),
    pytest.param((1, 1, 1, (1, 1), 1), geometry(), id="one value"),
    pytest.param((3, 5, 130, (2, 3), 1), geometry(), id="1x1"),
    pytest.param((1, 600, 70, (3, 3), 3), geometry(1, 1), id="more than one chunk a tap"),
    pytest.param((1, 33, 50, (18, 14), 4), geometry(2, 1), id="4x4 of stride 2"),
    pytest.param((2, 64, 80, (2, 2), 4), geometry(2, 1), id="one pixel, taps in padding alone"),
    pytest.param((1, 20, 48, (6, 6), 5), geometry(3, 2), id="5x5 of stride 3"),
    pytest.param((1, 20, 33, (11, 10), 3), geometry(1, 2) | {"dilation": (2, 2)}, id="dilated"),
    pytest.param((1, 24, 40, (9, 8), 7), geometry(1, 3, reflect=True), id="7x7, mirrored"),
    pytest.param((1, 64, 64, (4, 4), 4), geometry(2, 1, transposed=True), id="transposed 4x4"),
    pytest.param((2, 67, 37, (5, 3), 3), geometry(2, 1, 1, transposed=True), id="transposed 3x3"),
    pytest.param((1, 100, 72, (1, 1), 4), geometry(1, 0, transposed=True), id="one pixel to 4x4"),
    pytest.param((1, 12, 20, (4, 5), 2), geometry(3, 0, transposed=True), id="transposed, phases without a tap"),
    pytest.param((1, 16, 18, (40, 33), 3), geometry(1, 1), id="several blocks of lines"),
]


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "where"), LAYERS)
def test_sums(shape: Any, where: dict[str, Any], storage: str) -> None:
    check(layer(*shape, transposed=where["transposed"]), where, storage)


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("samples", [1, 2])
def test_scales_and_everything_behind_the_sums(samples: int, storage: str) -> None:
    k, where = layer(2, 12, 20, (7, 6), 3), geometry(1, 1)
    k |= {"in_scale": torch.rand(samples, 12) + 0.5, "out_scale": torch.rand(samples, 20) + 0.5}
    k |= {"noise": torch.randn(samples, 1, 7, 6), "noise_strength": torch.tensor(0.3), "bias": torch.randn(20)}
    k |= {"residual": torch.randn(2, 20, 7, 6), "act": "lrelu", "alpha": 0.2, "gain": 1.4, "clamp": 3.0}
    check({**k, "residual_gain": 0.7}, where, storage)


@pytest.mark.parametrize("slice_of", ["channels", "columns"])
def test_reads_a_part_of_an_image(slice_of: str) -> None:
    k, where = layer(2, 40, 20, (6, 12), 3), geometry(1, 1)
    x = k["x"]
    k["x"] = x[:, 8:24] if slice_of == "channels" else x[..., ::2]
    k["weight"] = k["weight"][:, : k["x"].shape[1]].contiguous()
    check(k, where)


@pytest.mark.parametrize("where", [geometry(2, 1), geometry(2, 1, transposed=True)])
def test_threads_change_nothing(where: dict[str, Any]) -> None:
    k = layer(1, 40, 24, (12, 12), 4, transposed=where["transposed"])
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            results.append(convolve(where=where, **k))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_nothing_of_one_sample_reaches_another() -> None:
    k = layer(3, 20, 20, (3, 3), 3)
    k["x"][1, 4, 1, 1] = torch.nan
    finite = convolve(where=geometry(1, 1), **k).isfinite().flatten(1).all(1)
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 4, 6, 6, dtype=torch.float64)}, "takes float32"),
        ({"where": geometry(1, 1, groups=2)}, "takes groups = 1"),
        ({"where": geometry(1, 1) | {"stride": (1, 2)}}, "takes equal strides"),
        ({"where": geometry(1, 1, transposed=True) | {"dilation": (2, 2)}}, "transposed, it takes no dilation"),
        ({"weight": torch.zeros(8, 8, 3, 3)[::2, ::2]}, "a weight of dense kernels"),
        ({"weight": torch.zeros(4, 4, 3, 3).contiguous(memory_format=torch.channels_last)}, "takes NCHW"),
    ],
)
def test_calls_that_it_cannot_serve(change: dict[str, Any], message: str) -> None:
    call = {**layer(1, 4, 4, (6, 6), 3), "where": geometry(1, 1), "out": torch.empty(1, 4, 6, 6), **change}
    with pytest.raises(RuntimeError, match=f"packed_direct cannot serve this call: .*{message}"):
        convolve(**call)


def test_an_engine_chooses_it_where_weights_are_most_of_the_work() -> None:
    """In an engine, whose weights nobody changes: elsewhere they would be packed in every call."""
    model, x = nn.ConvTranspose2d(128, 128, 4, 2, 1), torch.randn(1, 128, 4, 4)
    (row,) = infer.optimize(model, (x,)).report().rows
    assert row.algorithm == "packed_direct" and row.ms > 0
    where = geometry(2, 1, transposed=True)
    names = [name for name, *_ in _into.convolution_candidates(x, model.weight.data, *where.values(), "fp32")]
    assert names[0] == "few_pixels" and "packed_direct" in names


def test_a_frozen_weight_is_packed_once_and_outlives_its_values() -> None:
    library, k, where = _native.cpu_library(), layer(1, 48, 64, (4, 4), 3), geometry(1, 1)
    weight: Tensor = k["weight"]
    library.fastgan_freeze_weight(weight.data_ptr())
    try:
        first = convolve(where=where, **k)
        assert library.fastgan_made_bytes(weight.data_ptr()) == weight.numel() * 4
        assert library.fastgan_drop_weight(weight.data_ptr(), weight.numel() * 4)
        assert torch.equal(convolve(where=where, **k), first)
        with pytest.raises(RuntimeError, match="a weight's values were dropped"):
            convolve(where=where, **{**k, "x": k["x"][..., :1, :1].contiguous()})
    finally:
        library.fastgan_forget_weight(weight.data_ptr())


def test_rounding_of_stored_weights_is_all_that_bf16_adds() -> None:
    k, where = layer(1, 200, 70, (4, 4), 4), geometry(2, 1)
    narrow = convolve(where=where, storage="bf16", **k)
    rounded = {**k, "weight": k["weight"].bfloat16().float()}
    assert max_error(narrow, convolve(where=where, **rounded)) < 1e-6
    assert max_error(narrow, convolve(where=where, **k)) > 1e-4
