"""modulated_conv2d's CUDA kernel, thread by thread on the CPU: values against float64, tails, schedules, traffic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import simt_build
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgan.ops import scaled_conv2d
from fastgan.reference.activation import resolve
from fastgan.reference.epilogue import Epilogue
from tests.helpers import FLOORS, assert_close_to_float64

DTYPES = (torch.float16, torch.bfloat16)
# In the order of csrc/cuda/modulated_conv2d_plan.h: samples, rows, columns and output channels of a tile.
WIDE, NARROW, SMALL, JOINT = range(4)
TILES = [(1, 8, 16, 128), (1, 8, 16, 64), (1, 8, 8, 64), (4, 4, 4, 64)]
ONE_SCHEDULE = [("random", 3)]


@dataclass(frozen=True)
class Case:
    """One call: sizes, what is there beside x and the weight, and how the work is divided."""

    n: int
    c_in: int
    c_out: int
    h: int
    w: int
    dtype: torch.dtype = torch.float16
    tile: int = -1  # as a GPU of so many multiprocessors gets it; without any, nothing is split
    multiprocessors: int = 0
    scales: str = "full"  # also "channels" and "one": broadcast; "none"
    noise: str = "map"  # also "sample" and "none"
    act: str = "lrelu"
    clamp: float | None = None
    bias: bool = True
    save: bool = False
    gap: int = 0  # channels of NaN behind each pixel's and each tap's


def half_array(t: Tensor) -> np.ndarray:
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


def read_only(t: Tensor | None) -> np.ndarray:
    array = np.zeros(0, np.float32) if t is None else half_array(t)
    array.flags.writeable = False
    return array


def nhwc(t: Tensor, gap: int = 0) -> Tensor:
    """Its memory, in order, of a tensor that has the channels side by side; NaN in ``gap`` more."""
    return torch.nn.functional.pad(t.permute(0, 2, 3, 1), (0, gap), value=torch.nan).contiguous()


@dataclass
class Operands:
    x: Tensor
    weight: Tensor
    in_scale: Tensor | None
    out_scale: Tensor | None
    epilogue: Epilogue

    def exact(self) -> Operands:
        def wide(t):
            return None if t is None else t.double()

        e = self.epilogue
        epilogue = replace(e, noise=wide(e.noise), noise_strength=wide(e.noise_strength), bias=wide(e.bias))
        return Operands(wide(self.x), wide(self.weight), wide(self.in_scale), wide(self.out_scale), epilogue)

    def eager(self) -> Operands:
        """As eager code in the half type has it: in_scale * x rounded, the product in float32."""
        x = self.x if self.in_scale is None else (self.x.float() * self.in_scale[:, :, None, None]).to(self.x.dtype)
        return Operands(x.float(), self.weight.float(), None, self.out_scale, self.epilogue)


def draw(case: Case) -> Operands:
    shape = {"full": (case.n, -1), "channels": (1, -1), "one": (1, 1), "none": None}[case.scales]

    def scale(channels: int) -> Tensor | None:
        return None if shape is None else torch.randn(shape[0], channels if shape[1] < 0 else 1)

    size = (case.h, case.w)
    noise = {"map": lambda: torch.randn(size), "sample": lambda: torch.randn(case.n, 1, *size), "none": lambda: None}
    epilogue = Epilogue(
        noise=noise[case.noise](),
        noise_strength=None if case.noise == "none" else torch.tensor(0.3),
        bias=torch.randn(case.c_out) if case.bias else None,
        act=case.act,
        clamp=case.clamp,
    )
    x = torch.randn(case.n, case.c_in, *size).to(case.dtype)
    weight = torch.randn(case.c_out, case.c_in, 3, 3).to(case.dtype)
    return Operands(x, weight, scale(case.c_in), scale(case.c_out), epilogue)


def evaluate(o: Operands, *, product: bool = False) -> Tensor:
    out_scale, epilogue = (None, Epilogue()) if product else (o.out_scale, o.epilogue)
    options = {"padding": 1, "epilogue": epilogue, "backend": "reference"}
    return scaled_conv2d(o.x, o.weight, o.in_scale, out_scale, **options)


def run(case: Case, o: Operands, schedules=simt_build.SCHEDULES) -> tuple[Tensor, Tensor, dict[str, tuple[int, int]]]:
    """y and the product before out_scale, in torch's order of axes; the bytes read and written of each array."""
    kernels = simt_build.load(Path(__file__).parent / "modulated_conv2d.cpp")

    def strides(scale: Tensor | None) -> list[int]:
        if scale is None:
            return [0, 0]
        return [step if size > 1 else 0 for size, step in zip(scale.shape, scale.stride(), strict=True)]

    c, e = case.c_in + case.gap, o.epilogue
    noise_n = case.h * case.w if case.noise == "sample" else 0
    all_strides = [case.h * case.w * c, case.w * c, c, 9 * c, 3 * c, c]
    all_strides += [*strides(o.in_scale), *strides(o.out_scale), noise_n]
    slope = resolve(e.act, e.alpha, e.gain)
    act = [e.act == "relu", 1.0 if e.act == "linear" else slope[0], slope[1], np.inf if e.clamp is None else e.clamp]
    y = nhwc(torch.full((case.n, case.c_out, case.h, case.w), torch.nan, dtype=case.dtype))
    product = torch.full(y.shape if case.save else (0,), torch.nan)
    names = ["x", "weight", "in_scale", "out_scale", "noise", "strength", "bias", "y", "product"]
    inputs = [nhwc(o.x, case.gap), nhwc(o.weight, case.gap), o.in_scale, o.out_scale, e.noise, e.noise_strength, e.bias]
    inputs = [read_only(None if t is None else t.reshape(-1)) for t in inputs]
    results = [half_array(y.view(-1)), product.view(-1).numpy()]
    sizes = [case.n, case.c_in, case.c_out, case.h, case.w]
    traffic = simt_build.run(
        kernels, str(case.dtype).removeprefix("torch."), *inputs, sizes, all_strides, *act, case.tile,
        case.multiprocessors, *results, schedules=schedules,
    )  # fmt: skip
    bytes_of = dict(zip(names, [entry[1:] for entry in traffic[: len(names)]], strict=True))
    return y.permute(0, 3, 1, 2), product.permute(0, 3, 1, 2) if case.save else product, bytes_of


