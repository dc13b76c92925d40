"""The CUDA C++ kernels on a GPU: values and gradients against float64, by the rule of accuracy.

``make gpu-check`` runs this on a GPU (FASTGAN_TEST_DEVICE=cuda), where every call names ``backend="cuda"``, and again
under compute-sanitizer. Elsewhere the same calls go to whatever serves the CPU, which shows that what is asked for here
can be met. The kernels' own code runs on the CPU in tests/simt.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOORS, assert_close_to_float64
from torch import Tensor

import fastgan
from fastgan import ops

DEVICE = os.environ.get("FASTGAN_TEST_DEVICE", "cpu")
BACKEND = "cuda" if DEVICE == "cuda" else None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        run: from the inputs to one tensor; fastgan ops without a backend of their own.
        maps: shapes of the inputs that have the dtype of the call.
        vectors: shapes of those that are float32.
        last: whether images are channels_last.
        dtypes: of the call.
        order: of the derivatives that are compared, 0 to 2.
    """

    run: Callable[..., Tensor]
    maps: Sequence[tuple[int, ...]]
    vectors: Sequence[tuple[int, ...]] = ()
    last: bool = False
    dtypes: Sequence[torch.dtype] = DTYPES
    order: int = 1

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """As the op gets them, on the CPU."""
        generator = torch.Generator().manual_seed(0)
        maps = [torch.randn(shape, generator=generator).to(dtype) for shape in self.maps]
        if self.last:
            maps = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in maps]
        return [*maps, *(torch.randn(shape, generator=generator) for shape in self.vectors)]


def derivatives(call: Call, inputs: Sequence[Tensor], backend: str | None) -> list[Tensor]:
    """The result; the gradients of its inner product with something fixed; theirs."""
    generator = torch.Generator().manual_seed(1)

    def product(tensors: Sequence[Tensor]) -> Tensor:
        # In float64: what is compared is the op's rounding, not that of this sum.
        factors = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device) for x in tensors]
        return sum((x.double() * factor).sum() for x, factor in zip(tensors, factors, strict=True))

    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with fastgan.backend(backend) if backend else contextlib.nullcontext():
        found = results = [call.run(*leaves)]
        for order in range(call.order):
            last = order + 1 == call.order
            results = torch.autograd.grad(product(results), leaves, create_graph=not last, materialize_grads=True)
            found = [*found, *results]
    return [x.detach() for x in found]


# What rounds to the clamp's bound has another slope than what lies beneath it: derivatives are compared without one.
def _modulated(clamp: float | None) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, style: Tensor, noise: Tensor, bias: Tensor) -> Tensor:
        epilogue = ops.Epilogue(noise=noise, noise_strength=0.3, bias=bias, act="lrelu", clamp=clamp)
        return ops.modulated_conv2d(x, weight, style, padding=1, epilogue=epilogue)

    return run


def _resampled(taps: int, clamp: float | None = None, **options: object) -> Callable[..., Tensor]:
    def run(x: Tensor, bias: Tensor) -> Tensor:
        fir = torch.arange(1.0, 1 + taps, device=x.device) / taps**2
        return ops.upfirdn2d(x, fir, epilogue=ops.Epilogue(bias=bias, act="lrelu", clamp=clamp), **options)

    return run


