"""What infer.optimize and its result make of bad input: an error that names what is wrong, or a reported fallback, and
never a wrong picture."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_float64, layouts
from torch import Tensor, nn

from fastgan import infer
from fastgan.infer import nodes, plan

pytestmark = pytest.mark.usefixtures("one_thread")


class Generator(nn.Module):
    """Two convolutions, and between them whatever ``middle`` does."""

    def __init__(self, middle: Callable[..., Any] = F.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, 3, padding=1)
        self.middle = middle

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        return self.second(self.middle(self.norm(self.first(x)), *more, **named))


class Styled(nn.Module):
    """What is optional is a tensor or None; a factor by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, style: Tensor | None = None, gain: float = 1.0, shift: float | Tensor = 0.0) -> Tensor:
        y = self.conv(x) if style is None else self.conv(x) * style
        return y * gain + shift


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (1, 3, 9, 11), generator=torch.Generator().manual_seed(seed))


def hold(got: Tensor, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """``got`` is what ``model`` answers in evaluation, by the rule of accuracy."""
    training = model.training
    model.eval()
    with torch.no_grad():
        eager = model(*args, **kwargs)
        wide = [a.double() if isinstance(a, Tensor) else a for a in args]
        exact = model.double()(*wide, **kwargs)
        model.float().train(training)
    assert_close_to_float64(got, eager, exact, floor=1e-6)


@pytest.fixture(scope="module")
def fast() -> infer.FastGenerator:
    return infer.optimize(Generator(), (image(),))


# ----------------------------------------------------------------------------------------------------------------------
# Models and examples that cannot be


def test_control_flow_that_depends_on_data() -> None:
    model = Generator(lambda x: x if x.sum() > 0 else -x)
    with pytest.raises(ValueError, match=r"torch.export could not capture Generator: .*[Cc]ontrol flow") as raised:
        infer.optimize(model, (image(),))
    assert model.training and model.norm.training
    assert raised.value.__cause__ is not None


def test_a_model_in_training_stays_in_training() -> None:
    model = Generator()
    model.norm.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = infer.optimize(model, (image(),))(image(seed=1))
    assert model.training and model.second.training and not model.norm.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    hold(result, model, image(seed=1))


@pytest.mark.parametrize("shape", [(1, 4, 9, 11), (3,), (1, 3)])
def test_example_of_a_wrong_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"infer\.optimize: model must be one graph .* for these arguments"):
        infer.optimize(Generator(), (torch.zeros(shape),))


@pytest.mark.parametrize(
    ("name", "bad"), [("second.weight", "nan"), ("first.bias", "inf"), ("norm.running_var", "nan")]
)
def test_weights_that_are_not_finite(name: str, bad: str) -> None:
    model = Generator()
    with torch.no_grad():
        model.state_dict()[name].view(-1)[1] = float(bad)
    with pytest.raises(ValueError, match=rf"must have finite weights, got 1 of \d+ values NaN or infinite in {name}"):
        infer.optimize(model, (image(),))


def test_arguments_of_other_types() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn.Module, got function"):
        infer.optimize(image, (image(),))
    with pytest.raises(TypeError, match="example_args must be a tuple, got Tensor"):
        infer.optimize(Generator(), image())
    with pytest.raises(ValueError, match=r"precision must be one of .*, got 'half'"):
        infer.optimize(Generator(), (image(),), precision="half")


def test_tensors_on_several_devices() -> None:
    with pytest.raises(ValueError, match=r"must be on the CPU or on one GPU, got .* on meta"):
        infer.optimize(Generator().to("meta"), (image(),))


def test_a_model_that_writes_to_its_buffers_or_inputs() -> None:
    model = Generator()
    model.norm.register_buffer("count", torch.zeros(()))
    model.middle = lambda x: x + model.norm.count.add_(1)
    with pytest.raises(ValueError, match=r"must change nothing when it evaluates, but Generator writes to norm.count"):
        infer.optimize(model, (image(),))
    with pytest.raises(ValueError, match="must change nothing when it evaluates"):
        infer.optimize(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1)), (image(),))


