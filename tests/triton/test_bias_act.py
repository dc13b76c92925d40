"""bias_act on Triton, under its interpreter: values, gradients and second order against the float64 reference.

The interpreter runs each program in NumPy, so it proves indices, masks and formulas; it cannot show the GPU's own exp
and sqrt, which differ from NumPy's in the last place.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastgan
from fastgan import ops
from fastgan.kernels import _launch
from fastgan.kernels import bias_act as kernel
from fastgan.reference.activation import ACTIVATIONS
from tests.helpers import assert_close_to_float64, gradients, layouts

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def operands(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    return x, torch.randn(shape[1], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_accuracy(act: str, dtype: torch.dtype) -> None:
    """Value and gradients in every layout; clamp and a gain of either sign."""
    x, b = operands(2, 3, 5, 7)
    for (layout, view), gain in zip(layouts(x.to(dtype)).items(), (None, 1.3, -0.7, None), strict=True):
        options = {"act": act, "gain": gain, "clamp": 1.5 if dtype == torch.float32 else None}

        def run(x: Tensor, b: Tensor, backend: str, options=options) -> Tensor:
            return ops.bias_act(x, b, **options, backend=backend)

        exact = gradients(lambda x, b: run(x, b, "reference"), [view.double(), b])
        fused = gradients(lambda x, b: run(x, b, "triton"), [view, b.float()])
        plain = gradients(lambda x, b: run(x, b, "reference"), [view, b.float()])
        for name, got, other, want in zip(("y", "x", "b"), fused, plain, exact, strict=True):
            assert_close_to_float64(got, other, want, floor=FLOOR[dtype], what=f"{layout} {name}")


@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 5), 1), ((3, 5), 0), ((2, 3, 5), -1), ((2, 3, 32, 64), 1), ((2, 3, 37, 29), 1)]
)
def test_every_dimension_and_size(shape: tuple[int, ...], dim: int) -> None:
    """Also planes that are whole blocks, where a program has one channel, and planes that are not."""
    x = operands(*shape)[0].float()
    b = torch.randn(shape[dim])
    got, want = (ops.bias_act(x, b, dim=dim, act="lrelu", backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got, want = (ops.bias_act(x, act="relu", backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("act", ["lrelu", "tanh", "swish"])
def test_second_order(act: str) -> None:
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        x, b = (t.to(dtype).requires_grad_() for t in operands(2, 3, 2, 3))
        y = ops.bias_act(x, b, act=act, clamp=2.0, backend=backend)
        first = torch.autograd.grad((y**3).sum(), (x, b), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, b)))
    for got, want in zip(*results, strict=True):
        assert_close_to_float64(got, got, want, floor=1e-5)


def test_one_launch_that_reads_and_writes_each_element_once() -> None:
    x, b = operands(2, 3, 5, 7)
    with _launch.recorded() as launches:
        ops.bias_act(x.half(), b, act="lrelu")
    assert [launch.kernel for launch in launches] == [kernel.bias_act_kernel]
    assert launches[0].bytes == 2 * x.numel() * 2 + 3 * 4
    empty = ops.bias_act(torch.empty(0, 3, 2, 2), torch.ones(3), backend="triton")
    assert empty.shape == (0, 3, 2, 2)


def test_nan_and_large_values() -> None:
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4, float("nan")], requires_grad=True)
    for act in ACTIVATIONS:
        y = ops.bias_act(x, act=act, backend="triton")
        (grad,) = torch.autograd.grad(y[:4].sum(), x)
        assert y[:4].isfinite().all() and grad[:4].isfinite().all()
        assert y[4].isnan()


def test_beyond_31_bits() -> None:
    """Offsets are 64-bit where a tensor needs them; meta tensors have no memory."""
    for elements, wide in ((2**31 - 2048, False), (2**31, True)):
        x = torch.empty(1, 1, 1, elements, dtype=torch.float16, device="meta")
        launch = kernel.plan(x, None, 1, "relu", 0.0, 1.0, None)[1]
        assert launch.constants["WIDE"] == wide


def test_opcheck() -> None:
    x, b = (t.float().requires_grad_() for t in operands(2, 3, 4, 5))
    torch.library.opcheck(torch.ops.fastgan.bias_act.default, (x, b, 1, "swish", 0.0, 1.4, 0.9))


def test_backend_choice() -> None:
    assert fastgan.explain("bias_act", torch.ones(2)).backend == "triton"
    assert fastgan.explain("bias_act", torch.ones(2, dtype=torch.float64)).backend == "reference"
    with pytest.raises(ValueError, match=r"'triton' .* it takes float32, bfloat16 and float16, got torch.float64"):
        ops.bias_act(torch.ones(2, dtype=torch.float64), backend="triton")


def test_shipped_launches_are_planned() -> None:
    for label, launches in kernel.shipped():
        assert launches and all(launch.bytes > 0 for launch in launches), label
