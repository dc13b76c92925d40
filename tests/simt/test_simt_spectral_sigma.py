"""spectral_sigma's CUDA kernel, thread by thread on the CPU: values against float64, layouts, schedules, reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import simt_build
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgan.reference import spectral_sigma as reference

ORDERS = ("parametrization", "hook")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The critic of the models at a quarter of its channels, one row, one column, prime sizes, five dimensions.
SHAPES = [(16, 6, 4, 4), (32, 16, 4, 4), (1, 128, 4, 4), (17, 1), (13, 7, 3, 3), (3, 5, 2, 7, 2)]
ONE_SCHEDULE = [("random", 3)]


def vectors(weights: Sequence[Tensor], dims: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    us = [F.normalize(torch.randn(w.shape[d]), dim=0) for w, d in zip(weights, dims, strict=True)]
    return us, [F.normalize(torch.randn(w.numel() // w.shape[d]), dim=0) for w, d in zip(weights, dims, strict=True)]


def storage(weight: Tensor) -> np.ndarray:
    """All that lies between the first element of ``weight`` and its last, as NumPy has the dtype."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    flat = weight.as_strided((span,), (1,))
    array = (flat.view(torch.uint16) if weight.dtype == torch.bfloat16 else flat).numpy()
    # NumPy says who may be written, and nobody may write a weight.
    array.flags.writeable = False
    return array


def run(weights, us, vs, *, n_iter, order, dims, eps=1e-12, schedules=simt_build.SCHEDULES):
    """σ, new us, new vs and the bytes that were read of each weight."""
    kernels = simt_build.load(Path(__file__).parent / "spectral_sigma.cpp")
    shapes = [n for w, dim in zip(weights, dims, strict=True) for n in (w.ndim, dim, *w.shape, *w.stride())]
    rows, columns = [len(u) for u in us], [len(v) for v in vs]
    sigma, u, v = (np.full(size, np.nan, np.float32) for size in (len(weights), sum(rows), sum(columns)))
    arrays = [storage(w) for w in weights]
    arguments = [arrays, shapes, [x.numpy() for x in us], [x.numpy() for x in vs], n_iter, order == "hook", eps]
    name = str(weights[0].dtype).removeprefix("torch.")
    traffic = simt_build.run(kernels, name, *arguments, sigma, u, v, schedules=schedules)
    read = [entry[1] for entry in traffic[: len(weights)]]
    split = torch.from_numpy(u).split(rows), torch.from_numpy(v).split(columns)
    return torch.from_numpy(sigma), *map(list, split), read


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


def check(weights, dims, *, n_iter, order, schedules=simt_build.SCHEDULES) -> list[int]:
    """The rule of accuracy, against float64 and eager torch; returns the bytes that were read of each weight."""
    us, vs = vectors(weights, dims)
    options = {"n_iter": n_iter, "order": order, "dims": dims}
    exact = [[x.double() for x in group] for group in (weights, us, vs)]
    want = reference.spectral_sigma(*exact, eps=1e-12, **options)
    eager = reference.spectral_sigma(weights, us, vs, eps=1e-12, **options)
    # Without iterations σ of random vectors is a sum that cancels: measured against |u|ᵀ |W| |v|.
    positive = [[x.abs() for x in group] for group in exact]
    bounds = reference.spectral_sigma(*positive, eps=1e-12, **options)[0]
    sigma, new_us, new_vs, read = run(weights, us, vs, schedules=schedules, **options)
    for i, weight in enumerate(weights):
        scale = float(bounds[i] / want[0][i].abs()) if n_iter == 0 else 1.0
        allowed = 2 * error(eager[0][i : i + 1], want[0][i : i + 1]) + 4e-7 * scale
        assert error(sigma[i : i + 1], want[0][i : i + 1]) <= allowed, (i, weight.shape, weight.stride())
        for got, plain, true in ((new_us, eager[1], want[1]), (new_vs, eager[2], want[2])):
            assert error(got[i], true[i]) <= 2 * error(plain[i], true[i]) + 16e-7, (i, weight.shape, weight.stride())
    return read