# ----------------------------------------------------------------------------------------------------------------------
# What has no kernel of ours


@pytest.mark.parametrize(
    ("name", "middle"),
    {
        "gelu": F.gelu,
        "prelu": lambda x: F.prelu(x, torch.linspace(0.1, 0.6, 6, dtype=x.dtype)),
        "softplus": lambda x: F.softplus(x, threshold=1.0),
        "div": lambda x: x / x.abs().amax(),
        "cumsum": lambda x: x.cumsum(2),
        "max_pool2d": lambda x: F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:]),
    }.items(),
)
def test_an_unsupported_operator_in_the_middle(name: str, middle: Callable[..., Tensor]) -> None:
    model = Generator(middle)
    result = infer.optimize(model, (image(),))
    left = result.report().left_to_torch
    assert any(name in row.kind and row.reason for row in left)
    assert not any("conv" in row.kind for row in left)
    hold(result(image(seed=1)), model, image(seed=1))


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: x.permute(0, 2, 3, 1).contiguous().view(x.shape[0], -1, 3, 2).reshape(x.shape),
        lambda x: x.view(x.shape[0], 2, 3, 9, 11).transpose(1, 2).contiguous().view(x.shape),
        lambda x: x.unfold(2, 3, 3).contiguous().view(x.shape),
        lambda x: x.transpose(2, 3).relu().transpose(2, 3),
        lambda x: x[:, :1].expand(x.shape),
        lambda x: torch.cat([x[:, 3:], x[:, :3]], 1),
    ],
)
def test_views_of_other_strides(middle: Callable[..., Tensor]) -> None:
    """Views that fit the strides of the model's own tensors need not fit those of ours."""
    model, x = Generator(middle), image(2, 3, 9, 11)
    hold(infer.optimize(model, (x,))(x), model, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_dtypes(dtype: torch.dtype) -> None:
    model, x = Generator().to(dtype).eval(), image().to(dtype)
    result = infer.optimize(model, (x,))
    convolutions = [row for row in result.report().left_to_torch if "conv2d" in row.kind]
    assert len(convolutions) == 2 and all("float32" in row.reason or "no kernel" in row.reason for row in convolutions)
    other = image(seed=1).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(result(other), model(other))


# ----------------------------------------------------------------------------------------------------------------------
# Calls that are not like the example


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (image(2, 3, 9, 11), r"got \[2, 3, 9, 11\] of torch.float32"),
        (image(1, 3, 11, 9), r"got \[1, 3, 11, 9\]"),
        (image(3, 9, 11), r"got \[3, 9, 11\]"),
        (image().double(), "of torch.float64 on cpu"),
        (image().to("meta"), "on meta"),
        (image().numpy(), "argument 0 must be a tensor as in the example"),
        (None, "argument 0 must be a tensor as in the example, got None"),
    ],
)
def test_calls_of_other_sizes_and_types(fast: infer.FastGenerator, x: Any, got: str) -> None:
    with pytest.raises(ValueError, match=got):
        fast(x)
    hold(fast(image()), Generator(), image())


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((image(), image()), {}), ((), {"x": image()}), (([image()],), {})]
)
def test_calls_with_other_arguments(fast: infer.FastGenerator, args: Any, kwargs: Any) -> None:
    with pytest.raises(ValueError, match=r"arguments must be those of the example, 1 positional and \[\] by name"):
        fast(*args, **kwargs)


