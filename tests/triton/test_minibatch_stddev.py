"""minibatch_stddev on Triton, under its interpreter: value, gradient and second order against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastgan
from fastgan import ops
from fastgan.kernels import _launch
from fastgan.kernels import minibatch_stddev as kernel
from tests.helpers import assert_close_to_float64, gradients, layouts

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SIZES = [(4, 4, 1), (6, 3, 2), (2, 4, 1), (4, 2, 4)]  # N, group_size, num_channels


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("n", "group_size", "num_channels"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_accuracy(n: int, group_size: int, num_channels: int, dtype: torch.dtype) -> None:
    """Value and gradient in every layout; the statistic by itself too, since beside x its error would not show."""
    options = {"group_size": group_size, "num_channels": num_channels}
    for name, x in layouts(image(n, 4, 3, 5).to(dtype)).items():
        if name == "expanded":  # no deviation but √eps
            continue
        exact = gradients(lambda x: ops.minibatch_stddev(x, **options, backend="reference"), [x.double()])
        fused = gradients(lambda x: ops.minibatch_stddev(x, **options, backend="triton"), [x])
        plain = gradients(lambda x: ops.minibatch_stddev(x, **options, backend="reference"), [x])
        triples = [*zip(fused, plain, exact, strict=True), [result[0][:, 4:] for result in (fused, plain, exact)]]
        for got, other, want in triples:
            assert_close_to_float64(got, other, want, floor=FLOOR[dtype], what=name)


def test_values_of_several_blocks() -> None:
    x = image(2, 70, 6, 7).float()
    for view in (x, x.contiguous(memory_format=torch.channels_last)):
        got, want = (ops.minibatch_stddev(view, backend=name) for name in ("triton", "reference"))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_second_order() -> None:
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        x = image(4, 2, 1, 3).to(dtype).requires_grad_()
        y = ops.minibatch_stddev(x, group_size=2, eps=0.1, backend=backend)
        (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((first**3).sum(), x)[0])
    assert_close_to_float64(results[0], results[0], results[1], floor=1e-5)


def test_one_launch_each_way() -> None:
    x = image(4, 2, 3, 3).half().requires_grad_()
    with _launch.recorded() as launches:
        ops.minibatch_stddev(x).sum().backward()
    assert [launch.kernel for launch in launches] == [
        kernel.minibatch_stddev_kernel,
        kernel.minibatch_stddev_grad_kernel,
    ]
    assert [launch.bytes for launch in launches] == [2 * (72 + 108), 2 * (108 + 72 + 72)]
    assert ops.minibatch_stddev(torch.empty(0, 2, 3, 3), backend="triton").shape == (0, 3, 3, 3)


def test_opcheck_and_choice() -> None:
    x = image(4, 2, 2, 2).float().requires_grad_()
    torch.library.opcheck(torch.ops.fastgan.minibatch_stddev.default, (x, 2, 1, 1e-4))
    g = torch.randn(4, 3, 2, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.fastgan.minibatch_stddev_grad.default, (g, x, 2, 1, 1e-4))
    assert fastgan.explain("minibatch_stddev", x).backend == "triton"


def test_shipped_launches_are_planned() -> None:
    for label, launches in kernel.shipped():
        assert len(launches) == 1 and launches[0].bytes > 0, label
