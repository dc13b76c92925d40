"""epilogue_grad on Triton, under its interpreter: against its parts in float64, for every subset that may be asked."""

from __future__ import annotations

import itertools

import pytest
import torch
from fastgan.kernels._launch import recorded

from fastgan.kernels import _tiles
from fastgan.ops.epilogue_grad import _fallback, epilogue_grad

SHAPE = (2, 5, 3, 7)


def operands(shape=SHAPE, layout=torch.contiguous_format) -> tuple[torch.Tensor, ...]:
    images = [torch.randn(shape).contiguous(memory_format=layout) for _ in range(3)]
    return *images, torch.randn(shape[0], 1, *shape[2:])


@pytest.mark.parametrize("act", ["linear", "lrelu", "softplus"])
def test_every_subset_against_the_parts_in_float64(act):
    for with_product, with_noise, want_bias, layout in itertools.product(
        (False, True), (False, True), (False, True), (torch.contiguous_format, torch.channels_last)
    ):
        grad_y, ref, product, noise = operands(layout=layout)
        args = (grad_y, None if act == "linear" else ref, product if with_product else None)
        args += (noise if with_noise else None,)
        settings = (act, 0.2, 1.5, None if act == "linear" else 2.0, True, want_bias)
        want = _fallback(*[t if t is None else t.double() for t in args], *settings)
        with recorded() as launches:
            got = epilogue_grad(*args, *settings)
        assert [launch.kernel.__name__ for launch in launches] == ["epilogue_grad_kernel", "epilogue_sums_kernel"]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=2e-5)


def test_split_pixels_in_half_precision_give_the_same_bits_every_time(monkeypatch):
    monkeypatch.setattr(_tiles, "BUSY", 4)
    grad_y, ref, product, noise = operands((2, 3, 33, 70), torch.channels_last)
    args = (grad_y.half(), ref.half(), product, noise, "lrelu", 0.2, 1.4, 1.0, True, True)
    with recorded() as launches:
        first, second = epilogue_grad(*args), epilogue_grad(*args)
    assert launches[0].arguments["splits"] > 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    want = _fallback(args[0].double(), args[1].double(), product.double(), noise.double(), *args[4:])
    for a, b in zip(first[1:], want[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)


def test_identity_writes_nothing():
    grad_y, _, product, _ = operands()
    g, *_ = epilogue_grad(grad_y, None, product, None, "linear", 0.0, 1.0, None, True, False)
    assert g.numel() == 0


def test_empty_batch():
    grad_y, ref, product, noise = operands((0, 4, 2, 2))
    g, scale, bias, strength = epilogue_grad(grad_y, ref, product, noise, "tanh", 0.0, 1.0, None, True, True)
    assert g.shape == (0, 4, 2, 2) and scale.shape == (0, 4)
    assert torch.equal(bias, torch.zeros(4)) and strength.item() == 0.0


def test_gradients_of_every_result():
    """All four results weighed at random, differentiated by all four tensors, against the parts in float64."""
    results = []
    for wide, function in ((torch.float32, epilogue_grad), (torch.float64, epilogue_grad)):
        torch.manual_seed(1)
        leaves = [t.to(wide).requires_grad_() for t in operands()]
        outputs = function(*leaves, "softplus", 0.0, 1.2, None, False, True)
        total = sum((out * torch.randn(out.shape).to(wide)).sum() for out in outputs)
        results.append(torch.autograd.grad(total, leaves))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    torch.manual_seed(1)
    leaves = [t.double().requires_grad_() for t in operands()]
    assert torch.autograd.gradcheck(
        lambda *t: epilogue_grad(*t, "softplus", 0.0, 1.2, None, False, True), leaves, fast_mode=True
    )
