"""pixel_dot on Triton, under its interpreter: every layout of both operands, splits, and the same bits every time."""

from __future__ import annotations

import itertools

import pytest
import torch
from fastgan.kernels._launch import recorded

from fastgan.kernels import _tiles
from fastgan.ops.pixel_dot import pixel_dot


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "NCHW": x.contiguous(),
        "NHWC": x.contiguous(memory_format=torch.channels_last),
        "sliced": torch.cat([x, x], 3)[..., : x.shape[3]],
        "expanded": x[:1, :, :1].expand_as(x),
    }


@pytest.mark.parametrize("shape", [(2, 5, 7, 11), (1, 1, 3, 2), (3, 70, 1, 1)], ids=str)
def test_layouts_against_float64(shape):
    pairs = itertools.product(layouts(torch.randn(shape)).values(), layouts(torch.randn(shape)).values())
    for dtype, (a, b) in zip(itertools.cycle([torch.float32, torch.float16, torch.bfloat16]), pairs, strict=False):
        a = a.to(dtype)
        got, want = pixel_dot(a, b), (a.double() * b.double()).sum((2, 3))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_split_pixels_give_the_same_bits_every_time(monkeypatch):
    monkeypatch.setattr(_tiles, "BUSY", 4)
    a, b = torch.randn(1, 3, 67, 129), torch.randn(1, 3, 67, 129)
    with recorded() as launches:
        first, second = pixel_dot(a, b), pixel_dot(a, b)
    assert [launch.kernel.__name__ for launch in launches] == ["pixel_dot_kernel", "sum_parts_kernel"] * 2
    assert torch.equal(first, second)
    torch.testing.assert_close(first.double(), (a.double() * b.double()).sum((2, 3)), rtol=1e-5, atol=1e-4)


def test_empty():
    assert pixel_dot(torch.empty(0, 3, 4, 4), torch.empty(0, 3, 4, 4)).shape == (0, 3)


def test_second_order():
    a, b = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5, requires_grad=True)
    (first,) = torch.autograd.grad(pixel_dot(a, b).square().sum(), a, create_graph=True)
    got = torch.autograd.grad(first.square().sum(), (a, b))
    a64, b64 = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    (first,) = torch.autograd.grad((a64 * b64).sum((2, 3)).square().sum(), a64, create_graph=True)
    want = torch.autograd.grad(first.square().sum(), (a64, b64))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)
