"""upfirdn2d against an explicit loop over pixels and taps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastgan
from fastgan import ops


def naive(x: Tensor, f: Tensor | None, up, down, padding, flip_filter: bool, gain: float) -> Tensor | None:
    """out[y, x] = gain · Σ_taps f[i, j] · u[y·down − i, x·down − j] over the upsampled, padded image u, tap by tap."""
    f = torch.ones(1, 1, dtype=torch.float64) if f is None else f.double()
    f = torch.outer(f, f) if f.ndim == 1 else f
    (fh, fw), (n, c, height, width) = f.shape, x.shape
    (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1) = up, down, padding
    out_h = (height * up_y + y0 + y1 - fh + down_y) // down_y
    out_w = (width * up_x + x0 + x1 - fw + down_x) // down_x
    if min(out_h, out_w) < 1:
        return None
    out = x.new_zeros(n, c, out_h, out_w)
    for oy in range(out_h):
        for ox in range(out_w):
            for i in range(fh):
                for j in range(fw):
                    # A convolution pairs the last tap with the first pixel, a correlation the first.
                    tap = f[i, j] if flip_filter else f[fh - 1 - i, fw - 1 - j]
                    py, px = oy * down_y + i - y0, ox * down_x + j - x0
                    if py % up_y == 0 and px % up_x == 0 and 0 <= py < height * up_y and 0 <= px < width * up_x:
                        out[:, :, oy, ox] += gain * tap * x[:, :, py // up_y, px // up_x]
    return out


SEPARABLE = torch.tensor([1.0, 3.0, 2.0, 0.5])
FULL = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 3.0]])


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    filter_index=st.integers(0, 2),
    up=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    down=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(-2, 4)] * 4),
    flip_filter=st.booleans(),
    gain=st.sampled_from([1.0, 4.0, -0.5]),
)
def test_against_a_loop(filter_index: int, up, down, padding, flip_filter: bool, gain: float) -> None:
    x, f = image(2, 2, 4, 5), (None, SEPARABLE, FULL)[filter_index]
    want = naive(x, f, up, down, padding, flip_filter, gain)
    kwargs = {"up": up, "down": down, "padding": padding, "flip_filter": flip_filter, "gain": gain}
    if want is None:
        with pytest.raises(ValueError, match=r"upfirdn2d: x .* must be at least as large as the filter"):
            ops.upfirdn2d(x, f, **kwargs)
        return
    got = ops.upfirdn2d(x, f, **kwargs)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_short_forms_of_the_arguments() -> None:
    x = image(1, 2, 5, 6)
    long = ops.upfirdn2d(x, FULL, up=(2, 2), down=(3, 3), padding=(1, 1, 2, 2))
    assert torch.equal(ops.upfirdn2d(x, FULL, up=2, down=[3, 3], padding=(1, 2)), long)
    same = ops.upfirdn2d(x, FULL, padding=(3, 3, 3, 3))
    assert torch.equal(ops.upfirdn2d(x, FULL, padding=3), same)


def test_negative_padding_crops() -> None:
    x = image(1, 1, 6, 7)
    assert torch.equal(ops.upfirdn2d(x, None, padding=(-1, -2, -3, 0)), x[:, :, 3:, 1:-2])


@pytest.mark.parametrize("f", [SEPARABLE, FULL], ids=["separable", "full"])
def test_up_and_down_are_adjoint(f: Tensor) -> None:
    """<upfirdn2d(x), y> = <x, its backward(y)>, and the backward is upfirdn2d with up and down exchanged."""
    x = image(1, 2, 5, 6).requires_grad_()
    up, down, (x0, x1, y0, y1) = 2, 3, (2, 1, 3, 0)
    fh, fw = (len(f), len(f)) if f.ndim == 1 else f.shape
    y = ops.upfirdn2d(x, f, up=up, down=down, padding=(x0, x1, y0, y1), gain=1.5)
    cotangent = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, cotangent)
    padding = (
        fw - x0 - 1,
        x.shape[3] * up - y.shape[3] * down + x0 - up + 1,
        fh - y0 - 1,
        x.shape[2] * up - y.shape[2] * down + y0 - up + 1,
    )
    want = ops.upfirdn2d(cotangent, f, up=down, down=up, padding=padding, flip_filter=True, gain=1.5)
    torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("f", [None, SEPARABLE, FULL], ids=["none", "separable", "full"])
def test_first_and_second_order(f: Tensor | None) -> None:
    x, bias = image(1, 2, 3, 4).requires_grad_(), image(2).requires_grad_()
    taps = None if f is None else f.double().requires_grad_()

    def function(x: Tensor, bias: Tensor, taps: Tensor | None) -> Tensor:
        epilogue = ops.Epilogue(bias=bias, act="swish")
        return ops.upfirdn2d(x, taps, up=2, down=(1, 3), padding=(2, 1, 3, 3), gain=4, epilogue=epilogue)

    assert gradcheck(function, (x, bias, taps))
    assert gradgradcheck(function, (x, bias, taps), fast_mode=True)


def test_epilogue() -> None:
    x = image(2, 3, 4, 5)
    plain = ops.upfirdn2d(x, SEPARABLE, up=2, padding=(2, 1), gain=4)
    n, c, h, w = plain.shape
    noise, bias, residual = image(h, w), image(c), image(n, c, h, w)
    epilogue = ops.Epilogue(noise, 0.5, bias, "lrelu", alpha=0.1, clamp=1.0, residual=residual, residual_gain=2.0)
    got = ops.upfirdn2d(x, SEPARABLE, up=2, padding=(2, 1), gain=4, epilogue=epilogue)
    want = (F.leaky_relu(plain + 0.5 * noise + bias[:, None, None], 0.1) * 2**0.5).clamp(-1, 1) + 2 * residual
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("f", [SEPARABLE, FULL], ids=["separable", "full"])
def test_half_types_are_rounded_once(dtype: torch.dtype, f: Tensor) -> None:
    x = image(2, 3, 13, 11).to(dtype)
    want = ops.upfirdn2d(x.double(), f, up=2, padding=3, gain=4)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.upfirdn2d(x, f, up=2, padding=3, gain=4)
    assert got.dtype == dtype
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error < max(torch.finfo(dtype).eps, 1e-6)


def test_layouts_empty_and_nan() -> None:
    x = image(2, 3, 7, 5)
    want = ops.upfirdn2d(x, SEPARABLE, down=2, padding=1)
    for other in (x.contiguous(memory_format=torch.channels_last), x.repeat_interleave(2, 3)[..., ::2]):
        torch.testing.assert_close(ops.upfirdn2d(other, SEPARABLE, down=2, padding=1), want)
    expanded = ops.upfirdn2d(x[:1].expand(3, -1, -1, -1), SEPARABLE, down=2, padding=1)
    torch.testing.assert_close(expanded, want[:1].expand(3, -1, -1, -1))
    empty = x[:0].requires_grad_()
    y = ops.upfirdn2d(empty, FULL, up=2)
    y.sum().backward()
    assert y.shape == (0, 3, 13, 8)
    assert empty.grad.shape == empty.shape
    x[0, 1, 2, 2] = float("nan")
    y = ops.upfirdn2d(x, SEPARABLE, padding=2)
    assert y[0, 1].isnan().any()
    assert y[1].isfinite().all()


def test_compiles_without_breaks() -> None:
    x = image(2, 3, 6, 5).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return ops.upfirdn2d(x, SEPARABLE, up=2, padding=(2, 1), gain=4, epilogue=ops.Epilogue(act="lrelu"))

    got, want = torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (got, want)))


def test_backend_choice() -> None:
    assert fastgan.explain("upfirdn2d", image(1, 1, 4, 4), SEPARABLE).backend == "reference"
    with pytest.raises(ValueError, match=r"upfirdn2d: backend 'cpp' .* has no kernel for this op"):
        ops.upfirdn2d(image(1, 1, 4, 4), None, backend="cpp")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.ones(3, 4, 4)}, r"x must have 4 dimensions, got \[3, 4, 4\]"),
        ({"x": torch.ones(1, 2, 0, 4)}, r"x must have C, H and W of at least 1, got \[1, 2, 0, 4\]"),
        ({"f": torch.ones(2, 2, 2)}, r"f must be \[taps\] or \[fh, fw\] with at least one tap, got \[2, 2, 2\]"),
        ({"f": torch.ones(0)}, r"f must be \[taps\] or \[fh, fw\] with at least one tap, got \[0\]"),
        ({"f": torch.ones(6)}, r"x .* must be at least as large as the filter = \[6, 6\], got \[4, 5\]"),
        ({"up": 0}, r"up must be an int >= 1 or \(x, y\) of such, got 0"),
        ({"down": (1, 2, 3)}, r"down must be an int >= 1 or \(x, y\) of such, got \(1, 2, 3\)"),
        ({"padding": (1, 2, 3)}, r"padding must be an int, \(x, y\) or \(x0, x1, y0, y1\), got \(1, 2, 3\)"),
        ({"epilogue": ops.Epilogue(act="gelu")}, "epilogue.act must be one of linear, .*, got 'gelu'"),
        ({"epilogue": ops.Epilogue(clamp=-1.0)}, "epilogue.clamp must be above 0 or None, got -1.0"),
        ({"epilogue": ops.Epilogue(noise_strength=1.0)}, "epilogue.noise_strength must be None without noise, got 1.0"),
        ({"epilogue": ops.Epilogue(bias=torch.ones(3))}, r"epilogue.bias must be \[C\] = \[2\], got \[3\]"),
        (
            {"epilogue": ops.Epilogue(noise=torch.ones(4, 4))},
            r"epilogue.noise must be \[H, W\] or \[N, 1, H, W\] = \[4, 5\] or \[1, 1, 4, 5\], got \[4, 4\]",
        ),
        (
            {"epilogue": ops.Epilogue(residual=torch.ones(1, 2, 4, 4))},
            r"epilogue.residual must be \[N, C, H, W\] = \[1, 2, 4, 5\], got \[1, 2, 4, 4\]",
        ),
    ],
)
def test_error_text(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"upfirdn2d: {text}"):
        ops.upfirdn2d(**{"x": torch.ones(1, 2, 4, 5), "f": None, **change})
