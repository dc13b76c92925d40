"""upfirdn2d on Triton, under its interpreter: values, gradients and second order against the float64 reference.

The interpreter proves indices, masks, taps and sums; how often device memory is read for what neighbouring pixels share
is the cache's doing, which neither it nor the modelled bytes show.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastgan
from fastgan import ops
from fastgan.kernels import _launch
from fastgan.kernels import upfirdn2d as kernel
from tests.helpers import assert_close_to_float64, gradients, layouts

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
FIR = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
FULL = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 3.0]])
CASES = {
    "behind a transposed convolution": {"f": FIR, "padding": 1, "gain": 4.0},
    "before a stride-2 convolution": {"f": torch.outer(FIR, FIR), "padding": 2},
    "up": {"f": torch.outer(FIR, FIR), "up": 2, "padding": (2, 1), "gain": 4.0},
    "down": {"f": FIR, "down": 2, "padding": 1},
    "both, cropped": {"f": FULL, "up": (3, 2), "down": (2, 3), "padding": (4, -1, 3, 2), "flip_filter": True},
    "long filter": {"f": torch.linspace(-1, 2, 9), "padding": 4, "up": (1, 2)},
    "no filter": {"f": None, "up": (2, 1), "down": (1, 2), "padding": (1, 0, -1, 2)},
}


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(x, noise, strength, bias, residual=None, *, options: dict, act: str, backend: str) -> Tensor:
    epilogue = ops.Epilogue(noise, strength, bias, act, residual=residual, residual_gain=0.7)
    return ops.upfirdn2d(x, epilogue=epilogue, backend=backend, **options)


def make_leaves(x: Tensor, options: dict, residual: bool) -> list[Tensor]:
    n, c, h, w = ops.upfirdn2d(x, **options, backend="reference").shape
    leaves = [x, image(n, 1, h, w, seed=1), torch.tensor(0.3, dtype=torch.float64), image(c, seed=2)]
    return [*leaves, image(n, c, h, w, seed=3)] if residual else leaves


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    """Value and every gradient, in every layout; lrelu from its result, and with a residual from what it hides."""
    options = CASES[name]
    for (layout, x), residual in zip(layouts(image(2, 3, 4, 5).to(dtype)).items(), (0, 1, 1, 0), strict=True):
        leaves = make_leaves(x.double(), options, bool(residual))
        mixed = [x, *[t.float() for t in leaves[1:4]], *[t.to(dtype) for t in leaves[4:]]]
        leaves = [t.double() for t in mixed]

        def function(*given: Tensor, backend: str) -> Tensor:
            return run(*given, options=options, act="lrelu", backend=backend)

        exact = gradients(lambda *t: function(*t, backend="reference"), leaves)
        fused = gradients(lambda *t: function(*t, backend="triton"), mixed)
        plain = gradients(lambda *t: function(*t, backend="reference"), mixed)
        for i, (got, other, want) in enumerate(zip(fused, plain, exact, strict=True)):
            # The one scalar is measured against the root sum of squares of its terms: how much they cancel is luck.
            terms = float(exact[2].norm() / 0.3 / want.abs()) if want.ndim == 0 else 0.25
            assert_close_to_float64(got, other, want, floor=4 * FLOOR[dtype] * terms, what=f"{layout} {i}")
        assert fused[0].is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("act", ["linear", "swish"])
def test_second_order(name: str, act: str) -> None:
    options, results = CASES[name], []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in make_leaves(image(1, 2, 3, 4), options, residual=True)]
        y = run(*leaves, options=options, act=act, backend=backend)
        first = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, want in zip(*results, strict=True):
        assert_close_to_float64(got, got, want, floor=1e-5)


@pytest.mark.parametrize("shape", [(1, 70, 3, 3), (1, 3, 2, 67), (2, 1, 67, 2), (3, 2, 1, 1)])
def test_several_tiles(shape: tuple[int, ...]) -> None:
    for x in (image(*shape).float(), image(*shape).float().contiguous(memory_format=torch.channels_last)):
        for options in (CASES["behind a transposed convolution"], CASES["up"]):
            options = options | {"padding": 2}
            got, want = (ops.upfirdn2d(x, **options, backend=name) for name in ("triton", "reference"))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_one_launch_with_its_epilogue() -> None:
    x = image(2, 3, 4, 5).float().requires_grad_()
    epilogue = ops.Epilogue(
        image(2, 1, 8, 10).float(), 0.1, image(3).float(), "lrelu", residual=image(2, 3, 8, 10).float()
    )
    with _launch.recorded() as launches:
        y = ops.upfirdn2d(x, FIR, up=2, padding=(2, 1), gain=4, epilogue=epilogue)
    assert [launch.kernel for launch in launches] == [kernel.upfirdn2d_kernel]
    # x, result, residual, noise; filter, bias and strength.
    assert launches[0].bytes == 4 * (120 + 480 + 480 + 160 + 4 + 3 + 1)
    plain = ops.upfirdn2d(x, FIR, up=2, padding=(2, 1))
    with _launch.recorded() as launches:
        torch.autograd.grad(plain.sum(), x)
    assert [launch.kernel for launch in launches] == [kernel.upfirdn2d_kernel]
    assert y.shape == plain.shape


def test_empty_and_nan() -> None:
    assert ops.upfirdn2d(torch.empty(0, 2, 3, 3), FIR, padding=2, backend="triton").shape == (0, 2, 4, 4)
    x = image(2, 3, 5, 5).float()
    x[0, 1, 2, 2] = torch.nan
    y = ops.upfirdn2d(x, FIR, up=2, padding=(2, 1), backend="triton")
    want = ops.upfirdn2d(x, FIR, up=2, padding=(2, 1), backend="reference")
    # The reference multiplies inserted zeros by NaN; here only pixels that a tap meets count.
    assert y[0, 1].isnan().any() and not (y.isnan() & ~want.isnan()).any()
    assert y[1].isfinite().all() and y[0, ::2].isfinite().all()


def test_beyond_31_bits() -> None:
    """Offsets within a sample are 64-bit where they need to be; the sample's own always are."""
    for shape, wide in (((100, 512, 256, 256), False), ((1, 1, 50000, 50000), True)):
        x = torch.empty(shape, dtype=torch.float16, device="meta")
        launch = kernel.plan(x, FIR.to("meta"), kernel.Resampling(padding=(2, 1, 2, 1)), kernel.Tail())[1]
        assert launch.constants["WIDE"] == wide


def test_opcheck() -> None:
    x, bias = image(1, 2, 3, 4).float().requires_grad_(), image(2).float().requires_grad_()
    options = ((2, 2), (1, 1), (2, 1, 2, 1), False, 4.0, "lrelu", 0.2, 1.4, None, 1.0)
    torch.library.opcheck(torch.ops.fastgan.upfirdn2d.default, (x, FIR, None, None, bias, None, *options))


def test_backend_choice() -> None:
    x = torch.ones(1, 1, 4, 4)
    assert fastgan.explain("upfirdn2d", x, FIR).backend == "triton"
    with pytest.raises(ValueError, match=r"'triton' .* f requires a gradient, which the reference alone computes"):
        ops.upfirdn2d(x, FIR.clone().requires_grad_(), backend="triton")


def test_shipped_launches_are_planned() -> None:
    for label, launches in kernel.shipped():
        assert len(launches) == 1 and launches[0].bytes > 0, label