def test_optional_tensors_and_values() -> None:
    model, x, style = Styled(), image(), image(1, 4, 9, 11)
    with_style = infer.optimize(model, (x, style), {"gain": 2.0, "shift": 1.0})
    hold(with_style(x, style, shift=1.0, gain=2.0), model, x, style, gain=2.0, shift=1.0)
    for args, kwargs, message in (
        ((x, style), {"gain": 3.0, "shift": 1.0}, r"must be 2.0 as in the example, got 3.0"),
        ((x, style), {"gain": 2, "shift": 1.0}, r"must be 2.0 as in the example, got 2$"),
        ((x, style), {"gain": 2.0, "shift": torch.tensor(1.0)}, r"must be 1.0 as in the example, got a tensor \[\]"),
        ((x, None), {"gain": 2.0, "shift": 1.0}, "argument 1 must be a tensor as in the example, got None"),
        ((None, style), {"gain": 2.0, "shift": 1.0}, "argument 0 must be a tensor as in the example, got None"),
        ((x, style), {"gain": 2.0}, r"must be those of the example, 2 positional and \['gain', 'shift'\] by name"),
    ):
        with pytest.raises(ValueError, match=message):
            with_style(*args, **kwargs)
    without = infer.optimize(model, (x, None))
    hold(without(x, None), model, x)
    with pytest.raises(ValueError, match=r"argument 1 must be None as in the example, got a tensor \[1, 4, 9, 11\]"):
        without(x, style)


@pytest.mark.parametrize("act", [F.relu, F.silu, F.instance_norm, lambda x: x.clamp(-1, 1)])
def test_pixels_that_are_not_finite(act: Callable[..., Tensor]) -> None:
    """Not hidden: they come out where torch has them."""
    model, x = Generator(act).eval(), image()
    result = infer.optimize(model, (x,))
    x[0, 1, 2, 3], x[0, 0, 7, 8] = float("nan"), float("inf")
    with torch.no_grad():
        expected = model(x)
    assert expected.isnan().any()
    torch.testing.assert_close(result(x), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------------------
# Modes of the caller


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
}


def steps_of_all_kinds(x: Tensor) -> Tensor:
    """A norm, padding that is no convolution's, torch's operator, a concatenation that is copied, numbers."""
    y = F.instance_norm(F.pad(x, (1, 1, 1, 1), mode="reflect"))[..., 1:-1, 1:-1] + 0.5
    return torch.cat([y[:, :3], F.gelu(y)[:, :3]], 1) * 2.0


@pytest.fixture(scope="module")
def many_steps() -> infer.FastGenerator:
    return infer.optimize(Generator(steps_of_all_kinds), (image(2, 3, 9, 11),))


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("fresh", [False, True])
def test_calls_in_modes(many_steps: infer.FastGenerator, name: str, fresh: bool) -> None:
    """Memory that is made within a mode serves calls outside of it, and the other way round."""
    x = image(2, 3, 9, 11)
    outside = many_steps(x)
    hold(outside, Generator(steps_of_all_kinds), x)
    if fresh:
        many_steps.pool._free.clear()
    with MODES[name]():
        inside = many_steps(x.clone().requires_grad_() if name == "enable_grad" else x)
    assert inside.dtype == torch.float32 and inside.device.type == "cpu" and not inside.requires_grad
    assert torch.equal(inside, outside) and torch.equal(many_steps(x), outside)


@pytest.mark.parametrize("name", [name for name in MODES if name != "default device"])
def test_optimize_in_modes(name: str) -> None:
    model, x = Generator(steps_of_all_kinds), image(2, 3, 9, 11)
    with MODES[name]():
        result = infer.optimize(model, (x,))
    hold(result(x), model, x)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_layouts(many_steps: infer.FastGenerator, layout: str) -> None:
    """Of the example, and of a call."""
    model, x = Generator(steps_of_all_kinds), layouts(image(2, 3, 9, 11))[layout]
    strided = infer.optimize(model, (x,))
    hold(strided(x), model, x)
    hold(many_steps(x), model, x)
    assert torch.equal(strided(x), strided(x.contiguous()))


# ----------------------------------------------------------------------------------------------------------------------
# Threads


