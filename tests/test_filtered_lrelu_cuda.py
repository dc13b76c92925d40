"""filtered_lrelu's backend "cuda" as far as no GPU is needed: its autograd formulas, in float64 through the ops' plain
torch, what it says it cannot take, shapes on fake tensors. tests/simt runs the kernels themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CountOps
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import fastgan
from fastgan import backends, ops
from fastgan.ops import _filtered_lrelu
from fastgan.reference import filtered_lrelu as reference

FORWARD, REPLAY = (
    getattr(torch.ops.fastgan, name).default for name in ("filtered_lrelu_cuda", "filtered_lrelu_replay_cuda")
)
FU = torch.tensor([1.0, 3.0, 3.0, 2.0]) / 8
FD = torch.tensor([[0.2, 0.1, 0.4], [0.0, 0.5, -0.3]])
# fu, fd, up, down, padding, clamp, flip_filter
CALLS = [
    (FU, FD, 2, 2, (3, 3, 3, 3), 0.7, False),
    (FD, FU, 2, 3, (3, 1, 2, 4), None, True),
    (None, FD, 4, 2, (-1, 2, 3, -2), 0.9, False),
    (None, None, 1, 1, (0, 0, 0, 0), 0.5, False),
    (FD, None, 3, 5, (2, 0, 5, 1), 0.5, True),
]


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def options(up: int, down: int, padding: tuple, clamp: float | None, flip_filter: bool) -> dict[str, Any]:
    named = {"up": up, "down": down, "padding": padding, "clamp": clamp, "flip_filter": flip_filter}
    return named | {"gain": 1.3, "slope": 0.1}


@pytest.mark.parametrize(("fu", "fd", "up", "down", "padding", "clamp", "flip_filter"), CALLS)
def test_the_formulas(fu, fd, up: int, down: int, padding: tuple, clamp, flip_filter: bool) -> None:
    x, b = image(1, 2, 5, 6).requires_grad_(), image(2).requires_grad_()
    kwargs = options(up, down, padding, clamp, flip_filter)

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(x, fu, fd, b, **kwargs)
        cotangent = image(*y.shape).cos().requires_grad_()
        grads = torch.autograd.grad(y, (x, b), cotangent, create_graph=True)
        return [y, *grads, *torch.autograd.grad(grads[0].square().sum() + grads[1].sum(), cotangent)]

    torch.testing.assert_close(results(_filtered_lrelu.filtered_lrelu), results(reference.filtered_lrelu))

    def square(x: Tensor, b: Tensor) -> Tensor:
        return _filtered_lrelu.filtered_lrelu(x, fu, fd, b, **kwargs) ** 2

    assert gradcheck(square, (x, b), fast_mode=True)
    assert gradgradcheck(square, (x, b), fast_mode=True)


def arguments(clamp: float | None = 0.7) -> tuple[list[Any], list[Any]]:
    """Of one call of each op; what the replay gets is the gradient of the other."""
    x, b, fu = image(2, 3, 6, 5, dtype=torch.float32), image(3, dtype=torch.float32), FU.float()
    forward = [x, fu, FD, b, 2, 2, (3, 4, 3, 2), 1.3, 0.1, clamp, False, True]
    y, signs = FORWARD(*forward)
    along, across = _filtered_lrelu._axes(x, fu, FD, 2, 2, (3, 4, 3, 2))
    along, across = along.transposed(5, 4, 3), across.transposed(6, 4, 2)
    return forward, [torch.ones_like(y), FD, fu, signs, 2, 2, list(along), list(across), True, 4.0, 1.3, 0.1]


@pytest.mark.parametrize("op", [FORWARD, REPLAY])
def test_opcheck(op: Any) -> None:
    args = arguments()[0 if op is FORWARD else 1]
    args[0].requires_grad_()
    torch.library.opcheck(op, args)


def test_the_replay_is_linear_and_its_own_second_derivative() -> None:
    args = arguments()[1]
    x = image(*args[0].shape).requires_grad_()
    filters = [f.double() for f in args[1:3]]

    def cube(x: Tensor) -> Tensor:
        return _filtered_lrelu._replay_op(x, *filters, *args[3:]) ** 3

    assert gradcheck(cube, x, fast_mode=True)
    assert gradgradcheck(cube, x, fast_mode=True)


def test_every_derivative_stays_on_its_ops() -> None:
    x = image(1, 2, 6, 5).requires_grad_()
    kwargs = options(2, 2, (3, 3, 3, 3), 0.7, False)
    with CountOps() as count:
        y = _filtered_lrelu.filtered_lrelu(x, FU, FD, None, **kwargs)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x)
    # The second backward pass goes through the first one's replay and, since y enters it, through the op again.
    assert {name: n for name, n in count.calls.items() if name.startswith("fastgan")} == {
        "fastgan.filtered_lrelu_cuda": 1,
        "fastgan.filtered_lrelu_replay_cuda": 3,
    }
    with CountOps() as count:
        ops.filtered_lrelu(x, FU, FD, up=2, down=2, padding=3).sum().backward()
    assert not any(name.startswith("fastgan") for name in count.calls)


def test_backward_keeps_two_bits_per_pixel_and_the_filters() -> None:
    x, saved = image(1, 2, 40, 30).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = _filtered_lrelu.filtered_lrelu(x, FU, FD, None, **options(2, 2, (3, 3, 3, 3), 0.7, False))
    sizes = [tuple(t.shape) for t in saved if t.dtype != torch.int32]
    assert sizes == [tuple(FU.shape), tuple(FD.shape)]
    (signs,) = (t for t in saved if t.dtype == torch.int32)
    mid_h, mid_w = (y.shape[2] - 1) * 2 + 2, (y.shape[3] - 1) * 2 + 3
    assert signs.shape == (1, 2, -(-mid_h // 16), mid_w)


def test_empty_batch_and_no_gradient() -> None:
    kwargs = options(2, 2, (3, 3, 3, 3), 0.7, False)
    x, b = image(0, 3, 7, 5).requires_grad_(), image(3).requires_grad_()
    y = _filtered_lrelu.filtered_lrelu(x, FU, FD, b, **kwargs)
    grads = torch.autograd.grad(y.sum(), (x, b))
    assert [grads[0].shape, grads[1].tolist()] == [x.shape, [0, 0, 0]]
    y, signs = FORWARD(x.detach(), FU, FD, None, 2, 2, (3, 3, 3, 3), 1.3, 0.1, 0.7, False, False)
    assert signs.shape == (0,)
    y, _ = _filtered_lrelu._forward_op(x, FU, FD, None, 2, 2, (3, 3, 3, 3), 1.3, 0.1, 0.7, False, False)
    with pytest.raises(RuntimeError, match="filtered_lrelu_cuda: a gradient needs the signs that record = true keeps"):
        y.sum().backward()
    trained = _filtered_lrelu.filtered_lrelu(image(1, 3, 7, 5), FU.clone().requires_grad_(), FD, b, **kwargs).sum()
    with pytest.raises(NotImplementedError, match="filtered_lrelu: the gradients of fu and fd have no kernel"):
        trained.backward()


def test_compiles_without_breaks() -> None:
    x, b = image(2, 3, 6, 5).requires_grad_(), image(3).requires_grad_()

    def function(x: Tensor, b: Tensor) -> Tensor:
        return _filtered_lrelu.filtered_lrelu(x, FU, FD, b, **options(2, 2, (3, 3, 3, 3), 0.7, False))

    got, want = torch.compile(function, fullgraph=True, backend="aot_eager")(x, b), function(x, b)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), (x, b)) for y in (got, want)))


@pytest.fixture
def with_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA library counts as loaded, whether it was built or not: fake tensors never call it."""
    status = fastgan._native.LibraryStatus(backends._LIBRARIES["cuda"].path, None)
    monkeypatch.setitem(backends._LIBRARIES, "cuda", status)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fake_tensors_on_a_gpu(with_library: None, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        x, b = torch.empty(2, 3, 16, 12, device="cuda", dtype=dtype), torch.empty(3, device="cuda")
        x = x.to(memory_format=torch.channels_last)
        f = torch.empty(12, device="cuda")
        kwargs = {"up": 2, "down": 2, "padding": 10, "backend": "cuda"}
        y = ops.filtered_lrelu(x, f, f, b, **kwargs)
        want = ops.filtered_lrelu(x, f, f, b, **(kwargs | {"backend": "reference"}))
        assert (y.shape, y.dtype, y.device) == (want.shape, want.dtype, want.device)
        assert y.is_contiguous()
        decision = fastgan.explain("filtered_lrelu", x, f, f, b, up=2, down=2, padding=10)
    assert (decision.backend, decision.reasons["cuda"]) == ("reference", None)


def test_what_it_cannot_take(with_library: None) -> None:
    def reason(x: Tensor, fu: Tensor | None = None, fd: Tensor | None = None, **kwargs: Any) -> str | None:
        return fastgan.explain("filtered_lrelu", x, fu, fd, **kwargs).reasons["cuda"]

    assert reason(torch.ones(1, 1, 4, 4)) == "it runs on cuda tensors, got cpu"
    with pytest.raises(ValueError, match=r"filtered_lrelu: backend 'cuda' .* it runs on cuda tensors, got cpu"):
        ops.filtered_lrelu(torch.ones(1, 1, 4, 4), backend="cuda")
    with FakeTensorMode():
        x, f = torch.empty(1, 1, 600, 600, device="cuda"), torch.empty(12, device="cuda")
        assert reason(x, f, f, up=2, down=2) is None
        assert reason(x.double(), f, f) == "it takes float32, bfloat16 and float16, got torch.float64"
        trained = torch.empty(12, device="cuda", requires_grad=True)
        assert reason(x, f, trained) == "fu or fd requires a gradient, which the reference alone computes"
        with torch.no_grad():
            assert reason(x, f, trained) is None
        wide, planar = torch.empty(513, device="cuda"), torch.empty(100, 120, device="cuda")
        assert reason(x, wide) == "its factors and the sides of its filters are at most 512, got fu of 513"
        assert reason(x, down=513) == "its factors and the sides of its filters are at most 512, got down of 513"
        needed = max(_filtered_lrelu._smallest_tile(f, planar, 1, 1), _filtered_lrelu._smallest_tile(planar, f, 1, 1))
        assert needed > 49152
        assert reason(x, f, planar) == (
            f"filters of [12] and [100, 120] with up 1 and down 1 need {needed} bytes of a block's 49152 bytes of "
            "shared memory"
        )
        huge = reason(x, up=2, padding=(1 << 30, 0, 0, 0))
        assert huge == "the sides of its upsampled and padded image are below 1073741824, got 600 times 2"
