"""backend="cuda" of patch_loss and feature_matching_loss, as far as no GPU is needed: refusals, registration, fakes.

The kernels themselves run in tests/simt.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import CountOps
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastgan
from fastgan import ops
from fastgan.ops import _map_list, _patch_loss

# The module, not the function of the same name that the package exports.
_feature_matching = importlib.import_module("fastgan.ops.feature_matching_loss")
OPS = {"patch_loss": ops.patch_loss, "feature_matching_loss": ops.feature_matching_loss}
FAMILY = ("", "_bwd", "_bwd_bwd")


def patch_twin(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    weight = torch.ones(2, device=real[0].device)
    return _patch_loss.forward_cuda(real, fake, weight, [0.5, 2.0], "bce", 1.0, 0.0, 0.0, False, True, True)[0]


def matching_twin(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    return _feature_matching._forward_cuda(fake, real, [], [0.5, 2.0], "l2", False)[0]


TWINS = {"patch_loss": patch_twin, "feature_matching_loss": matching_twin}


def make_maps(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """The second map is channels_last."""
    shapes = [(2, 3, 5, 7), (2, 4, 3, 3)]
    sides = [[torch.randn(shape, device=device).to(dtype) for shape in shapes] for _ in range(2)]
    return tuple([first, second.contiguous(memory_format=torch.channels_last)] for first, second in sides)


@pytest.mark.parametrize("name", OPS)
def test_it_says_why_it_cannot_run(name: str) -> None:
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=rf"{name}: backend 'cuda' .* it runs on cuda tensors, got cpu"):
        OPS[name](x, x, backend="cuda")
    decision = fastgan.explain(name, x, x)
    assert decision.reasons["cuda"] == "it runs on cuda tensors, got cpu"
    assert decision.backend != "cuda"


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    small, large = torch.empty(2, 5, device="meta"), torch.empty(2, 2**31, device="meta")
    wrong = _map_list.cuda_can_run(device, torch.float64, [small])
    assert wrong == "it takes float32, bfloat16 and float16, got torch.float64"
    monkeypatch.setattr(fastgan.backends, "cuda_can_run", lambda device, dtype: None)
    assert _map_list.cuda_can_run(device, torch.float32, [small, torch.empty(0, 3)]) is None
    reason = _map_list.cuda_can_run(device, torch.float32, [small, large])
    assert reason == "it takes less than 2147483648 elements per sample, got 2147483648"


@pytest.mark.parametrize("name", OPS)
def test_a_loss_is_differentiated_where_it_was_computed(name: str) -> None:
    """Value and gradients of both orders, on the ops that stand in for the kernels where no GPU is."""
    found = []
    for twin in (True, False):
        torch.manual_seed(0)
        real, fake = ([x.double().requires_grad_() for x in maps] for maps in make_maps())
        with CountOps() as count:
            if twin:
                loss = TWINS[name](real, fake)
            elif name == "patch_loss":
                options = {"map_weight": [0.5, 2.0], "over_maps": "sum", "backend": "cpp"}
                loss = ops.patch_loss(real, fake, sample_weight=torch.ones(2), **options).loss
            else:
                loss = ops.feature_matching_loss(fake, real, kind="l2", map_weight=[0.5, 2.0], backend="cpp")
            first = torch.autograd.grad(loss, [*real, *fake], create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), [*real, *fake])
        called = {op: calls for op, calls in count.calls.items() if op.startswith("fastgan.")}
        assert called == {f"fastgan.{name}{part}{'_cuda' if twin else ''}": 1 for part in FAMILY}
        found.append([loss, *first, *second])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shapes_dtypes_and_orders_of_cuda_tensors_without_a_gpu(name: str, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        real, fake = make_maps(dtype, "cuda")
        loss = TWINS[name](real, fake)
        assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "cuda")
        backward = backward_of(name)
        gradients = backward(loss, real, fake)
        assert [(g.shape, g.dtype, g.device, g.stride()) for g in gradients] == [
            (x.shape, x.dtype, x.device, x.stride()) for x in (*real, *fake)
        ]


def backward_of(name: str) -> Callable[..., list[Tensor]]:
    """The registered gradient op of the twin, without an engine, which has no thread for a GPU that is not there."""
    ops_of = torch.ops.fastgan
    if name == "patch_loss":
        return lambda grad, real, fake: ops_of.patch_loss_bwd_cuda(
            grad, grad.new_empty(sum(x.numel() for x in (*real, *fake))), real, fake, None, [1.0] * 2, "bce",
            False, True, True,
        )  # fmt: skip
    return lambda grad, real, fake: ops_of.feature_matching_loss_bwd_cuda(
        grad, grad.new_empty(0, dtype=torch.int32), grad.new_empty(2), real, fake, [], "l2", True, True
    )


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    real, fake = ([x.requires_grad_() for x in maps] for maps in make_maps())
    if name == "patch_loss":
        arguments = (real, fake, None, [1.0, 2.0], "bce", 1.0, 0.0, 0.0, False, True, True)
    else:
        arguments = (fake, real, [], [1.0, 2.0], "l1", True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.fastgan, f"{name}_cuda").default, arguments, test_utils=checks)