def _sigma(order: str, dim: int) -> Callable[..., Tensor]:
    def run(*weights: Tensor) -> Tensor:
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        us = [F.normalize(torch.arange(1.0, 1 + w.shape[dim]).to(w.device, wide), dim=0) for w in weights]
        vs = [F.normalize(torch.ones(w.numel() // w.shape[dim], device=w.device, dtype=wide), dim=0) for w in weights]
        return ops.spectral_sigma(weights, us, vs, n_iter=2, order=order, dims=[dim] * len(weights))

    return run


def _filtered(up: int, down: int, **options: float) -> Callable[..., Tensor]:
    def run(x: Tensor, bias: Tensor) -> Tensor:
        fu, fd = (torch.hann_window(6 * n + 2, device=x.device)[1:-1] for n in (up, down))
        padding = 3 * (up + down)
        return ops.filtered_lrelu(x, fu / fu.sum(), fd / fd.sum(), bias, up=up, down=down, padding=padding, **options)

    return run


def _patch(mode: str, **options: object) -> Callable[..., Tensor]:
    return lambda *maps: ops.patch_loss(maps[: len(maps) // 2], maps[len(maps) // 2 :], mode=mode, **options).loss


def _features(kind: str) -> Callable[..., Tensor]:
    return lambda *maps: ops.feature_matching_loss(maps[: len(maps) // 2], maps[len(maps) // 2 :], kind=kind)


_CRITIC = [(2, 1, 30, 30), (2, 1, 14, 14), (2, 1, 7, 5)] * 2
_MAPS = [(2, 24, 32, 32), (2, 40, 9, 7)] * 2

CALLS = {
    **{
        f"modulated_conv2d {name}": Call(_modulated(None if order else 2.0), [x, (c_out, x[1], 3, 3)],
                                         [x[:2], x[2:], (c_out,)], True, HALF, order)
        for name, x, c_out, order in [
            ("of a few tiles", (2, 64, 16, 16), 64, 1),
            ("with tails", (1, 40, 13, 9), 24, 0),
            ("of many tiles", (1, 128, 64, 64), 128, 0),
        ]
    },
    **{
        f"upfirdn2d {name}{', NHWC' if last else ''}": Call(run, [(2, 19, 23, 18)], [(19,)], last, order=order)
        for last in (False, True)
        for name, run, order in [
            ("blur", _resampled(4, padding=1), 2),
            ("blur, clamped", _resampled(4, 1.0, padding=1), 0),
            ("up 2", _resampled(4, up=2, padding=(2, 1), gain=4), 2),
            ("down 2", _resampled(4, down=2, padding=1), 2),
            ("up 2 of 12 taps", _resampled(12, up=2, padding=6), 2),
            ("other factors, cropped", _resampled(5, up=(3, 1), down=(2, 3), padding=(-1, 2, 3, -2)), 2),
        ]
    },
    **{
        f"filtered_lrelu up {up}, down {down}": Call(_filtered(up, down, clamp=1.5), [(2, 5, 20, 17)], [(5,)], order=2)
        for up, down in [(2, 2), (4, 2), (1, 2), (3, 1)]
    },
    **{
        f"norm_act {kind} {shape}{', NHWC' if last else ''}": Call(
            lambda x, weight, bias, kind=kind: ops.norm_act(x, kind=kind, weight=weight, bias=bias, act="lrelu"),
            [shape], [(shape[1],), (shape[1],)], last, order=2)
        for kind in ("instance", "batch")
        for shape in [(3, 5, 9, 7), (2, 16, 64, 64), (1, 3, 200, 150)]
        for last in (False, True)
    },
    **{f"patch_loss {mode}": Call(_patch(mode), _CRITIC) for mode in ("vanilla", "lsgan", "wgan", "hinge")},
    "patch_loss generator": Call(_patch("vanilla", side="generator"), _CRITIC),
    "patch_loss paired": Call(_patch("hinge", paired=True), _CRITIC),
    **{f"feature_matching_loss {kind}": Call(_features(kind), _MAPS) for kind in ("l1", "l2")},
    "feature_matching_loss, NHWC": Call(_features("l1"), _MAPS, last=True),
    **{
        f"spectral_sigma {order}, dim {dim}": Call(_sigma(order, dim), [(13, 7, 3, 3), (40, 24, 4, 4), (5, 300)])
        for order in ("parametrization", "hook")
        for dim in (0, 1)
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, call in CALLS.items() for dtype in call.dtypes])
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    call = CALLS[name]
    inputs = call.inputs(dtype)
    exact = derivatives(call, [x.double() for x in inputs], "reference")
    eager = derivatives(call, inputs, "reference")
    fused = derivatives(call, [x.to(DEVICE) for x in inputs], BACKEND)
    for i, (got, plain, want) in enumerate(zip(fused, eager, exact, strict=True)):
        # Derivatives run through several roundings, those of vectors too.
        floor = (1 if i == 0 else 4) * FLOORS[dtype]
        assert_close_to_float64(got.cpu(), plain, want, floor=floor, what=f"{name}, tensor {i}")


@pytest.mark.parametrize("name", CALLS)
def test_every_call_gives_the_same_bits(name: str) -> None:
    call = CALLS[name]
    inputs = [x.to(DEVICE) for x in call.inputs(call.dtypes[-1])]
    first, second = (derivatives(call, inputs, BACKEND) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
