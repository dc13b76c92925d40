"""Calls that an engine records once and runs one behind the other, without Python in between."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import infer
from fastgan.infer.verify import results_of
from fastgan.ops import _into
from fastgan.ops._into import Recording

# Place of the result among epilogue_into's arguments.
OUT = 11


def scale_by(factor: float, x: Tensor, out: Tensor, act: str = "linear") -> tuple[Any, ...]:
    """Arguments of ``epilogue_into`` for out = act(factor · x)."""
    return (x, torch.tensor([[float(factor)]]), None, None, None, None, act, 0.0, 1.0, None, 1.0, out)


def image(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)


def two_calls() -> tuple[Recording, Tensor, Tensor]:
    """inner = 2 · x and y = 3 · inner, where each run brings x and y."""
    recording, inner, unknown = Recording(), image(0, 0), torch.empty(0)
    recording.add(_into.epilogue_into, scale_by(2, unknown, inner))
    recording.add(_into.epilogue_into, scale_by(3, inner, unknown))
    return recording, inner, unknown


X_AND_Y = [0, 0, 0, 1, OUT, 1]


def test_calls_run_with_what_each_run_brings() -> None:
    recording, inner, _ = two_calls()
    assert (recording.count, inner.abs().max()) == (2, 0), "a recorded call was run"
    for x in (image(1, 2), image(-1, 5)):
        y = torch.full_like(x, torch.nan)
        recording.run(0, 2, [x, y], X_AND_Y)
        assert torch.equal(y, 6 * x)
    recording.run(0, 1, [image(7, 7)], X_AND_Y[:3])
    assert torch.equal(inner, image(14, 14))
    assert torch.equal(y, image(-6, 30)), "a call was run that was not asked for"


def test_nothing_that_a_run_brings_is_kept() -> None:
    recording, _, _ = two_calls()
    x, y = image(1, 2), image(0, 0)
    before = x._use_count(), y._use_count()
    recording.run(0, 2, [x, y], X_AND_Y)
    assert (x._use_count(), y._use_count()) == before


def test_results_can_be_new() -> None:
    recording, inner, _ = two_calls()
    x = image(1, 2)
    first = recording.run(0, 2, [x], X_AND_Y, (1, 1, 1, 2))
    (again,) = recording.run(0, 2, [2 * x], X_AND_Y, (1, 1, 1, 2))
    assert len(first) == 1
    assert torch.equal(first[0], 6 * x)
    assert torch.equal(again, 12 * x)
    assert torch.equal(inner, 4 * x)
    with pytest.raises(RuntimeError, match="sizes must come by four, got 3"):
        recording.run(0, 2, [x], X_AND_Y, (1, 1, 2))


def test_a_value_can_have_several_places() -> None:
    """One that is brought, and a new one that is read behind the call that makes it."""
    recording, unknown = Recording(), torch.empty(0)
    recording.add(_into.epilogue_into, scale_by(2, unknown, unknown))
    factor, *others, out = scale_by(3, unknown, unknown)[1:]
    recording.add(_into.epilogue_into, (unknown, factor, *others[:3], unknown, *others[4:], out))
    x = image(1, 2)
    places = [0, 0, 0, 0, OUT, 1, 1, 0, 1, 1, 5, 0, 1, OUT, 2]
    for _ in range(2):
        first, second = recording.run(0, 2, [x], places, (1, 1, 1, 2) * 2)
        assert torch.equal(first, 2 * x)
        assert torch.equal(second, 6 * x + x), "3 * first + the residual x"


@pytest.mark.parametrize(("algorithm", "tile"), [("winograd", 2), ("packed_direct", 0), ("direct_conv", 0)])
def test_what_a_call_keeps_follows_sizes_and_threads(algorithm: str, tile: int) -> None:
    """A convolution plans by both, and keeps its plan."""
    torch.manual_seed(0)
    c_in = 3 if algorithm == "direct_conv" else 24
    weight, unknown = torch.randn(40, c_in, 3, 3), torch.empty(0)
    geometry = ((1, 1), (1, 1), (0, 0), (1, 1), False, 1, False)
    settings = (None,) * 6, geometry, (False, algorithm, tile, "fp32", "linear", 0.0, 1.0, None, 1.0)
    arguments = [weight, *(value for group in settings for value in group)]
    recording, before = Recording(), torch.get_num_threads()
    recording.add(_into.scaled_conv2d_into, [unknown, *arguments, unknown])
    try:
        for size, threads in (((12, 12), 2), ((12, 12), 2), ((9, 31), 2), ((9, 31), 1), ((40, 20), 3), ((12, 12), 2)):
            torch.set_num_threads(threads)
            x = torch.randn(1, c_in, *size)
            (got,) = recording.run(0, 1, [x], [0, 0, 0, 0, len(arguments) + 1, 1], (1, 40, *size))
            want = torch.full_like(got, torch.nan)
            _into.scaled_conv2d_into(x, *arguments, want)
            assert torch.equal(got, want)
            assert torch.allclose(got, F.conv2d(x, weight, None, 1, 1), atol=1e-3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("first", "count", "places", "message"),
    [
        (0, 3, X_AND_Y, "the recording has 2 calls, got 0 and 3"),
        (-1, 1, X_AND_Y, "the recording has 2 calls, got -1 and 1"),
        (0, 2, X_AND_Y[:4], "places must come by three, got 4"),
        (0, 2, [0, 0, 2], "no call 0 or no value 2"),
        (0, 2, [2, 0, 0], "no call 2 or no value 0"),
        (0, 2, [*X_AND_Y[:3], 1, 6, 1], "argument 6 of call 1 is no tensor"),
        (0, 2, [*X_AND_Y[:3], 1, 2, 1], "argument 2 of call 1 is no tensor"),
    ],
)
def test_a_wrong_run_says_what_is_wrong(first: int, count: int, places: list[int], message: str) -> None:
    """And leaves the recording as it was."""
    recording, inner, _ = two_calls()
    x, y = image(1, 2), image(0, 0)
    before = x._use_count()
    with pytest.raises(RuntimeError, match=message):
        recording.run(first, count, [x, y], places)
    assert (inner.abs().max(), x._use_count()) == (0, before)
    recording.run(0, 2, [x, y], X_AND_Y)
    assert torch.equal(y, 6 * x)


def test_a_call_that_fails_leaves_the_recording_as_it_was() -> None:
    recording, inner, unknown = two_calls()
    recording.add(_into.epilogue_into, scale_by(1, inner, unknown, act="nonsense"))
    x, y = image(1, 2), image(0, 0)
    before = x._use_count()
    with pytest.raises(RuntimeError, match="unknown activation nonsense"):
        recording.run(0, 3, [x, y], X_AND_Y)
    assert x._use_count() == before
    recording.run(0, 2, [x, y], X_AND_Y)
    assert torch.equal(y, 6 * x)


def test_a_recording_that_is_gone() -> None:
    recording, _, _ = two_calls()
    recording._library.fastgan_drop_recording(recording._number)
    with pytest.raises(RuntimeError, match="there is no recording"):
        recording.run(0, 2, [], [])


def test_only_the_thread_that_records_does() -> None:
    """A call that cannot be recorded ends the recording too."""
    recording, x, y = Recording(), image(1, 2), image(0, 0)

    def from_another_thread(*args: Any) -> None:
        thread = threading.Thread(target=_into.epilogue_into, args=scale_by(2, x, y))
        thread.start()
        thread.join()
        raise TypeError("as a dispatcher's")

    with pytest.raises(TypeError, match="dispatcher"):
        recording.add(from_another_thread, ())
    assert torch.equal(y, 2 * x)
    _into.epilogue_into(*scale_by(3, x, y))
    assert torch.equal(y, 3 * x)


class Mixed(nn.Module):
    """Layers with an operator in between that is left to torch, and a scale that changes with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = F.relu(self.second(F.relu(self.first(x)) * scale))
        y = torch.flip(y, [3])
        return torch.tanh(self.third(y) + x)