def check(case: Case, schedules=simt_build.SCHEDULES) -> dict[str, tuple[int, int]]:
    """Against float64 of the same inputs by the rule of accuracy; returns what :func:`run` says of the traffic."""
    operands = draw(case)
    y, product, traffic = run(case, operands, schedules)
    exact, floor = operands.exact(), FLOORS[case.dtype]
    want = evaluate(exact)
    if case.clamp is not None:
        # What is clamped is rounded before, relative to what it is then.
        exact.epilogue = replace(exact.epilogue, clamp=None)
        floor *= float(evaluate(exact).abs().max()) / case.clamp
    assert_close_to_float64(y, evaluate(operands.eager()).to(case.dtype), want, floor=floor, what=str(case))
    if case.save:
        want = evaluate(operands.exact(), product=True)
        plain = evaluate(operands.eager(), product=True)
        assert_close_to_float64(product, plain.float(), want, floor=FLOORS[case.dtype], what=f"product of {case}")
    return traffic


def blocks(case: Case, tile: int) -> tuple[int, int]:
    """How many tiles of pixels and of output channels there are."""
    samples, rows, columns, outputs = TILES[tile]
    return -(-case.n // samples) * -(-case.h // rows) * -(-case.w // columns), -(-case.c_out // outputs)


# Layers of the models at fewer channels and pixels, so that each has several blocks, stages and a tail in every axis.
CASES = [
    Case(1, 40, 136, 9, 17, tile=WIDE, save=True),
    Case(2, 72, 40, 9, 17, torch.bfloat16, tile=NARROW),
    Case(2, 40, 72, 9, 10, tile=SMALL, noise="sample", gap=8),
    Case(5, 72, 72, 4, 4, torch.bfloat16, tile=JOINT, save=True, gap=16),
    Case(6, 8, 8, 3, 2, tile=JOINT, noise="sample"),
    Case(1, 8, 8, 1, 1, torch.bfloat16, tile=SMALL, save=True),
    Case(1, 136, 16, 4, 4, multiprocessors=8, save=True),
    Case(3, 160, 8, 4, 3, torch.bfloat16, multiprocessors=100),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.n}x{c.c_in}x{c.c_out}x{c.h}x{c.w}-tile{c.tile}")
def test_values(case: Case) -> None:
    torch.manual_seed(0)
    check(case)


@pytest.mark.parametrize("scales", ["channels", "one", "none"])
@pytest.mark.parametrize(("act", "clamp"), [("linear", None), ("relu", 1.5), ("lrelu", 0.5)])
def test_epilogues(scales: str, act: str, clamp: float | None) -> None:
    torch.manual_seed(1)
    for i, dtype in enumerate(DTYPES):
        noise, bias = ("none", i == 0) if act == "relu" else ("map", i == 1)
        case = Case(2, 16, 16, 4, 5, dtype, SMALL, scales=scales, act=act, clamp=clamp, noise=noise, bias=bias)
        check(case, ONE_SCHEDULE)


@pytest.mark.parametrize("tile", [WIDE, NARROW, SMALL, JOINT])
def test_traffic(tile: int) -> None:
    """Every block reads its pixels, with the border that lies within the image, and its weights once; results and the
    product are written once."""
    samples, rows, columns, outputs = TILES[tile]
    case = Case(samples, 40, outputs + 8, rows, columns + 1, tile=tile, save=True, noise="none")
    torch.manual_seed(2)
    traffic = check(case, ONE_SCHEDULE)
    pixel_tiles, output_tiles = blocks(case, tile)
    # The first tile of a row also reads the second one's first column, and the second the first one's last.
    assert traffic["x"][0] == 2 * samples * rows * (columns + 3) * case.c_in * output_tiles
    assert traffic["weight"][0] == 2 * 9 * case.c_in * case.c_out * pixel_tiles
    assert traffic["y"] == (0, 2 * case.n * case.c_out * case.h * case.w)
    assert traffic["product"] == (0, 2 * traffic["y"][1])


def test_a_split_reads_nothing_twice() -> None:
    torch.manual_seed(3)
    whole = Case(1, 256, 16, 8, 8, tile=SMALL, save=True)
    split = replace(whole, multiprocessors=100)
    read = [check(case, ONE_SCHEDULE) for case in (whole, split)]
    for name in ("x", "weight"):
        assert read[0][name] == read[1][name]
    assert read[0]["weight"][0] == 2 * 9 * 256 * 16


def test_half_does_not_overflow() -> None:
    """Scales that together with x are beyond float16, and whose result is not; a sample whose scales are all 0."""
    torch.manual_seed(4)
    for tile in (SMALL, JOINT):
        case = Case(4, 16, 8, 4, 4, tile=tile, noise="none", bias=False, act="linear")
        operands = draw(case)
        operands.in_scale = operands.in_scale * 1e6
        operands.out_scale = operands.out_scale * 1e-6
        operands.in_scale[1] = 0
        y, _, _ = run(case, operands)
        assert not y[1].any()
        want = evaluate(operands.exact())
        assert_close_to_float64(y, want.half(), want, floor=FLOORS[torch.float16])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [SMALL, JOINT])
