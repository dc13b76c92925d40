"""The backend "cuda" of scaled_conv2d and modulated_conv2d: what it takes, its results' layout, and its gradients.

Its kernel's values are tests/simt's; here its op runs on plain torch, which stands in for it on the CPU.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastgan
from fastgan import ops
from fastgan.ops import _tensor_core_conv
from fastgan.ops._tensor_core_conv import ConvFacts, tensor_core_can_run
from tests.helpers import gradients

GEOMETRY = ((1, 1), (1, 1), (0, 0), (1, 1), False, 1, "fp32")
LRELU = ("lrelu", 0.2, 2.0**0.5, None, 1.0)
CUDA = torch.device("cuda")


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where backend "cuda" is there."""
    monkeypatch.setattr(_tensor_core_conv.backends, "cuda_can_run", lambda device, dtype, **facts: None)


def test_cpu_tensors_are_refused_with_the_reason() -> None:
    x, weight, style = torch.randn(1, 8, 4, 4).half(), torch.randn(8, 8, 3, 3).half(), torch.randn(1, 8)
    for call in (
        lambda: ops.scaled_conv2d(x, weight, padding=1, backend="cuda"),
        lambda: ops.modulated_conv2d(x, weight, style, padding=1, backend="cuda"),
    ):
        with pytest.raises(ValueError, match=r"backend 'cuda' .* it runs on cuda tensors, got cpu"):
            call()
    assert fastgan.explain("modulated_conv2d", x, weight, style, padding=1).backend != "cuda"


@pytest.mark.parametrize(
    ("dtype", "change", "reason"),
    [
        (torch.float32, {}, "it takes float16 and bfloat16, got torch.float32"),
        (torch.float16, {"weight": (8, 8, 1, 1)}, "it takes a kernel of 3x3, got 1x1"),
        (torch.float16, {"plain": False}, "without resampling"),
        (torch.float16, {"padding": (0, 1, 1, 1)}, r"a padding of 1 with zeros, got \(0, 1, 1, 1\)"),
        (torch.bfloat16, {"weight": (3, 8, 3, 3)}, "multiples of 8 channels, got C_in = 8 and C_out = 3"),
        (torch.bfloat16, {"weight": (8, 12, 3, 3)}, "multiples of 8 channels, got C_in = 12 and C_out = 8"),
        (torch.float16, {"act": "softplus"}, "one of linear, relu, lrelu, got softplus"),
        (torch.float16, {"residual": True}, "no residual"),
    ],
)
def test_reasons(common: None, dtype: torch.dtype, change: dict, reason: str) -> None:
    taken = ConvFacts((8, 8, 3, 3), plain=True, padding=(1, 1, 1, 1), act="lrelu", residual=False)
    assert tensor_core_can_run(CUDA, torch.float16, conv=taken) is None
    got = tensor_core_can_run(CUDA, dtype, conv=taken._replace(**change))
    assert got is not None
    assert re.search(reason, got), got


def test_an_old_gpu_is_refused(common: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = ConvFacts((8, 8, 3, 3), plain=True, padding=(1, 1, 1, 1), act="linear", residual=False)
    for capability, taken in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert (tensor_core_can_run(CUDA, torch.float16, conv=facts) is None) == taken


@pytest.mark.parametrize("save", [False, True])
def test_fake_tensors(common: None, save: bool) -> None:
    """Through the public function: an NCHW image too becomes a channels_last result."""
    with FakeTensorMode():
        x = torch.empty(2, 16, 5, 6, dtype=torch.float16, device="cuda")
        weight = torch.empty(24, 16, 3, 3, dtype=torch.float16, device="cuda")
        style = torch.empty(2, 16, device="cuda", requires_grad=save)
        epilogue = ops.Epilogue(noise=torch.empty(5, 6, device="cuda"), act="lrelu")
        y = ops.modulated_conv2d(x, weight, style, padding=1, epilogue=epilogue, backend="cuda")
    assert y.shape == (2, 24, 5, 6) and y.dtype == torch.float16 and y.device.type == "cuda"
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.requires_grad == save


def operands(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 4, 5), (8, 8, 3, 3), (2, 8), (2, 8), (1, 1, 4, 5), (), (8,))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [t.contiguous(memory_format=torch.channels_last) for t in tensors[:2]] + tensors[2:]


@pytest.mark.parametrize("order", [1, 2])
def test_gradients_are_the_ordinary_op_s(order: int) -> None:
    results = []
    for op in (torch.ops.fastgan.scaled_conv2d.default, torch.ops.fastgan.scaled_conv2d_cuda.default):

        def run(*tensors: Tensor, op=op) -> Tensor:
            y, _ = op(*tensors, None, *GEOMETRY, *LRELU, True)
            if order == 1:
                return y
            first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
            return torch.cat([g.reshape(-1) for g in first])

        results.append(gradients(run, operands(torch.float64)))
    for ordinary, twin in zip(*results, strict=True):
        torch.testing.assert_close(twin, ordinary)


def test_opcheck() -> None:
    tensors = [t.requires_grad_() for t in operands(torch.float32)]
    for save in (False, True):
        arguments = (*tensors, None, *GEOMETRY, *LRELU, save)
        torch.library.opcheck(torch.ops.fastgan.scaled_conv2d_cuda.default, arguments)