def layouts(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    weight = torch.randn(shape).to(dtype)
    # Every second image column of a wider tensor with one row, so that the other axes still are one run.
    sliced = torch.randn(*shape[:2], 2 * shape[2] * shape[3]).to(dtype)[..., 1::2].unflatten(2, shape[2:])
    last = weight.contiguous(memory_format=torch.channels_last)
    return [weight, weight.clone()[:, :1].expand(shape), sliced, last]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("dtype", "n_iter"), [(d, n) for d in DTYPES for n in (0, 1)] + [(torch.float32, 3)])
def test_values_of_every_layout_in_one_launch(dtype: torch.dtype, n_iter: int, order: str) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES] + layouts((16, 8, 3, 3), dtype)
    dims = [0] * len(weights)
    weights += [torch.randn(8, 16, 4, 4).to(dtype), *layouts((8, 12, 2, 2), dtype), torch.randn(40, 24).to(dtype).t()]
    dims += [1] * (len(weights) - len(dims) - 1) + [0]
    check(weights, dims, n_iter=n_iter, order=order, schedules=simt_build.SCHEDULES[:3])


@pytest.mark.parametrize("order", ORDERS)
def test_several_blocks_and_groups_read_each_weight_once(order: str) -> None:
    torch.manual_seed(1)
    weights = [torch.randn(150, 38, 4, 4), torch.randn(96, 64, 3, 3), torch.randn(24, 210, 4, 4)]
    for dtype in (torch.float32, torch.bfloat16):
        typed = [w.to(dtype) for w in weights]
        read = check(typed, [0, 0, 1], n_iter=1, order=order, schedules=ONE_SCHEDULE)
        assert read == [w.numel() * w.element_size() for w in typed]


@pytest.mark.parametrize(("shape", "times"), [((3, 8000), 1), ((2, 30011), 2), ((2, 30016), 2), ((30011, 2), 1)])
def test_a_long_row_is_read_once_where_a_tile_holds_it(shape: tuple[int, int], times: int) -> None:
    torch.manual_seed(2)
    weight = torch.randn(shape)
    assert check([weight], [0], n_iter=1, order="parametrization", schedules=ONE_SCHEDULE) == [
        times * weight.numel() * 4
    ]
    assert check([weight], [0], n_iter=0, order="parametrization", schedules=ONE_SCHEDULE) == [weight.numel() * 4]


def test_more_layers_than_a_launch_takes() -> None:
    torch.manual_seed(3)
    weights = [torch.randn(3 + i, 5) for i in range(30)]
    check(weights, [0] * 30, n_iter=2, order="parametrization")


@pytest.mark.parametrize("order", ORDERS)
def test_degenerate_weights(order: str) -> None:
    torch.manual_seed(4)
    weights = [torch.randn(6, 5), torch.zeros(4, 3), torch.full((2, 3), float("nan")), torch.randn(3, 8) * 1e-18]
    us, vs = vectors(weights, [0] * 4)
    options = {"n_iter": 1, "order": order, "dims": [0] * 4}
    want = reference.spectral_sigma(weights, us, vs, eps=1e-12, **options)
    sigma, new_us, new_vs, _ = run(weights, us, vs, **options)
    assert sigma[1] == 0
    torch.testing.assert_close([sigma, new_us, new_vs], list(want), equal_nan=True)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4), min_size=1, max_size=4),
    wide=st.integers(1, 300),
    data=st.data(),
)
def test_drawn_shapes(shapes: list[list[int]], wide: int, data: st.DataObject) -> None:
    torch.manual_seed(5)
    dtype = data.draw(st.sampled_from(DTYPES))
    shapes[0][data.draw(st.integers(0, len(shapes[0]) - 1))] = wide
    weights, dims = [], []
    for shape in shapes:
        order = data.draw(st.permutations(range(len(shape))))
        weight = torch.randn([shape[i] for i in order]).to(dtype).permute([order.index(i) for i in range(len(shape))])
        dim = data.draw(st.integers(0, len(shape) - 1))
        if len(shape) == 4 and not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
            weight = weight.contiguous()
        weights.append(weight)
        dims.append(dim)
    options = {"n_iter": data.draw(st.integers(0, 2)), "order": data.draw(st.sampled_from(ORDERS))}
    check(weights, dims, schedules=[("forward", 0), ("random", data.draw(st.integers(0, 99)))], **options)
