"""minibatch_stddev against a loop over groups, in value, first and second order."""

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
SIZES = [(4, 4, 1), (6, 3, 2), (2, 4, 1), (6, 2, 4), (8, 4, 1)]  # N, group_size, num_channels


def by_definition(x: Tensor, group_size: int, num_channels: int, eps: float = 1e-8) -> Tensor:
    """Group by group and share by share, in the dtype of x."""
    n, c = x.shape[:2]
    size = min(group_size, n)
    count, share = n // size, c // num_channels
    rows = []
    for sample in range(n):
        group = x[sample % count :: count]
        deviation = (group.var(0, correction=0) + eps).sqrt()
        rows.append(torch.stack([deviation[k * share : (k + 1) * share].mean() for k in range(num_channels)]))
    return torch.cat([x, torch.stack(rows)[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("n", "group_size", "num_channels"), SIZES)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_against_a_loop(n: int, group_size: int, num_channels: int, backend: str, layout: str) -> None:
    x = layouts(image(n, 4, 3, 5))[layout]
    got = ops.minibatch_stddev(x, group_size=group_size, num_channels=num_channels, backend=backend)
    want = by_definition(x, group_size, num_channels)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if backend == "cpp" and num_channels == 1:
        assert got.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def test_one_sample_has_no_deviation() -> None:
    x = image(1, 2, 3, 3).requires_grad_()
    y = ops.minibatch_stddev(x)
    torch.testing.assert_close(y[:, 2], torch.full((1, 3, 3), 1e-4, dtype=torch.float64))
    (grad,) = torch.autograd.grad(y[:, 2].sum(), x)
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", [(4, 6, 37, 41), (4, 2304, 2, 3)])
def test_accuracy(dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    """Value and gradient; samples of several blocks, and pixels of more values than a block has."""
    x = layouts(image(*shape).to(dtype))[layout]
    for num_channels in (1, 2):
        exact = gradients(lambda x, k=num_channels: by_definition(x, 4, k), [x.double()])
        fused = gradients(lambda x, k=num_channels: ops.minibatch_stddev(x, num_channels=k, backend="cpp"), [x])
        plain = gradients(lambda x, k=num_channels: by_definition(x, 4, k), [x])
        for name, got, other, want in zip(("y", "x"), fused, plain, exact, strict=True):
            assert_close_to_float64(got, other, want, floor=FLOOR[dtype], what=name)
        # The statistic by itself: beside x its error would not show.
        got, other, want = (result[0][:, shape[1] :] for result in (fused, plain, exact))
        assert_close_to_float64(got, other, want, floor=FLOOR[dtype], what="statistic")


@pytest.mark.parametrize(("n", "group_size", "num_channels"), SIZES)
def test_both_orders(n: int, group_size: int, num_channels: int) -> None:
    for layout in ("contiguous", "channels_last"):
        x = layouts(image(n, 4, 1, 2))[layout].requires_grad_()

        def function(x: Tensor) -> Tensor:
            return ops.minibatch_stddev(x, group_size=group_size, num_channels=num_channels, eps=0.1)

        assert gradcheck(function, (x,))
        assert gradgradcheck(function, (x,))


def test_third_order() -> None:
    results = []
    for backend in ("cpp", "reference"):
        x = image(4, 2, 1, 2).requires_grad_()
        value = (ops.minibatch_stddev(x, backend=backend) ** 3).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = (grad**3).sum()
        results.append(grad.detach())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_empty_and_nan(backend: str) -> None:
    empty = torch.empty(0, 4, 2, 2, requires_grad=True)
    y = ops.minibatch_stddev(empty, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 5, 2, 2)
    assert empty.grad.shape == empty.shape
    x = image(4, 2, 2, 2)
    x[1, 0, 0, 0] = torch.nan
    y = ops.minibatch_stddev(x, group_size=2)  # groups {0, 2} and {1, 3}: within its group it does spread
    assert y[::2].isfinite().all()
    assert y[1::2, 2].isnan().all()


def test_calls() -> None:
    x = torch.randn(4, 2, 3, 3, requires_grad=True)
    with CountOps() as mode:
        torch.autograd.grad(ops.minibatch_stddev(x).square().sum(), x)
    assert {k: v for k, v in mode.calls.items() if k.startswith("fastgan")} == {
        "fastgan.minibatch_stddev": 1,
        "fastgan.minibatch_stddev_grad": 1,
    }


def test_opcheck() -> None:
    for layout in ("contiguous", "channels_last"):
        x = layouts(torch.randn(4, 2, 3, 3))[layout].requires_grad_()
        torch.library.opcheck(torch.ops.fastgan.minibatch_stddev.default, (x, 2, 1, 1e-4))
        g = torch.randn(4, 3, 3, 3, requires_grad=True)
        torch.library.opcheck(torch.ops.fastgan.minibatch_stddev_grad.default, (g, x, 2, 1, 1e-4))


def test_compiles_without_breaks() -> None:
    x = torch.randn(4, 2, 3, 3, requires_grad=True)
    got = torch.compile(ops.minibatch_stddev, fullgraph=True, backend="aot_eager")(x)
    want = ops.minibatch_stddev(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.pow(3).sum(), x) for y in (got, want)))


def test_same_result_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    x = torch.randn(4, 65, 37, 41)
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ops.minibatch_stddev(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_backend_choice() -> None:
    assert fastgan.explain("minibatch_stddev", torch.ones(2, 3, 1, 1)).backend == "cpp"
    with pytest.raises(ValueError, match=r"minibatch_stddev: backend 'cuda' .* has no kernel"):
        ops.minibatch_stddev(torch.ones(2, 3, 1, 1), backend="cuda")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.ones(2, 3)}, r"x must have 4 dimensions, got \[2, 3\]"),
        ({"x": torch.ones(2, 3, 0, 1)}, r"x must have C, H and W of at least 1, got \[2, 3, 0, 1\]"),
        ({"x": torch.ones(6, 3, 1, 1)}, "group_size must be at least 1 and divide N = 6, got 4"),
        ({"group_size": 0}, "group_size must be at least 1 and divide N = 4, got 0"),
        ({"num_channels": 2}, "num_channels must be at least 1 and divide C = 3, got 2"),
        ({"eps": 0.0}, "eps must be above 0, got 0.0"),
    ],
)
def test_error_text(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"minibatch_stddev: {text}"):
        ops.minibatch_stddev(**{"x": torch.ones(4, 3, 2, 2), **change})


def test_type_error() -> None:
    with pytest.raises(TypeError, match="minibatch_stddev: x must be a Tensor, got list"):
        ops.minibatch_stddev([1.0])
