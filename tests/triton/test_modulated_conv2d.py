"""modulated_conv2d on Triton, under its interpreter: its scales, the whole, launches, and both orders.

What the interpreter cannot show of the convolution is said in test_scaled_conv2d.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastgan
from fastgan import ops
from fastgan.kernels import _launch
from fastgan.kernels import demodulation as kernel
from fastgan.ops.demodulation import demodulation
from fastgan.reference.modulated_conv2d import modulation_scales
from tests.helpers import assert_close_to_float64, gradients

# Two taps: the interpreter takes a while for each. Four have a test of their own in test_upfirdn2d.py.
FIR = torch.tensor([1.0, 3.0]) / 4
KINDS = ["none", "stylegan2_fp16", "stylegan3"]
# A half type rounds the weight, the product's operands and two results.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def operands(n: int = 2, i: int = 5, o: int = 4, kernel: int = 3, size: tuple[int, int] = (3, 4)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, i, *size), (o, i, kernel, kernel), (n, i))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kernel_size", "dtype"), [(3, torch.float32), (1, torch.bfloat16), (3, torch.float16)])
def test_demodulation(kind: str, kernel_size: int, dtype: torch.dtype) -> None:
    """Both scales and their gradients; weights of both layouts, a zero row of the weight and of the style."""
    _, weight, style = operands(n=3, i=37, o=11, kernel=kernel_size)
    weight, style = weight.to(dtype), style.float()
    weight[2], style[1] = 0, 0

    def reference(w: Tensor, s: Tensor) -> Tensor:
        scales = modulation_scales(w, s, demodulate=True, eps=1e-2, prenormalize=kind, input_gain=None)
        return torch.cat([t.reshape(-1) for t in scales])

    def fused(w: Tensor, s: Tensor) -> Tensor:
        return torch.cat([t.reshape(-1) for t in demodulation(w, s, prenormalize=kind, eps=1e-2)])

    want = gradients(reference, [weight.double(), style.double()])
    plain = gradients(reference, [weight, style])
    for layout in (torch.contiguous_format, torch.channels_last):
        got = gradients(fused, [weight.contiguous(memory_format=layout), style])
        for name, g, p, w in zip(("scales", "weight", "style"), got, plain, want, strict=True):
            assert_close_to_float64(g, p, w, floor=2e-6 if dtype == torch.float32 else None, what=name)


@pytest.mark.parametrize("kind", KINDS)
def test_demodulation_to_second_order(kind: str) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        _, weight, style = (t.to(dtype).requires_grad_() for t in operands(n=3, i=4, o=5))
        if dtype == torch.float32:
            scales = demodulation(weight, style, prenormalize=kind, eps=0.1)
        else:
            scales = modulation_scales(weight, style, demodulate=True, eps=0.1, prenormalize=kind, input_gain=None)
        first = torch.autograd.grad(sum((t**3).sum() for t in scales), (weight, style), create_graph=True)
        results.append(torch.autograd.grad(sum((g**3).sum() for g in first), (weight, style)))
    for got, want in zip(*results, strict=True):
        assert_close_to_float64(got, got, want, floor=1e-5)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize(
    ("kind", "dtype", "layout"),
    [
        ("none", torch.float32, torch.contiguous_format),
        ("stylegan3", torch.bfloat16, torch.channels_last),
        ("stylegan2_fp16", torch.float16, torch.channels_last),
    ],
)
def test_accuracy(up: int, down: int, kind: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Value and gradients of x, weight, style, noise and bias.

    Half types where the result is smooth: x · style is rounded for the tensor cores, and a value that passes lrelu's
    kink with that changes a gradient by all of it.
    """
    act = "lrelu" if dtype == torch.float32 else "softplus"
    x, weight, style = operands(size=(4, 4))
    size = (4 * up // down, 4 * up // down)
    noise, bias = torch.randn(size, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    x = x.to(dtype)

    def function(x, weight, style, noise, bias, backend: str) -> Tensor:
        return ops.modulated_conv2d(
            x, weight, style, up=up, down=down, padding=1, resample_filter=FIR, prenormalize=kind, eps=1e-4,
            epilogue=ops.Epilogue(noise=noise, noise_strength=0.3, bias=bias, act=act), backend=backend,
        )  # fmt: skip

    wide = [t.float() for t in (weight, style, noise, bias)]
    exact = gradients(lambda *t: function(*t, backend="reference"), [x.double(), *[t.double() for t in wide]])
    plain = gradients(lambda *t: function(*t, backend="reference"), [x, *wide])
    fused = gradients(lambda *t: function(*t, backend="triton"), [x.contiguous(memory_format=layout), *wide])
    names = ("y", "x", "weight", "style", "noise", "bias")
    for name, got, other, want in zip(names, fused, plain, exact, strict=True):
        assert_close_to_float64(got, other, want, floor=FLOOR[dtype], what=name)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_second_order(up: int, down: int) -> None:
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in operands(i=3, o=2)]
        y = ops.modulated_conv2d(
            *leaves, up=up, down=down, padding=1, resample_filter=FIR, eps=0.1,
            epilogue=ops.Epilogue(act="softplus"), backend=backend,
        )  # fmt: skip
        first = torch.autograd.grad((y**2).sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, want in zip(*results, strict=True):
        assert_close_to_float64(got, got, want, floor=2e-5)


def test_launches() -> None:
    """The scales, the convolution, and behind up = 2 the filter with the epilogue: at most three."""
    x, weight, style = (t.float() for t in operands())
    for up, expected in ((1, 2), (2, 3)):
        epilogue = ops.Epilogue(noise=torch.randn(3 * up, 4 * up), bias=torch.randn(4), act="lrelu")
        with _launch.recorded() as launches:
            ops.modulated_conv2d(x, weight, style, up=up, padding=1, resample_filter=FIR, epilogue=epilogue)
        names = [launch.kernel.fn.__name__ for launch in launches]
        assert names == ["demodulation_kernel", "conv_fwd_kernel", "upfirdn2d_kernel"][:expected]


def test_half_precision_is_safe() -> None:
    """Styles whose products overflow float16: normalised, the result is finite and right."""
    x, weight, style = operands(i=16)
    x, weight, style = (x * 100).half(), weight.float() * 100, style.float() * 1000
    got = ops.modulated_conv2d(x, weight, style, padding=1, backend="triton")
    want = ops.modulated_conv2d(x.double(), weight.double(), style.double(), padding=1, backend="reference")
    assert got.isfinite().all()
    assert float((got.double() - want).abs().max() / want.abs().max()) < 2.0**-9


def test_empty_and_zero_styles() -> None:
    for kind in KINDS:
        x, weight, style = (t.float() for t in operands(n=0))
        y = ops.modulated_conv2d(x, weight, style, prenormalize=kind, backend="triton")
        assert y.shape == (0, 4, 1, 2)
        x, weight, style = (t.float() for t in operands())
        style[0] = 0
        y = ops.modulated_conv2d(x, weight, style, prenormalize=kind, backend="triton")
        assert not y[0].any() and y[1].isfinite().all()


def test_opcheck_and_choice() -> None:
    x, weight, style = (t.float().requires_grad_() for t in operands())
    for kind in KINDS:
        torch.library.opcheck(torch.ops.fastgan.demodulation.default, (weight, style, kind, 1e-4, True))
    assert fastgan.explain("modulated_conv2d", x, weight, style).backend == "triton"


def test_shipped_launches_are_planned() -> None:
    for label, launches in kernel.shipped():
        assert len(launches) == 1 and launches[0].bytes > 0, label
