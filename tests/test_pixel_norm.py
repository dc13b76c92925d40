"""pixel_norm against its definition, in value, first and second order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastgan
from fastgan import ops
from tests.helpers import CountOps, assert_close_to_float64, gradients, layouts

# A few roundings of float32; half types are rounded once.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def by_definition(x: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    return x / (x.square().mean(dim, keepdim=True) + eps).sqrt()


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7,), (3, 512), (2, 5, 3), (2, 37, 7, 5), (2, 3, 4, 3, 2)])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_along_every_dimension(shape: tuple[int, ...], backend: str) -> None:
    x = image(*shape)
    for dim in range(-len(shape), len(shape)):
        got = ops.pixel_norm(x, dim=dim, eps=0.1, backend=backend)
        torch.testing.assert_close(got, by_definition(x, dim, 0.1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("shape", [(2, 3, 47, 53), (2, 1100, 5, 9)])
def test_accuracy(dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    """Value and gradient; several blocks of a plane, and more channels than a block of pixels has room for."""
    x = layouts(image(*shape).to(dtype))[layout]
    exact = gradients(by_definition, [x.double()])
    fused = gradients(lambda x: ops.pixel_norm(x, backend="cpp"), [x])
    plain = gradients(by_definition, [x])
    for name, got, other, want in zip(("y", "x"), fused, plain, exact, strict=True):
        assert_close_to_float64(got, other, want, floor=FLOOR[dtype], what=name)
    assert fused[0].is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@pytest.mark.parametrize(("shape", "dim"), [((3, 5), 1), ((2, 5, 3, 2), 1), ((2, 3, 4), 0), ((2, 3, 4), -1)])
def test_both_orders(shape: tuple[int, ...], dim: int) -> None:
    whole = image(*shape)
    views = layouts(whole) if len(shape) == 4 else {"contiguous": whole}
    for name in views.keys() - {"expanded"}:  # gradcheck changes one element at a time
        x = views[name].requires_grad_()
        assert gradcheck(lambda x: ops.pixel_norm(x, dim=dim, eps=0.1), (x,))
        assert gradgradcheck(lambda x: ops.pixel_norm(x, dim=dim, eps=0.1), (x,))


def test_third_order() -> None:
    results = []
    for backend in ("cpp", "reference"):
        x = image(2, 5).requires_grad_()
        value = (ops.pixel_norm(x, backend=backend) ** 3).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = (grad**3).sum()
        results.append(grad.detach())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_zeros_stay_zero() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = ops.pixel_norm(x)
    y.sum().backward()
    assert not y.any()
    torch.testing.assert_close(x.grad, torch.full((2, 4), 1e4))


def test_empty_and_nan() -> None:
    empty = torch.empty(0, 5, 3, requires_grad=True)
    y = ops.pixel_norm(empty)
    y.sum().backward()
    assert y.shape == empty.grad.shape == (0, 5, 3)
    x = image(2, 3, 4, 5)
    x[1, 1, 2, 3] = torch.nan
    y = ops.pixel_norm(x)
    assert y[0].isfinite().all()
    assert y[1, :, 2, 3].isnan().all()
    assert y.isnan().sum() == 3


def test_calls() -> None:
    x = torch.randn(2, 5, requires_grad=True)
    with CountOps() as mode:
        (grad,) = torch.autograd.grad(ops.pixel_norm(x).square().sum(), x, create_graph=True)
    assert {k: v for k, v in mode.calls.items() if k.startswith("fastgan")} == {
        "fastgan.pixel_norm": 1,
        "fastgan.pixel_norm_grad": 1,
    }


def test_opcheck() -> None:
    for x in (torch.randn(3, 5), *[layouts(torch.randn(2, 3, 4, 5))[k] for k in ("contiguous", "channels_last")]):
        leaf = x.requires_grad_()
        torch.library.opcheck(torch.ops.fastgan.pixel_norm.default, (leaf, 1, 1e-8))
        g = torch.randn_like(x).requires_grad_()
        torch.library.opcheck(torch.ops.fastgan.pixel_norm_grad.default, (g, leaf, 1, 1e-8))


def test_compiles_without_breaks() -> None:
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    got = torch.compile(ops.pixel_norm, fullgraph=True, backend="aot_eager")(x)
    want = ops.pixel_norm(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.pow(3).sum(), x) for y in (got, want)))


def test_same_result_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    x = torch.randn(3, 65, 37, 41)
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ops.pixel_norm(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_backend_choice() -> None:
    assert fastgan.explain("pixel_norm", torch.ones(2, 3)).backend == "cpp"
    with pytest.raises(ValueError, match=r"pixel_norm: backend 'cuda' .* has no kernel"):
        ops.pixel_norm(torch.ones(2, 3), backend="cuda")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dim": 2}, r"dim must be within -2 .. 1 for x \[2, 3\], got 2"),
        ({"x": torch.ones(2, 0)}, r"x must not be empty along dim 1, got \[2, 0\]"),
        ({"x": torch.ones(2, 3, dtype=torch.int32)}, "x must be floating point, got torch.int32"),
        ({"eps": 0}, "eps must be above 0, got 0"),
    ],
)
def test_error_text(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"pixel_norm: {text}"):
        ops.pixel_norm(**{"x": torch.ones(2, 3), **change})


def test_type_error() -> None:
    with pytest.raises(TypeError, match="pixel_norm: x must be a Tensor, got list"):
        ops.pixel_norm([1.0])