def test_an_engine_computes_the_same_step_by_step() -> None:
    torch.manual_seed(0)
    model, x, scale = Mixed().eval(), torch.randn(1, 8, 12, 12), torch.rand(1, 8, 1, 1)
    fast = infer.optimize(model, (x, scale))
    with torch.no_grad(), fast.pool.borrow() as workspace:
        recorded = [stretch.count for stretch in workspace.stretches if stretch.call is None]
        assert sum(recorded) == workspace.recording.count >= 3
        assert len(workspace.stretches) < len(workspace.calls)
        seen: list[int] = []
        for factor in (1.0, 0.5):
            inputs = [factor * x, factor * scale]
            by_steps = results_of(workspace, inputs, lambda number, _: seen.append(number))
            (got,), (want,) = results_of(workspace, inputs), by_steps
            assert torch.equal(got, want)
            assert torch.allclose(got, model(*inputs), atol=1e-5)
        assert seen == 2 * list(range(len(workspace.calls)))


def test_an_engine_that_runs_no_operator_of_torch_needs_no_context() -> None:
    """Gradients that are recorded and autocast are nothing to it."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval(),
        torch.randn(1, 8, 9, 9),
    )
    fast = infer.optimize(model, (x,))
    with fast.pool.borrow() as workspace:
        assert workspace.only_recorded
    with torch.no_grad():
        want = fast(x)
    assert torch.allclose(want, model(x), atol=1e-5)
    for given in (x.clone().requires_grad_(), x.to(memory_format=torch.channels_last), nn.Parameter(x)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = fast(given)
        assert torch.equal(got, want)
        assert not got.requires_grad
    with torch.inference_mode():
        assert torch.equal(fast(x.clone()), want)
    mixed = infer.optimize(Mixed().eval(), (x, torch.rand(1, 8, 1, 1)))
    with mixed.pool.borrow() as workspace:
        assert not workspace.only_recorded
    assert not mixed(x.requires_grad_(), torch.rand(1, 8, 1, 1)).requires_grad
