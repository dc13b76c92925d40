"""Generators drawn layer by layer, and what an optimised one is held to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from generator_layers import ACTIVATIONS, LAYERS, MOVES
from helpers import assert_close_to_float64, max_error
from hypothesis import strategies as st
from oracle import CONDITION, FLOORS, ROUNDING, WINOGRAD, cases_run, random, threads
from torch import Tensor, nn

from fastgan import infer

__all__ = ["HEAVY", "GeneratorCase", "Step", "check_generator", "generators", "torch"]

Shape = tuple[int, ...]
# Values of an image at most.
MOST = 8_000


@dataclass(frozen=True)
class Step:
    """One layer of ``generator_layers.LAYERS`` and the values that it reads, by number: inputs, then layers."""

    name: str
    reads: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, shapes: Sequence[Shape]) -> nn.Module:
        return LAYERS[self.name](shapes, **self.options)


class Generator(nn.Module):
    """A case's layers, with weights that keep the size of what passes."""

    def __init__(self, case: GeneratorCase) -> None:
        super().__init__()
        self.case = case
        shapes = list(case.inputs)
        layers = []
        for one in case.steps:
            read = [shapes[i] for i in one.reads]
            layers.append(one.build(read))
            shapes.append(result_shape(one, read))
        self.layers = nn.ModuleList(layers)
        self.unused = nn.Linear(3, 2)
        randomise(self, case.seed)
        self.jitter: Callable[[Tensor], Tensor] | None = None

    def forward(self, *inputs: Tensor, extra: Sequence[Tensor] = ()) -> Any:
        values = [*inputs, *extra]
        for one, layer in zip(self.case.steps, self.layers, strict=True):
            value = layer(*[values[i] for i in one.reads])
            values.append(value if self.jitter is None else self.jitter(value))
        results = [values[i] for i in self.case.outputs]
        if self.case.form == "one":
            return results[0]
        if self.case.form == "dict":
            return {"images": results, "first": results[0], "nothing": None}
        return tuple(results)


