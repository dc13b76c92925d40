"""activation_grad on Triton, under its interpreter: both orders of every activation, and how strides merge."""

from __future__ import annotations

import pytest
import torch
from fastgan.kernels._launch import recorded

from fastgan.kernels import activation_grad as kernel
from fastgan.ops.activation_grad import _fallback, activation_grad
from fastgan.reference.activation import ACTIVATIONS, activate


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("order", [1, 2])
def test_both_orders_against_the_formula_in_float64(act, order):
    z = torch.linspace(-3, 3, 24).reshape(1, 2, 3, 4)
    g = torch.linspace(2, -1, 24).reshape(1, 2, 3, 4)
    for clamp, gain in ((None, 1.3), (0.875, 0.5)):
        sources = [(z, False)]
        if ACTIVATIONS[act].invertible:
            sources.append((activate(z, act, 0.2, gain, clamp), True))
        for ref, from_output in sources:
            settings = (act, 0.2, gain, clamp, from_output, order)
            want = _fallback(g.double(), ref.double(), *settings)
            torch.testing.assert_close(activation_grad(g, ref, *settings).double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_clamp_holds_though_its_value_was_rounded(dtype):
    y = activate(torch.linspace(-3, 3, 25), "lrelu", 0.2, 0.7, 0.9).to(dtype)
    grad = activation_grad(torch.ones(25), y, "lrelu", 0.2, 0.7, 0.9, True, 1)
    assert torch.equal(grad == 0, y.abs() == y.max())


def test_strides_and_dtypes():
    dense = torch.randn(2, 6, 4, 6)
    nhwc = dense.contiguous(memory_format=torch.channels_last)
    pairs = {
        "dense": (dense, dense + 1),
        "one layout each": (dense, nhwc),
        "expanded cotangent": (torch.ones(()).expand(2, 6, 4, 6), nhwc),
        "sliced": (dense[:, ::2, 1:, ::2], nhwc[:, ::2, 1:, ::2]),
        "vector": (dense.flatten(), dense.flatten() + 1),
        "scalar": (dense[0, 0, 0, 0], dense[0, 0, 0, 1]),
        "empty": (dense[:0], nhwc[:0]),
    }
    for g, ref in pairs.values():
        for dtype in (torch.float32, torch.bfloat16):
            want = _fallback(g.to(dtype), ref, "tanh", 0.0, 1.0, None, False, 1)
            with recorded() as launches:
                got = activation_grad(g.to(dtype), ref, "tanh", 0.0, 1.0, None, False, 1)
            assert len(launches) == (ref.numel() > 0)
            assert got.dtype == dtype and got.stride() == torch.empty_like(ref).stride()
            torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_dimensions_merge_where_memory_allows():
    nhwc = torch.empty(2, 6, 4, 6).contiguous(memory_format=torch.channels_last).stride()
    assert kernel.merged_dims((2, 6, 4, 6), [nhwc, nhwc]) == ([288], [[1], [1]])
    cut = torch.empty(2, 8, 4, 6).contiguous(memory_format=torch.channels_last)[:, :6].stride()
    assert kernel.merged_dims((2, 6, 4, 6), [cut, nhwc]) == ([48, 6], [[8, 1], [6, 1]])


def test_more_dimensions_than_the_kernel_walks_run_on_the_fallback():
    ref = torch.randn(3, 3, 3, 3, 3, 2)[..., 0].permute(4, 1, 3, 0, 2)[:2, :2, :2, :2, :2]
    g = torch.randn(2, 2, 2, 2, 2)
    with recorded() as launches:
        got = activation_grad(g, ref, "tanh", 0.0, 1.0, None, False, 1)
    assert launches == []
    torch.testing.assert_close(got, _fallback(g, ref, "tanh", 0.0, 1.0, None, False, 1))
