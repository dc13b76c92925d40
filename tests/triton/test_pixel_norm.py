"""pixel_norm on Triton, under its interpreter: value, gradient and second order against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastgan
from fastgan import ops
from fastgan.kernels import _launch
from fastgan.kernels import pixel_norm as kernel
from tests.helpers import assert_close_to_float64, gradients, layouts

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 70, 9, 8), (1, 4100, 1, 2)])
def test_accuracy(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Value and gradient in every layout; channels that fit a tile, and that take two reads."""
    for name, x in layouts(image(*shape).to(dtype)).items():
        exact = gradients(lambda x: ops.pixel_norm(x, backend="reference"), [x.double()])
        fused = gradients(lambda x: ops.pixel_norm(x, backend="triton"), [x])
        plain = gradients(lambda x: ops.pixel_norm(x, backend="reference"), [x])
        for got, other, want in zip(fused, plain, exact, strict=True):
            assert_close_to_float64(got, other, want, floor=FLOOR[dtype], what=name)


def test_both_ways_of_reading_are_tested() -> None:
    one_tile = {
        kernel.plan(image(*s).float(), None, 1, 1e-8)[1].constants["ONE_TILE"] for s in ((2, 3, 5, 7), (1, 4100, 1, 2))
    }
    assert one_tile == {True, False}


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 3, 2)])
def test_along_every_dimension(shape: tuple[int, ...]) -> None:
    x = image(*shape).float()
    for dim in range(len(shape)):
        got, want = (ops.pixel_norm(x, dim=dim, eps=0.1, backend=name) for name in ("triton", "reference"))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_second_order(layout: str) -> None:
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        x = layouts(image(2, 3, 2, 3).to(dtype))[layout].requires_grad_()
        (first,) = torch.autograd.grad((ops.pixel_norm(x, backend=backend) ** 3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((first**3).sum(), x)[0])
    assert_close_to_float64(results[0], results[0], results[1], floor=1e-5)


def test_one_launch_each_way() -> None:
    x = image(2, 3, 4, 5).half().requires_grad_()
    with _launch.recorded() as launches:
        ops.pixel_norm(x).sum().backward()
    assert [launch.kernel for launch in launches] == [kernel.pixel_norm_kernel] * 2
    assert [launch.bytes for launch in launches] == [2 * 2 * 120, 3 * 2 * 120]
    assert ops.pixel_norm(torch.empty(0, 3), backend="triton").shape == (0, 3)


def test_zeros_and_nan() -> None:
    assert not ops.pixel_norm(torch.zeros(2, 4), backend="triton").any()
    x = image(2, 3, 2, 2).float()
    x[1, 1, 1, 0] = torch.nan
    y = ops.pixel_norm(x, backend="triton")
    assert y[1, :, 1, 0].isnan().all() and y.isnan().sum() == 3


def test_opcheck_and_choice() -> None:
    x = image(2, 3, 2, 2).float().requires_grad_()
    torch.library.opcheck(torch.ops.fastgan.pixel_norm.default, (x, 1, 1e-8))
    torch.library.opcheck(torch.ops.fastgan.pixel_norm_grad.default, (torch.randn_like(x), x, 1, 1e-8))
    assert fastgan.explain("pixel_norm", x).backend == "triton"


def test_shipped_launches_are_planned() -> None:
    for label, launches in kernel.shipped():
        assert len(launches) == 1 and launches[0].bytes > 0, label
