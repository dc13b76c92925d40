"""What of norm_act's CUDA backend shows without a GPU: its choice, its ops' schemas, shapes and gradients.

The kernels themselves run in tests/simt/test_simt_norm_act.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import fastgan
from fastgan import ops
from fastgan.ops import norm_act as function

twin = torch.ops.fastgan.norm_act_cuda.default
grad_twin = torch.ops.fastgan.norm_act_grad_cuda.default
SETTINGS = (0.1, "tanh", 0.0, 1.3)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(kind: str) -> tuple[list[Tensor], list[Any]]:
    """x, weight and bias, which have gradients, and the rest of the op's arguments."""
    leaves = [random(2, 3, 2, 3), random(2, 3, seed=1), random(3, seed=2)]
    given = [random(3, seed=3), random(3, seed=4).square() + 0.5] if kind == "given" else [None, None]
    return [t.requires_grad_() for t in leaves], [*given, kind != "instance", *SETTINGS]


def test_it_says_why_it_cannot_run() -> None:
    x = torch.ones(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"norm_act: backend 'cuda' .* it runs on cuda tensors, got cpu"):
        ops.norm_act(x, backend="cuda")
    decision = fastgan.explain("norm_act", x)
    assert decision.backend == "cpp"
    assert decision.reasons["cuda"] == "it runs on cuda tensors, got cpu"


def test_float64_has_no_kernel() -> None:
    reason = fastgan.backends.cuda_can_run(torch.device("cuda"), torch.float64)
    assert reason == "it takes float32, bfloat16 and float16, got torch.float64"


@pytest.mark.parametrize("kind", ["instance", "batch", "given"])
def test_the_gradients_of_the_twin_are_the_ops(kind: str) -> None:
    """Where no kernel is, plain torch serves both, and their gradients must be the same formulas."""
    leaves, rest = inputs(kind)
    assert gradcheck(lambda *t: twin(*t, *rest)[0], leaves)
    assert gradgradcheck(lambda *t: twin(*t, *rest)[0], leaves)


@pytest.mark.parametrize("kind", ["instance", "batch", "given"])
def test_the_gradient_stays_with_the_kernels_of_the_call(kind: str) -> None:
    leaves, rest = inputs(kind)
    called = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record():
        y = twin(*leaves, *rest)[0]
        first = torch.autograd.grad(y.sum(), leaves, create_graph=True)
        sum(g.square().sum() for g in first).backward()
    names = [name.split(".")[1] for name in called if name.startswith("fastgan.norm")]
    assert names == ["norm_act_cuda", "norm_act_grad_cuda", "norm_act_grad_grad"]


@pytest.mark.parametrize("kind", ["instance", "batch", "given"])
def test_opcheck(kind: str) -> None:
    leaves, rest = inputs(kind)
    torch.library.opcheck(twin, (*leaves, *rest))
    mean, var, *settings = rest
    if mean is None:
        mean, var = twin(*(t.detach() for t in leaves), *rest)[1:]
    gy = random(2, 3, 2, 3, seed=5).requires_grad_()
    fixed = kind == "given"
    arguments = (gy, *leaves, mean, var, settings[0], fixed, *settings[1:])
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    torch.library.opcheck(grad_twin, (*arguments, True, True, True), test_utils=checks)


@pytest.mark.parametrize("kind", ["instance", "batch"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_shapes_on_a_gpu_that_is_not_there(
    kind: str, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A build without CUDA would say so instead.
    monkeypatch.setitem(function.__globals__["_BACKENDS"], "cuda", fastgan.backends.always)
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 6, device="cuda", dtype=torch.float16).to(memory_format=memory_format)
        weight = torch.empty(2, 3, device="cuda")
        running = (torch.zeros(3, device="cuda"), torch.ones(3, device="cuda"), 0.1) if kind == "batch" else None
        y = ops.norm_act(x, kind=kind, weight=weight, running=running, act="lrelu", backend="cuda")
        statistics = [torch.empty(3 if kind == "batch" else (2, 3), device="cuda", dtype=torch.float64)] * 2
        # autograd's engine would ask the device itself.
        settings = (kind == "batch", False, 1e-5, "lrelu", 0.2, 1.0)
        grad_x, grad_weight, none = grad_twin(y, x, weight, None, *statistics, *settings, True, True, False)
    for image in (y, grad_x):
        assert (image.shape, image.dtype, image.device.type) == (x.shape, torch.float16, "cuda")
        assert image.is_contiguous(memory_format=memory_format)
    assert (grad_weight.shape, grad_weight.dtype) == (weight.shape, torch.float32)
    assert none.shape == (0,)