def randomise(model: nn.Module, seed: int) -> None:
    """Weights of deviation 1/√fan_in, statistics and slopes that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            p.copy_(normal(p) / fan_in**0.5 if p.ndim > 1 or "bias" in name else 1 + 0.5 * normal(p))
        for name, b in model.named_buffers():
            if name.endswith(("running_var", "values")):
                b.copy_(torch.exp(0.5 * normal(b)))
            elif name.endswith("running_mean"):
                b.copy_(normal(b))


def result_shape(one: Step, shapes: Sequence[Shape]) -> Shape:
    """Raises what torch raises where the layer does not fit."""
    with torch.device("meta"), torch.no_grad():
        return tuple(one.build(shapes).eval()(*[torch.empty(shape) for shape in shapes]).shape)


@dataclass(frozen=True, kw_only=True)
class GeneratorCase:
    """A generator and how it is called.

    Attributes:
        outputs: the values that it returns: as ``form`` says the first alone, a tuple, or a dict with a list.
        by_name: inputs that are passed as a list by keyword, of the last.
        layout: of the example's inputs.
        saved: whether what was saved and loaded is called too.
    """

    inputs: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    form: str = "one"
    by_name: int = 0
    layout: str = "contiguous"
    precision: str = "fp32"
    saved: bool = False
    threads: int = 1
    seed: int = 0

    def images(self, seed: int) -> list[Tensor]:
        return [random(shape, seed + i).float() for i, shape in enumerate(self.inputs)]

    def call(self, model: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
        """The results, flat."""
        args, kwargs = self.arguments(images)
        with torch.no_grad():
            results = model(*args, **kwargs)
        if self.form == "dict":
            assert list(results) == ["images", "first", "nothing"] and results["nothing"] is None
            return [*results["images"], results["first"]]
        assert isinstance(results, Tensor if self.form == "one" else tuple)
        return [results] if self.form == "one" else list(results)

    def arguments(self, images: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        first = len(images) - self.by_name
        return tuple(images[:first]), {"extra": list(images[first:])} if self.by_name else {}

    def example(self) -> list[Tensor]:
        images = self.images(self.seed + 500)
        if self.layout == "channels_last":
            return [image.contiguous(memory_format=torch.channels_last) for image in images]
        return [image[:, :, :1, :1].expand_as(image) for image in images] if self.layout == "expanded" else images


def check_generator(case: GeneratorCase) -> Any:
    """Hold the optimised generator to the generator in float64, over two calls; returns its report."""
    cases_run["GeneratorCase"] += 1
    model = Generator(case).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    args, kwargs = case.arguments(case.example())
    with threads(case.threads):
        fast = infer.optimize(model, args, kwargs, precision=case.precision)
        assert all(module.training for module in model.modules())
        for name, t in model.state_dict().items():
            assert torch.equal(t, before[name]), f"{name} was written to"
        model.eval()
        report = fast.report()
        winograd = any("winograd" in (row.algorithm or "") or "dense_block" in row.kind for row in report.rows)
        calls = [case.images(case.seed + 1000 * i) for i in range(2)]
        kept = [[image.clone() for image in images] for images in calls]
        results = [case.call(fast, images) for images in calls]
        copies = [[t.clone() for t in result] for result in results]
        wide = copy.deepcopy(model).double()
        for images, result in zip(calls, results, strict=True):
            hold(case, model, wide, images, result, winograd)
        again = case.call(loaded(fast) if case.saved else fast, calls[0])
    for images, old in zip(calls, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(images, old, strict=True)), "an input was written to"
    for result, old in zip(results, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, old, strict=True)), "a later call wrote to a result"
    assert all(torch.equal(a, b) for a, b in zip(again, copies[0], strict=True)), "the same call differs"
    return report


def loaded(fast: infer.FastGenerator) -> infer.FastGenerator:
    with TemporaryDirectory() as folder:
        fast.save(Path(folder) / "generator")
        return infer.load(Path(folder) / "generator")


def hold(
    case: GeneratorCase,
    model: nn.Module,
    wide: nn.Module,
    images: Sequence[Tensor],
    results: Sequence[Tensor],
    winograd: bool,
) -> None:
    """Twice eager torch's error and what is left of roundings; of Winograd's, an error of 1e-5 in every layer."""
    eager = case.call(model, [image.clone() for image in images])
    exact = case.call(wide, [image.double() for image in images])
    rounded = moved(case, wide, images, lambda t: t.abs() * ROUNDING[torch.float32])
    filtered = moved(case, wide, images, lambda t: t.abs().amax() * WINOGRAD) if winograd else exact
    for i, (got, ours, value) in enumerate(zip(results, eager, exact, strict=True)):
        floor = FLOORS[torch.float32] + CONDITION * max_error(rounded[i], value)
        floor += 2 * max_error(filtered[i], value)
        assert_close_to_float64(got, ours, value, floor=floor, what=f"result {i}")


def moved(
    case: GeneratorCase, wide: nn.Module, images: Sequence[Tensor], by: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """float64's results where every layer's result was moved up or down at random."""
    generator = torch.Generator().manual_seed(case.seed)

    def jitter(t: Tensor) -> Tensor:
        signs = torch.randint(0, 2, t.shape, generator=generator) * 2 - 1
        return t + signs * by(t)

    wide.jitter = jitter
    try:
        return case.call(wide, [jitter(image.double()) for image in images])
    finally:
        wide.jitter = None


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


class _Drawing:
    """A case in the making: which values there are, and which of them must not be written to."""

    def __init__(self, draw: Callable[..., Any], inputs: Sequence[Shape], most: int) -> None:
        self.draw, self.most = draw, most
        self.shapes = list(inputs)
        self.steps: list[Step] = []
        self.written = [False] * len(inputs)  # whether a value may be written to in place

    def pick(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def add(self, name: str, /, *reads: int, writable: bool = True, **options: Any) -> bool:
        """Append a layer; False where torch does not take it or its result would be too large."""
        one = Step(name, reads, options)
        try:
            shape = result_shape(one, [self.shapes[i] for i in reads])
        except (RuntimeError, ValueError):
            return False
        if len(shape) != 4 or 0 in shape or torch.Size(shape).numel() > self.most:
            return False
        self.steps.append(one)
        self.shapes.append(shape)
        self.written.append(writable)
        return True

    def like(self, i: int) -> list[int]:
        """Values of the shape of value i, itself included."""
        return [j for j, shape in enumerate(self.shapes) if shape == self.shapes[i]]

    def beside(self, i: int) -> list[int]:
        """Values that a concatenation along channels takes with value i."""
        n, _, h, w = self.shapes[i]
        return [j for j, shape in enumerate(self.shapes) if (shape[0], *shape[2:]) == (n, h, w)]


def _convolution(d: _Drawing, i: int, channels: st.SearchStrategy[int]) -> bool:
    c_in = d.shapes[i][1]
    groups = d.pick(1, 1, 1, 1, *(g for g in (2, 3, c_in) if c_in % g == 0))
    kernel, stride = d.pick(1, 2, 3, 3, 3, 4, 5, 7, (3, 1), (2, 5)), d.pick(1, 1, 1, 2, 3, (2, 1))
    options = {"groups": groups, "bias": d.draw(st.booleans())}
    if d.pick(False, False, True):
        extra = d.pick(0, 0, 1) if stride != 1 and stride != (2, 1) else 0
        options.update(stride=stride, output_padding=extra, padding=d.pick(0, 1, 1, 2), dilation=d.pick(1, 1, 1, 2))
        return d.add("deconv", i, c_out=d.draw(channels), kernel=kernel, **options)
    half = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    padding, dilation = d.pick(half, half, half, 0, 1, "same"), d.pick(1, 1, 1, 2, (1, 3))
    options.update(stride=1 if padding == "same" else stride, dilation=dilation)
    options["padding_mode"] = d.pick("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
    return d.add("conv", i, c_out=d.draw(channels), kernel=kernel, padding=padding, **options)


def _plain_convolution(d: _Drawing, i: int, channels: st.SearchStrategy[int]) -> bool:
    return d.add("conv", i, c_out=d.draw(channels), kernel=3, padding=1, bias=d.draw(st.booleans()))


def _special_convolution(d: _Drawing, i: int, channels: st.SearchStrategy[int]) -> bool:
    kind, kernel, c_out = d.pick("spectral_conv", "equalised_conv", "styled_conv"), d.pick(1, 3), d.draw(channels)
    if kind == "spectral_conv":
        return d.add(kind, i, c_out=c_out, kernel=kernel)
    if kind == "equalised_conv":
        return d.add(kind, i, c_out=c_out, kernel=kernel, ours=d.draw(st.booleans()))
    act = d.pick("linear", "lrelu", "swish")
    return d.add(kind, i, c_out=d.pick(c_out, d.shapes[i][1]), kernel=kernel, act=act, residual=d.draw(st.booleans()))


def _norm(d: _Drawing, i: int, channels: Any) -> bool:
    kind = d.pick("batch_norm", "batch_norm", "instance_norm", "instance_norm", "fused_norm")
    if kind == "fused_norm":
        return d.add(kind, i, act=d.pick("linear", "relu", "tanh"))
    tracked = d.pick(True, True, False) if kind == "batch_norm" else d.pick(False, False, True)
    return d.add(kind, i, affine=d.draw(st.booleans()), tracked=tracked)


def _activation(d: _Drawing, i: int, channels: Any) -> bool:
    if d.pick(*[False] * 5, True):
        return d.add("prelu", i, per_channel=d.draw(st.booleans()))
    if d.pick(*[False] * 9, True):
        return d.add("bias_act", i, act=d.pick("lrelu", "relu", "sigmoid"))
    if d.pick(*[False] * 9, True):
        low, high = d.pick((-0.5, 0.5), (-1.0, 0.3), (None, 0.4), (0.0, None), (-0.7, 0.7))
        return d.add("clamp", i, low=low, high=high)
    name = d.pick("relu", "relu", "lrelu", "lrelu", *ACTIVATIONS)
    return d.add("activation", i, name=name, inplace=d.written[i] and d.draw(st.booleans()), writable=d.written[i])


def _factor(d: _Drawing, i: int, channels: Any) -> bool:
    if d.draw(st.booleans()):
        forms = ("1C11", "1C11", "C11", "1", "", "1111", "HW", "1CHW", "NCHW")
        return d.add("buffer", i, form=d.pick(*forms), operation=d.pick("mul", "add", "sub", "div", "swapped"))
    operation, inplace = d.pick("mul", "mul", "add", "sub", "div", "rsub"), d.written[i] and d.draw(st.booleans())
    inplace = inplace and operation in ("mul", "add")
    return d.add("number", i, operation=operation, value=d.pick(0.2, -1.5, 2.0, 1), inplace=inplace)


def _sum(d: _Drawing, i: int, channels: Any) -> bool:
    j, k = d.pick(*d.like(i)), d.pick("add", "add", "add", "sub", "mul", "in place")
    if k == "in place":
        # x.add_(view of x) is refused by torch.
        return d.written[i] and i != j and d.add("two_in_place", i, j)
    alpha = 1.0 if k == "mul" else d.pick(1.0, 1.0, 1.0, 0.3, -2.0)
    return d.add("two", i, j, operation=k, **({} if k == "mul" else {"alpha": alpha}))


def _concatenation(d: _Drawing, i: int, channels: Any) -> bool:
    others = [d.pick(*d.beside(i)) for _ in range(d.pick(1, 1, 1, 2, 3, 0))]
    return d.add("cat", *d.draw(st.permutations([i, *others])), dim=d.pick(1, 1, 1, 1, -3))


def _padding(d: _Drawing, i: int, channels: Any) -> bool:
    kind = d.pick("zeros", "zeros", "reflect", "replicate", "one", "F.constant", "F.reflect", "F.circular")
    padding = d.pick((1, 1, 1, 1), (1, 1, 2, 2), (0, 1, 0, 1), (2, 0, 1, 3), (1, 1, -1, 0))
    return d.add("pad", i, kind=kind, padding=padding)


def _resampling(d: _Drawing, i: int, channels: Any) -> bool:
    kind = d.pick("up", "up", "up", "shuffle", "unshuffle", "pool", "filtered")
    if kind == "up":
        mode = d.pick("nearest", "nearest", "nearest", "bilinear", "nearest-exact")
        return d.add(kind, i, mode=mode, factor=d.pick(2, 2, 2, 2.3, 1.5, 3, (2, 1), 0.5))
    if kind == "pool":
        return d.add(kind, i, kind=d.pick("average", "max"))
    if kind == "filtered":
        up, down = d.pick((1, 1), (2, 1), (1, 2))
        return d.add(kind, i, up=up, down=down)
    return d.add(kind, i, factor=2)


def _move(d: _Drawing, i: int, channels: Any) -> bool:
    # A result that is a view is not written to: it may overlap itself, or be an input.
    return d.add("move", i, how=d.pick(*MOVES), writable=False)


def _partly_in_place(d: _Drawing, i: int, channels: Any) -> bool:
    return d.written[i] and d.add("partly_in_place", i, how=d.pick("relu", "set"))


def _block(d: _Drawing, i: int, channels: Any) -> bool:
    if d.draw(st.booleans()):
        options = {"norm": d.pick("batch", "instance", "none"), "act": d.pick("relu", "lrelu", "silu")}
        options.update(inplace=d.draw(st.booleans()), mode=d.pick("zeros", "reflect"), gain=d.pick(1.0, 1.0, 0.2))
        return d.add("residual", i, last=d.pick("none", "none", "relu", "lrelu"), **options)
    growth, layers = d.pick(2, 4, 16), d.pick(2, 3, 5)
    scale, bias = d.pick(1.0, 0.2), d.draw(st.booleans())
    return d.add("dense", i, growth=growth, layers=layers, scale=scale, bias=bias, ours=d.pick(False, False, True))


KINDS: tuple[tuple[Callable[[_Drawing, int, Any], bool], int], ...] = (
    *((_convolution, 4), (_plain_convolution, 3), (_special_convolution, 1), (_norm, 3), (_activation, 5)),
    *((_factor, 2), (_sum, 3), (_concatenation, 4), (_padding, 2), (_resampling, 3), (_move, 2), (_block, 2)),
    *((_partly_in_place, 1),),
)
# What makes generators of many channels.
HEAVY = (
    *((_plain_convolution, 6), (_convolution, 1), (_special_convolution, 1), (_norm, 2), (_activation, 3), (_sum, 2)),
    *((_concatenation, 2), (_padding, 1), (_resampling, 1), (_block, 1)),
)


@st.composite
def generators(
    draw: Callable[..., Any],
    sides: st.SearchStrategy[int],
    channels: st.SearchStrategy[int],
    most: int = MOST,
    kinds: Sequence[tuple[Callable[..., bool], int]] = KINDS,
    batches: Sequence[int] = (1, 1, 1, 2, 3),
) -> GeneratorCase:
    """3 to 12 layers, each of any value so far, most often of the last; images of ``sides`` and ``channels``."""
    n = draw(st.sampled_from(batches))
    first = (n, draw(channels), draw(sides), draw(sides))
    more = draw(st.sampled_from([0, 0, 0, 1, 2]))
    inputs = [first] + [(n, draw(channels), *first[2:]) for _ in range(more)]
    d = _Drawing(draw, inputs, most)
    weighted = st.sampled_from([kind for kind, weight in kinds for _ in range(weight)])
    for _ in range(draw(st.integers(3, 12))):
        newest = len(d.shapes) - 1
        draw(weighted)(d, draw(st.sampled_from([newest, newest, newest, newest, *range(len(d.shapes))])), channels)
    newest = len(d.shapes) - 1
    others = st.lists(st.integers(0, newest), max_size=3)
    form = draw(st.sampled_from(["one", "one", "tuple", "dict"]))
    return GeneratorCase(
        inputs=tuple(inputs),
        steps=tuple(d.steps),
        outputs=(newest, *draw(others)) if form != "one" else (newest,),
        form=form,
        by_name=draw(st.integers(0, more)),
        layout=draw(st.sampled_from(["contiguous"] * 4 + ["channels_last", "expanded"])),
        precision=draw(st.sampled_from(["fp32", "fp32", "high"])),
        saved=draw(st.sampled_from([False, False, False, True])),
        threads=draw(st.sampled_from([1, 1, 1, 2])),
        seed=draw(st.integers(0, 99)),
    )