def test_what_is_not_finite_stays_where_it_is(tile: int, dtype: torch.dtype) -> None:
    """A NaN in x reaches the nine pixels around it; an infinite scale its own sample, and not through the border."""
    torch.manual_seed(5)
    case = Case(3, 16, 8, 4, 4, dtype, tile, noise="none", clamp=2.0)
    operands = draw(case)
    operands.x[0, 3, 0, 0] = torch.nan
    operands.x[1] = operands.x[1].abs() + 1
    operands.weight = operands.weight.abs() + 1
    operands.in_scale[1] = operands.in_scale[1].abs()
    operands.in_scale[1, 5] = torch.inf if dtype == torch.bfloat16 else operands.in_scale[1, 5]
    y, _, _ = run(case, operands)
    reached = torch.zeros(4, 4, dtype=torch.bool)
    reached[:2, :2] = True
    assert torch.equal(y[0].isnan(), reached.expand(8, 4, 4))
    assert not y[1:].isnan().any()
    assert y[1].abs().max() <= 2
    want = evaluate(operands.exact())
    assert_close_to_float64(y[2:], want[2:].to(dtype), want[2:], floor=FLOORS[dtype])
    if dtype == torch.bfloat16:
        # Positive times infinity, by a positive or a negative out_scale: all of the sample is at the clamp.
        assert torch.equal(y[1], want[1].to(dtype))


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn(data: st.DataObject) -> None:
    torch.manual_seed(6)

    def one_of(*options):
        return data.draw(st.sampled_from(options))

    case = Case(
        data.draw(st.integers(1, 5)), 8 * data.draw(st.integers(1, 10)), 8 * data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), one_of(*DTYPES), one_of(-1, SMALL, JOINT),
        one_of(0, 20, 400), one_of("full", "channels", "one", "none"), one_of("map", "sample", "none"),
        one_of("linear", "relu", "lrelu"), one_of(None, 1.0), data.draw(st.booleans()), data.draw(st.booleans()),
    )  # fmt: skip
    check(case, [("forward", 0), ("random", data.draw(st.integers(0, 99)))])
