"""filtered_lrelu against its steps one by one, each written out in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastgan
from fastgan import ops

FU = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
FD = torch.tensor([[0.2, 0.1, 0.4], [0.0, 0.5, -0.3]])


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def correlate(x: Tensor, f: Tensor | None, flip_filter: bool) -> Tensor:
    if f is None:
        return x
    f = torch.outer(f, f) if f.ndim == 1 else f
    f = f if flip_filter else f.flip((0, 1))
    return F.conv2d(x, f.to(x.dtype).expand(x.shape[1], 1, *f.shape), groups=x.shape[1])


def step_by_step(
    x: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    b: Tensor,
    *,
    up: int,
    down: int,
    padding: tuple[int, int, int, int],
    gain: float,
    slope: float,
    clamp: float | None,
    flip_filter: bool,
) -> Tensor:
    n, c, h, w = x.shape
    upsampled = x.new_zeros(n, c, h * up, w * up)
    upsampled[:, :, ::up, ::up] = x + b[:, None, None]
    y = correlate(F.pad(upsampled, padding), fu, flip_filter) * up**2
    y = torch.where(y > 0, y, y * slope) * gain
    if clamp is not None:
        y = y.clamp(-clamp, clamp)
    return correlate(y, fd, flip_filter)[:, :, ::down, ::down]


@pytest.mark.parametrize(("fu", "fd"), [(FU, FD), (FD, FU), (None, FD), (FU, None), (None, None)])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (2, 3), (4, 2)])
@pytest.mark.parametrize("flip_filter", [False, True])
def test_against_its_steps(fu: Tensor | None, fd: Tensor | None, up: int, down: int, flip_filter: bool) -> None:
    x, b = image(2, 3, 6, 7), image(3)
    for padding in ((0, 0, 0, 0), (3, 1, 2, 4), (-1, 2, 3, -2)):
        kwargs = {"up": up, "down": down, "padding": padding, "flip_filter": flip_filter}
        kwargs |= {"gain": 1.3, "slope": 0.1, "clamp": 0.9}
        got = ops.filtered_lrelu(x, fu, fd, b, **kwargs)
        torch.testing.assert_close(got, step_by_step(x, fu, fd, b, **kwargs), rtol=1e-11, atol=1e-11)
        (fu_h, fu_w), (fd_h, fd_w) = ((1, 1) if f is None else (f.shape[0], f.shape[-1]) for f in (fu, fd))
        sizes = (
            (7 * up + padding[0] + padding[1] - (fu_w - 1) - (fd_w - 1) + down - 1) // down,
            (6 * up + padding[2] + padding[3] - (fu_h - 1) - (fd_h - 1) + down - 1) // down,
        )
        assert got.shape == (2, 3, sizes[1], sizes[0])


def test_defaults_are_a_leaky_relu() -> None:
    x = image(2, 3, 5, 4)
    torch.testing.assert_close(ops.filtered_lrelu(x), F.leaky_relu(x, 0.2) * 2**0.5)
    same = ops.filtered_lrelu(x, FU, FD, up=2, padding=(2, 1))
    assert torch.equal(ops.filtered_lrelu(x, FU, FD, up=2, padding=(2, 2, 1, 1)), same)


@pytest.mark.parametrize("clamp", [None, 0.7])
def test_first_and_second_order(clamp: float | None) -> None:
    x, b = image(1, 2, 4, 3).requires_grad_(), image(2).requires_grad_()

    def function(x: Tensor, b: Tensor) -> Tensor:
        y = ops.filtered_lrelu(x, FU, FD, b, up=2, down=2, padding=3, clamp=clamp)
        return y * y  # the op is piecewise linear in x and b, so its own second derivatives are zero

    assert gradcheck(function, (x, b))
    assert gradgradcheck(function, (x, b), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    x, b = image(2, 3, 13, 11).to(dtype), image(3).float()
    want = ops.filtered_lrelu(x.double(), FU, FD, b.double(), up=2, down=2, padding=3, clamp=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.filtered_lrelu(x, FU, FD, b, up=2, down=2, padding=3, clamp=1.0)
    assert got.dtype == dtype
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error < max(torch.finfo(dtype).eps, 1e-6)


def test_layouts_empty_and_nan() -> None:
    x, b = image(2, 3, 7, 5), image(3)
    kwargs = {"up": 2, "down": 2, "padding": 3}
    want = ops.filtered_lrelu(x, FU, FD, b, **kwargs)
    for other in (x.contiguous(memory_format=torch.channels_last), x.repeat_interleave(2, 3)[..., ::2]):
        torch.testing.assert_close(ops.filtered_lrelu(other, FU, FD, b, **kwargs), want)
    expanded = ops.filtered_lrelu(x[:1].expand(3, -1, -1, -1), FU, FD, b, **kwargs)
    torch.testing.assert_close(expanded, want[:1].expand(3, -1, -1, -1))
    empty, b = x[:0].requires_grad_(), b.requires_grad_()
    y = ops.filtered_lrelu(empty, FU, FD, b, **kwargs)
    y.sum().backward()
    assert y.shape == (0, *want.shape[1:])
    assert not b.grad.any()
    x[0, 1, 2, 2] = float("nan")
    y = ops.filtered_lrelu(x, FU, FD, b, **kwargs)
    assert y[0, 1].isnan().any()
    assert y[1].isfinite().all()


def test_compiles_without_breaks() -> None:
    x, b = image(2, 3, 6, 5).requires_grad_(), image(3).requires_grad_()

    def function(x: Tensor, b: Tensor) -> Tensor:
        return ops.filtered_lrelu(x, FU, FD, b, up=2, down=2, padding=3)

    got, want = torch.compile(function, fullgraph=True, backend="aot_eager")(x, b), function(x, b)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), (x, b)) for y in (got, want)))


def test_backend_choice() -> None:
    assert fastgan.explain("filtered_lrelu", image(1, 1, 4, 4)).backend == "reference"
    with pytest.raises(ValueError, match=r"filtered_lrelu: backend 'cpp' .* has no kernel for this op"):
        ops.filtered_lrelu(image(1, 1, 4, 4), backend="cpp")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.ones(3, 4, 4)}, r"x must have 4 dimensions, got \[3, 4, 4\]"),
        ({"x": torch.ones(1, 2, 4, 0)}, r"x must have C, H and W of at least 1, got \[1, 2, 4, 0\]"),
        ({"fu": torch.ones(2, 2, 2)}, r"fu must be \[taps\] or \[fh, fw\] with at least one tap, got \[2, 2, 2\]"),
        ({"fd": torch.ones(0, 2)}, r"fd must be \[taps\] or \[fh, fw\] with at least one tap, got \[0, 2\]"),
        ({"b": torch.ones(3)}, r"b must be \[C\] = \[2\], got \[3\]"),
        ({"up": 0}, "up must be an int >= 1, got 0"),
        ({"down": 1.5}, "down must be an int >= 1, got 1.5"),
        ({"padding": (1, 2, 3)}, r"padding must be an int, \(x, y\) or \(x0, x1, y0, y1\), got \(1, 2, 3\)"),
        ({"clamp": 0.0}, "clamp must be above 0 or None, got 0.0"),
        (
            {"fu": FU, "fd": torch.ones(3)},
            r"x \[1, 2, 4, 5\], upsampled by 1 .* as large as fu and fd one after the other = \[6, 6\], got \[4, 5\]",
        ),
    ],
)
def test_error_text(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"filtered_lrelu: {text}"):
        ops.filtered_lrelu(**{"x": torch.ones(1, 2, 4, 5), **change})