def test_concurrent_callers() -> None:
    model = Generator(lambda x: torch.cat([x[:, :3], F.gelu(x)[:, 3:]], 1))
    result = infer.optimize(model, (image(1, 3, 40, 41),))
    images = [image(1, 3, 40, 41, seed=i) for i in range(8)]
    alone = [result(x) for x in images]
    gate = Barrier(8)

    def call(i: int) -> list[Tensor]:
        gate.wait()
        return [result(images[i]) for _ in range(20)]

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(call, range(8)))
    for i, results in enumerate(together):
        assert all(torch.equal(found, alone[i]) for found in results), f"thread {i}"
    assert result.memory().callers <= 8


MORE_THREADS = """
import torch
from test_infer_bad_input import Generator, hold, image, infer

torch.set_num_threads({count})
model, x = Generator(), image(2, 3, 33, 35)
fast = infer.optimize(model, (x,))
hold(fast(x), model, x)
"""


def test_more_threads_than_cores() -> None:
    """In a process of its own: torch's threads stay once they are there."""
    count = 4 * (os.cpu_count() or 1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", MORE_THREADS.format(count=count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


class Wide(nn.Module):
    """Convolutions of which Winograd's filtering serves the last; the first is called twice, also of a small image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.last = (nn.Conv2d(64, channels, 3, padding=1) for channels in (64, 256))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.last(self.shared(x)), self.shared(x[..., :4, :4])


def test_dropped_weights() -> None:
    """Another number of threads is the same picture or an error, and what a second layer reads is not dropped."""
    x = image(1, 64, 24, 24)
    result = infer.optimize(Wide(), (x,))
    before = result(x)
    algorithms = [row.algorithm for row in result.report().rows if row.algorithm]
    assert any("winograd" in name for name in algorithms) and len(algorithms) == 3
    dropped = result.drop_weights()
    assert 0 < dropped < (64 + 256) * 64 * 9 * 4 and result.drop_weights() == dropped
    errors = []
    for count in (1, 2, 8, 32, 1):
        torch.set_num_threads(count)
        try:
            found = result(x)
        except RuntimeError as error:
            errors.append(str(error))
            continue
        for a, b in zip(found, before, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert errors and all("a weight's values were dropped" in error and "threads" in error for error in errors)
    assert all(torch.equal(a, b) for a, b in zip(result(x), before, strict=True))
    with pytest.raises(RuntimeError, match="save must come before drop_weights"):
        result.save("anywhere")


# ----------------------------------------------------------------------------------------------------------------------
# Verification


@pytest.mark.parametrize(("channels", "layer"), [(6, "first: conv2d"), (5, "second: conv2d")])
def test_a_kernel_that_computes_something_else(monkeypatch: pytest.MonkeyPatch, channels: int, layer: str) -> None:
    kernel, arguments = plan._KERNELS[nodes.convolution]

    def sabotaged(*args: Any) -> None:
        kernel(*args)
        if args[-1].shape[1] == channels:
            args[-1][..., 0, 0] += 0.01

    monkeypatch.setitem(plan._KERNELS, nodes.convolution, (sabotaged, arguments))
    with pytest.raises(infer.Mismatch, match=rf"the first layer that differs is {layer} by \w+, by ") as raised:
        infer.optimize(Generator(), (image(),))
    assert "differs from the original by" in str(raised.value)


def test_a_kernel_that_answers_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, arguments = plan._KERNELS[nodes.instance_norm]

    def sabotaged(*args: Any) -> None:
        kernel(*args)
        args[-1][0, 0, 0, 0] = float("nan")

    monkeypatch.setitem(plan._KERNELS, nodes.instance_norm, (sabotaged, arguments))
    with pytest.raises(infer.Mismatch, match=r"by inf of the largest value"):
        infer.optimize(Generator(F.instance_norm), (image(),))


def test_tensors_that_are_no_buffers_are_copied_too() -> None:
    model, x = Generator(lambda y: y + model.plain), image()
    model.plain = image(1, 6, 9, 11, seed=5)
    result = infer.optimize(model, (x,))
    before = result(x)
    model.plain.zero_()
    assert torch.equal(result(x), before)
