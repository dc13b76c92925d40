"""What calls are checked once for: the same signature, and nothing that only resembles it."""

from __future__ import annotations

import pytest
import torch

import fastgan
from fastgan import ops
from fastgan.ops import _plans


@pytest.fixture(autouse=True)
def _no_plans() -> None:
    _plans.forget_plans()


def counted(**kwargs) -> int:
    """How many signatures there are after one call of bias_act, changed as ``kwargs`` say."""
    arguments = {"x": torch.randn(2, 4, 4, 4), "b": torch.randn(4), "act": "lrelu", **kwargs}
    ops.bias_act(**arguments)
    return len(_plans._found)


def test_a_signature_is_checked_once(monkeypatch) -> None:
    assert counted() == 1
    monkeypatch.setattr("fastgan.backends.choose", lambda *args, **facts: pytest.fail("checked again"))
    assert counted() == 1


@pytest.mark.parametrize(
    "change",
    [
        {"act": "relu"},
        {"b": None},
        {"x": torch.randn(2, 4, 4, 5)},
        {"x": torch.randn(2, 4, 4, 4, dtype=torch.float64)},
        {"b": torch.randn(4, dtype=torch.float64)},
        {"dim": 2},
        {"alpha": 0.1},
        {"gain": 1.0},
        {"clamp": 1.0},
        {"backend": "reference"},
    ],
    ids="-".join,
)
def test_another_signature_is_checked_anew(change) -> None:
    assert counted() == 1
    assert counted(**change) == 2


def test_the_backend_in_force_is_part_of_the_signature() -> None:
    assert counted() == 1
    with fastgan.backend("reference"):
        assert counted() == 2


def test_a_wrong_call_is_not_kept() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"bias_act: b must be \[C\] = \[4\], got \[3\]"):
            counted(b=torch.randn(3))
    assert not _plans._found


def test_explain_is_asked_every_time() -> None:
    x = torch.randn(2, 4)
    ops.bias_act(x)
    assert fastgan.explain("bias_act", x).op == "bias_act"


def test_options_that_cannot_be_hashed_are_checked_every_time() -> None:
    x, f = torch.randn(1, 2, 8, 8), torch.ones(4) / 4
    expected = ops.upfirdn2d(x, f, padding=(1, 2, 1, 2))
    before = len(_plans._found)
    torch.testing.assert_close(ops.upfirdn2d(x, f, padding=[1, 2, 1, 2]), expected, rtol=0, atol=0)
    assert len(_plans._found) == before
    with pytest.raises(ValueError, match="upfirdn2d: padding must be"):
        ops.upfirdn2d(x, f, padding=[1, 2, 1])


def test_a_filter_that_is_trained_changes_the_plan() -> None:
    x, f = torch.randn(1, 2, 8, 8), torch.ones(4) / 4
    ops.upfirdn2d(x, f)
    f.requires_grad_()
    (grad,) = torch.autograd.grad(ops.upfirdn2d(x, f).sum(), f)
    assert grad.shape == f.shape
    with torch.no_grad():
        assert not ops.upfirdn2d(x, f).requires_grad


def test_the_values_of_a_scalar_argument_are_not_kept() -> None:
    x, weight, style = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3), torch.ones(1, 3)
    noise = torch.ones(4, 4)

    def layer(strength: float, gain: float) -> torch.Tensor:
        epilogue = ops.Epilogue(noise=noise, noise_strength=strength)
        return ops.modulated_conv2d(x, weight, style, padding=1, input_gain=gain, demodulate=False, epilogue=epilogue)

    base = layer(0.0, 1.0)
    torch.testing.assert_close(layer(2.0, 1.0), base + 2)
    torch.testing.assert_close(layer(0.0, 3.0), base * 3)


def test_kept_plans_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr(_plans, "_MOST", 3)
    for n in range(1, 9):
        ops.pixel_norm(torch.randn(n, 2))
        assert 0 < len(_plans._found) <= 3
