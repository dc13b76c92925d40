"""weight_energy on Triton, under its interpreter, and modulated_conv2d with it: demodulation inside the convolution's
launch.

What the interpreter cannot show of the convolution is said in test_scaled_conv2d.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastgan
from fastgan import ops
from fastgan.kernels import _launch, _tiles
from tests.helpers import assert_close_to_float64

# Two taps: the interpreter takes a while for each.
FIR = torch.tensor([1.0, 3.0]) / 4
KINDS = ["none", "stylegan2_fp16", "stylegan3"]
# A half type rounds the weight, the product's operands and two results.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def operands(n: int = 2, i: int = 5, o: int = 4, kernel: int = 3, size: tuple[int, int] = (3, 4)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, i, *size), (o, i, kernel, kernel), (n, i))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_energy(dtype: torch.dtype) -> None:
    weight = operands(o=11, i=37)[1].to(dtype)
    weight[2] = 0
    exact = ops.weight_energy(weight.double(), backend="reference")
    for layout in (torch.contiguous_format, torch.channels_last):
        with _launch.recorded() as launches:
            got = ops.weight_energy(weight.to(memory_format=layout))
        assert len(launches) == 1
        for value, want in zip(got, exact, strict=True):
            torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=0)
    assert fastgan.explain("weight_energy", weight).backend == "triton"


def with_energy(*args, **kwargs) -> tuple[Tensor, list[str]]:
    """modulated_conv2d with its weight's energy, and the names of its launches."""
    energy = ops.weight_energy(args[1])
    with _launch.recorded() as launches, torch.no_grad():
        y = ops.modulated_conv2d(*args, **kwargs, weight_energy=energy, backend="triton")
    return y, [launch.kernel.fn.__name__ for launch in launches]


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize(
    ("kind", "dtype", "layout"),
    [
        ("none", torch.float32, torch.contiguous_format),
        ("stylegan3", torch.bfloat16, torch.channels_last),
        ("stylegan2_fp16", torch.float16, torch.channels_last),
    ],
)
def test_demodulation_inside_the_launch(
    up: int, down: int, kind: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """An eps that counts; a zero row of the weight and of the style."""
    x, weight, style = operands(n=2, size=(4, 4))
    x, weight, style, bias = x.to(dtype), weight.float(), style.float(), torch.randn(4)
    weight[2], style[1] = 0, 0
    options = {"up": up, "down": down, "padding": 1, "resample_filter": FIR, "prenormalize": kind, "eps": 1e-2}
    options |= {"input_gain": -0.7, "epilogue": ops.Epilogue(bias=bias, act="lrelu")}
    got, names = with_energy(x.contiguous(memory_format=layout), weight, style, **options)
    resampling = ["upfirdn2d_kernel"]
    assert names == [*resampling * (down - 1), "conv_fwd_kernel", *resampling * (up - 1)]
    wide = {**options, "epilogue": ops.Epilogue(bias=bias.double(), act="lrelu"), "backend": "reference"}
    exact = ops.modulated_conv2d(x.double(), weight.double(), style.double(), **wide)
    plain = ops.modulated_conv2d(x, weight, style, **options, backend="reference")
    assert_close_to_float64(got, plain, exact, floor=FLOOR[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_more_channels_than_are_read_at_once(kind: str) -> None:
    x, weight, style = operands(i=70, o=21, kernel=1)
    options = {"prenormalize": kind, "eps": 1e-2}
    exact = ops.modulated_conv2d(x, weight, style, **options, backend="reference")
    for dtype in (torch.float32, torch.float16):
        got, _ = with_energy(x.to(dtype), weight.float(), style.float(), **options)
        plain = ops.modulated_conv2d(x.to(dtype), weight.float(), style.float(), **options, backend="reference")
        assert_close_to_float64(got, plain, exact, floor=FLOOR[dtype])


def test_demodulation_where_a_tile_joins_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "BUSY", 1)
    for kind in KINDS:
        x, weight, style = operands(n=5, i=7, o=3, size=(2, 3))
        exact = ops.modulated_conv2d(x, weight, style, padding=1, prenormalize=kind, eps=0.1, backend="reference")
        energy = ops.weight_energy(weight.float())
        with _launch.recorded() as launches:
            got = ops.modulated_conv2d(
                x.float(), weight.float(), style.float(), padding=1, prenormalize=kind, eps=0.1, weight_energy=energy
            )
        assert [launch.constants["BLOCK_S"] > 1 for launch in launches] == [True]
        assert_close_to_float64(got, got, exact, floor=1e-6)


@pytest.mark.parametrize("shape", [(), (6,), (2, 6)], ids=str)
def test_input_gain_beside_demodulation_inside(shape: tuple[int, ...]) -> None:
    """d does not see it. A 1×1 kernel, a kernel that is flipped, uneven padding."""
    for kernel_size, options in ((1, {"up": 2}), (3, {"flip_weight": False, "padding": (2, 0, 1, 1)})):
        x, weight, style = operands(i=6, kernel=kernel_size)
        gain = torch.rand(shape, dtype=torch.float64) + 0.5
        exact = ops.modulated_conv2d(x, weight, style, input_gain=gain, **options, backend="reference")
        got, names = with_energy(*(t.float() for t in (x, weight, style)), input_gain=gain.float(), **options)
        assert names == ["conv_fwd_kernel", "upfirdn2d_kernel"][: options.get("up", 1)]
        assert_close_to_float64(got, got, exact, floor=1e-6)


def test_half_precision_is_safe_with_demodulation_inside() -> None:
    x, weight, style = operands(i=16)
    x, weight, style = (x * 100).half(), weight.float() * 100, style.float() * 1000
    got, _ = with_energy(x, weight, style, padding=1)
    want = ops.modulated_conv2d(x.double(), weight.double(), style.double(), padding=1, backend="reference")
    assert got.isfinite().all()
    assert float((got.double() - want).abs().max() / want.abs().max()) < 2.0**-9


def test_zero_styles_and_empty_batches() -> None:
    for kind in KINDS:
        x, weight, style = (t.float() for t in operands())
        style[0] = 0
        y, _ = with_energy(x, weight, style, prenormalize=kind)
        assert not y[0].any() and y[1].isfinite().all()
        empty, names = with_energy(x[:0], weight, style[:0], prenormalize=kind)
        assert empty.shape == (0, 4, 1, 2) and names == []


def test_opcheck() -> None:
    x, weight, style = (t.float() for t in operands())
    settings = ("stylegan2_fp16", 1e-4, 1.0, *[None] * 4, (1, 1), (1, 1), False, "fp32", "lrelu", 0.2, 1.0, 0.5, 1.0)
    torch.library.opcheck(
        torch.ops.fastgan.demodulated_conv2d.default, (x, weight, style, None, *ops.weight_energy(weight), *settings)
    )
