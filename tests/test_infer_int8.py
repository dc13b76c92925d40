"""infer.optimize(precision="int8"): kernels that multiply whole numbers, how values become those, and engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantized import check, convolve, expected, geometry, layer, tiles
from torch import Tensor, fx, nn

from bench.generators import UNet256, randomize
from fastgan import _native, infer
from fastgan.infer import engine
from fastgan.infer.quantize import QuantizedLayers, Steps, best_steps, quantize_weight
from fastgan.infer.verify import psnr
from tests.helpers import max_error

LEAST_DB = QuantizedLayers.least_db

# ----------------------------------------------------------------------------------------------------------------------
# Kernels


STEPS = Steps(0.02, -90, 165)
# Channels that fill registers and words and that end in the midst of them, odd sizes, more than one panel deep, phases
# and planes, taps that are alone on an axis, weights that threads divide.
LAYERS = [
    pytest.param((1, 16, 16, (8, 8), 3), geometry(1, 1), id="3x3"),
    pytest.param((2, 67, 37, (9, 7), 3), geometry(1, 1), id="3x3, tails of channels, odd sizes"),
    pytest.param((2, 600, 37, (5, 5), 3), geometry(1, 1), id="3x3, more than one panel deep"),
    pytest.param((1, 33, 50, (18, 14), 4), geometry(2, 1), id="4x4 of stride 2"),
    pytest.param((1, 3, 5, (11, 6), 3), geometry(2, 1), id="3x3 of stride 2"),
    pytest.param((1, 33, 50, (9, 7), 4), geometry(2, 1, transposed=True), id="transposed 4x4"),
    pytest.param((1, 300, 16, (9, 7), 4), geometry(2, 1, transposed=True), id="transposed 4x4, phases at once"),
    pytest.param((2, 33, 30, (5, 6), 4), geometry(2, 1, transposed=True), id="transposed 4x4, two phases at once"),
    pytest.param((1, 20, 18, (6, 6), 3), geometry(2, 1, 1, transposed=True), id="transposed 3x3"),
    pytest.param((1, 70, 40, (1, 1), 4), geometry(1, 0, transposed=True), id="one pixel to 4x4"),
    pytest.param((1, 512, 512, (8, 8), 4), geometry(2, 1), id="weights that threads divide"),
]


@pytest.mark.parametrize(("shape", "where"), LAYERS)
def test_sums_are_exact_with_every_tile(shape: Any, where: dict[str, Any]) -> None:
    found = check(layer(*shape, transposed=where["transposed"]), where, STEPS)
    assert {0, 1, 2} <= set(found)


@pytest.mark.parametrize("tile", [0, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int, tile: int) -> None:
    k, where = layer(1, 40, 24, (12, 12), 4), geometry(2, 1)
    out = convolve(tile, torch.empty(1, 24, 6, 6), steps=STEPS, where=where, **k)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(convolve(tile, torch.empty(1, 24, 6, 6), steps=STEPS, where=where, **k), out)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("samples", [1, 2])
def test_scales_and_everything_behind_the_sums(samples: int) -> None:
    k, where = layer(2, 12, 20, (7, 6), 3), geometry(1, 1)
    k |= {"in_scale": torch.rand(samples, 12) + 0.5, "out_scale": torch.rand(samples, 20) + 0.5}
    k |= {"noise": torch.randn(samples, 1, 7, 6), "noise_strength": torch.tensor(0.3), "bias": torch.randn(20)}
    k |= {"residual": torch.randn(2, 20, 7, 6), "act": "lrelu", "alpha": 0.2, "gain": 1.4, "clamp": 30.0}
    check({**k, "residual_gain": 0.7}, where, STEPS)


@pytest.mark.parametrize(("tile", "kernel", "deepest"), [(0, 3, 7310), (2, 3, 1840), (3, 4, 1024)])
def test_largest_sums_that_there_can_be_fit(tile: int, kernel: int, deepest: int) -> None:
    """Signs that make each transform as large as it gets, as deep as the kernels go; one word deeper they refuse."""
    stride = 1 if kernel == 3 else 2
    where = geometry(stride, 1)
    for signs in (torch.ones(8), torch.tensor([1.0, -1.0]).repeat(4)):
        pattern = signs[:, None] * signs
        for size in (4, 6):
            x = 300 * pattern[:size, :size]
            weight = 127 * pattern[:kernel, :kernel]
            k = {"x": x.expand(1, deepest, -1, -1).contiguous(), "weight_scale": torch.ones(2)}
            k["weight"] = weight.to(torch.int8).expand(2, deepest, -1, -1).contiguous()
            for steps in (Steps(1.0, 0, 255), Steps(1.0, -255, 0), Steps(1.0, -128, 127)):
                want = expected(steps=steps, where=where, **k)
                got = convolve(tile, torch.empty_like(want, dtype=torch.float32), steps=steps, where=where, **k)
                assert max_error(got, want) < 1e-6
    deeper = {**layer(1, deepest + 16, 2, (6, 6), kernel)}
    with pytest.raises(RuntimeError, match=r"sums of \d+ (products|channels) might not fit 32 bits: it takes \d+"):
        convolve(tile, torch.empty(1), steps=STEPS, where=where, **deeper)
    assert tile not in tiles(deeper["weight"], deeper["x"], where)


def test_halves_are_rounded_to_even_and_what_is_no_number_is_low() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, torch.inf, -torch.inf, torch.nan, 3.49, 0.0])
    k = {"x": x.view(1, 1, 1, -1).expand(1, 1, 3, -1).contiguous(), "weight_scale": torch.ones(1)}
    k["weight"] = torch.zeros(1, 1, 3, 3, dtype=torch.int8)
    k["weight"][0, 0, 1, 1] = 1
    for tile in (0, 1, 2):
        got = convolve(tile, torch.empty(1, 1, 3, len(x)), steps=Steps(1.0, -3, 7), where=geometry(1, 1), **k)
        assert got[0, 0, 1].tolist() == [0, 2, 2, 0, -2, 7, -3, 7, -3, -3, 3, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": Steps(0.1, -200, 100)}, "at most 255 apart"),
        ({"steps": Steps(0.1, 1, 100)}, "have 0 between them"),
        ({"steps": Steps(0.1, 0, 0)}, "at most 255 apart"),
        ({"weight": torch.zeros(4, 4, 3, 3)}, "weight in int8"),
        ({"x": torch.zeros(1, 4, 6, 6, dtype=torch.float64)}, "takes float32"),
        ({"weight_scale": torch.ones(3)}, "a value for each of 4 output channels, got 3"),
        ({"where": geometry(1, 1, groups=2)}, "takes groups = 1"),
        ({"weight": torch.zeros(4, 4, 1, 1, dtype=torch.int8)}, "2 to 4 taps"),
        ({"weight": torch.zeros(4, 4, 3, 3, dtype=torch.int8).transpose(0, 1)}, "contiguous weight"),
        ({"tile": 3}, "takes tiles of 0 to"),
        ({"tile": -1}, "takes tiles of 0 to"),
        ({"tile": 0, "where": geometry(1, 1) | {"dilation": (2, 2)}}, "takes dilation = 1"),
    ],
)
def test_calls_that_it_cannot_serve(change: dict[str, Any], message: str) -> None:
    call = {**layer(1, 4, 4, (6, 6), 3), "steps": STEPS, "where": geometry(1, 1), "tile": 2, **change}
    with pytest.raises(RuntimeError, match=message):
        convolve(call.pop("tile"), torch.empty(1, 4, 6, 6), **call)


# ----------------------------------------------------------------------------------------------------------------------
# Rounding


def test_steps_cover_what_was_seen_and_keep_zero() -> None:
    values = torch.linspace(-1, 3, 4001)
    steps = best_steps(values)
    assert steps.high - steps.low == 255
    assert steps.low < 0 < steps.high
    assert (steps.round(values) - values).abs().max() < 0.51 * steps.step + 0.01
    assert steps.round(torch.zeros(1)) == 0


def test_steps_give_an_outlier_up() -> None:
    values = torch.cat([torch.randn(10000, generator=torch.Generator().manual_seed(0)), torch.tensor([40.0])])
    steps = best_steps(values)
    assert steps.high * steps.step < 40
    everything = Steps((40 - values.min().item()) / 255, round(255 * values.min().item() / 40), 240)
    error = {s: (s.round(values) - values).square().mean().item() for s in (steps, everything)}
    assert error[steps] < error[everything]


@pytest.mark.parametrize("values", [torch.zeros(5), torch.tensor([1.0, 2.0]), torch.tensor([-3.0, -1.0])])
def test_steps_of_values_of_one_sign(values: Tensor) -> None:
    steps = best_steps(values)
    assert steps.low <= 0 <= steps.high
    torch.testing.assert_close(steps.round(values), values, rtol=0, atol=0.01)


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_have_a_factor_for_each_output_channel(transposed: bool) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    channel = weight.select(1 if transposed else 0, 2)
    channel.zero_()
    whole, scale = quantize_weight(weight, transposed=transposed)
    assert whole.dtype == torch.int8
    assert scale.shape == (4 if transposed else 6,)
    back = whole.float() * scale.view((1, -1, 1, 1) if transposed else (-1, 1, 1, 1))
    assert ((back - weight).abs().amax([0, 2, 3] if transposed else [1, 2, 3]) <= scale / 2 + 1e-7).all()
    assert whole.abs().amax() == 127


# ----------------------------------------------------------------------------------------------------------------------
# Engines


@pytest.fixture(scope="module")
def unet() -> tuple[UNet256, list[Tensor]]:
    torch.manual_seed(0)
    photos = [torch.randn(1, 3, 256, 256) for _ in range(3)]
    return randomize(UNet256(16), photos[0]), photos


@pytest.fixture(scope="module")
def fast(unet: tuple[UNet256, list[Tensor]]) -> infer.FastGenerator:
    model, photos = unet
    return infer.optimize(model, (photos[0],), precision="int8", calibration=[(photo,) for photo in photos[1:]])


ALGORITHMS = ("quantized_winograd", "quantized_direct")


def quantized(fast: infer.FastGenerator) -> list[str]:
    """Storages of the layers in 8 bits."""
    return [s.choice.storage for s in fast.program.steps if s.choice and s.choice.algorithm in ALGORITHMS]


def test_picture_keeps_its_quality_and_the_report_says_it(
    unet: tuple[UNet256, list[Tensor]], fast: infer.FastGenerator
) -> None:
    model, photos = unet
    with torch.no_grad():
        decibels = [psnr(fast(photo), model(photo)) for photo in photos]
    assert all(LEAST_DB <= db < 80 for db in decibels)
    assert fast.psnr["the example"] == pytest.approx(decibels[0], abs=0.1)
    assert fast.psnr["calibration"] == pytest.approx(min(decibels[1:]), abs=0.1)
    assert "int8" in quantized(fast)
    text = str(fast.report())
    assert f"PSNR {fast.psnr['calibration']:.1f} dB to the original on calibration" in text
    assert "quantized_winograd m=1 int8" in text or "quantized_direct int8" in text


def test_layers_are_computed_by_the_kernel(unet: tuple[UNet256, list[Tensor]], fast: infer.FastGenerator) -> None:
    def calls() -> int:
        return sum(_native.algorithm_calls()[name] for name in ALGORITHMS)

    before = calls()
    fast(unet[1][0])
    assert calls() - before == len(quantized(fast)) > 5


def test_graph_and_program_agree(unet: tuple[UNet256, list[Tensor]], fast: infer.FastGenerator) -> None:
    """The node as torch computes it, on pictures that were not calibrated with."""
    photo = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(5))
    (graph,) = fx.Interpreter(fast._captured.module).run(photo)
    assert psnr(fast(photo), graph) > 50


def test_file_is_a_quarter_of_the_size_and_computes_the_same(
    unet: tuple[UNet256, list[Tensor]], fast: infer.FastGenerator, tmp_path: Path
) -> None:
    model, photos = unet
    fast.save(tmp_path / "int8")
    infer.optimize(model, (photos[0],)).save(tmp_path / "fp32")
    sizes = {name: (tmp_path / name).stat().st_size for name in ("int8", "fp32")}
    assert sizes["int8"] < 0.45 * sizes["fp32"]
    again = infer.load(tmp_path / "int8")
    assert torch.equal(again(photos[0]), fast(photos[0]))
    assert again.precision == "int8"
    assert again.report() == fast.report()


def test_weights_are_kept_once(unet: tuple[UNet256, list[Tensor]]) -> None:
    model, photos = unet
    fast = infer.optimize(model, (photos[0],), precision="int8")
    picture, before = fast(photos[0]), fast.memory()
    assert before.weights < 0.45 * infer.optimize(model, (photos[0],)).memory().weights
    assert fast.drop_weights() > 0
    assert torch.equal(fast(photos[0]), picture)
    assert fast.memory().weights == before.weights - fast.drop_weights()


def test_tuning(unet: tuple[UNet256, list[Tensor]]) -> None:
    model, photos = unet
    fast = infer.optimize(model, (photos[0],), precision="int8", tune=True)
    assert min(fast.psnr.values()) >= LEAST_DB
    measured = [s.choice.measured_ms for s in fast.program.steps if s.choice]
    assert all(ms is not None and ms > 0 for ms in measured)


def test_layers_without_a_kernel_in_8_bits_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 64, 7, padding=3),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(64, 64, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 1),
    )
    x = torch.randn(1, 8, 64, 64)
    fast = infer.optimize(model.eval(), (x,), precision="int8")
    # The 1x1 where the processor multiplies bytes; elsewhere it would be no faster.
    assert len(quantized(fast)) in (1, 2)
    assert not fast.kept
    with torch.no_grad():
        assert psnr(fast(x), model(x)) >= LEAST_DB


class Skip(nn.Module):
    """An image that is read as it is and, behind an activation, joined with another one."""

    def __init__(self, act: nn.Module, *, twice: bool = False) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))
        self.joined, self.last = nn.Conv2d(128, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.act, self.twice = act, twice

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second, gate = self.second(first), self.act(first)
        y = self.last(self.joined(torch.cat([gate, torch.relu(second)], 1)))
        return y + gate if self.twice else y


@pytest.mark.parametrize(
    ("model", "gone"),
    [
        pytest.param(Skip(nn.ReLU()), True, id="relu"),
        pytest.param(Skip(nn.LeakyReLU(0.1)), False, id="another activation"),
        pytest.param(Skip(nn.ReLU(), twice=True), False, id="read by another layer too"),
    ],
)
def test_rounding_from_0_on_does_what_a_relu_in_front_of_it_would(model: Skip, gone: bool, tmp_path: Path) -> None:
    x = torch.randn(1, 64, 16, 16, generator=torch.Generator().manual_seed(0))
    fast = infer.optimize(model.eval(), (x,), precision="int8")
    assert len(quantized(fast)) == 4
    rows = fast.report().rows
    assert (not any(row.kind == "pointwise" for row in rows)) == gone
    (joined,) = (row for row in rows if "joined" in row.layer)
    assert any("act" in name for name in joined.fused) == gone
    with torch.no_grad():
        assert psnr(fast(x), model(x)) >= LEAST_DB
    fast.save(tmp_path / "saved")
    again = infer.load(tmp_path / "saved")
    assert torch.equal(again(x), fast(x)) and again.report() == fast.report()


class Logarithm(nn.Module):
    """A layer that reads minus infinity where a pixel is black, and one that reads none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 64, 4, 2, 1), nn.Conv2d(16, 64, 4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(torch.log(x)), self.second(x)


def test_a_layer_that_reads_no_finite_values_stays() -> None:
    torch.manual_seed(0)
    model, x = Logarithm().eval(), torch.rand(1, 16, 64, 64)
    x[0, 3, 20, 20] = 0
    fast = infer.optimize(model, (x,), precision="int8")
    # The 1x1 where the processor multiplies bytes; elsewhere it would be no faster.
    assert len(quantized(fast)) in (1, 2)
    with torch.no_grad():
        for got, want in zip(fast(x), model(x), strict=True):
            assert torch.equal(torch.isfinite(got), torch.isfinite(want))
            finite = torch.isfinite(want)
            assert psnr(got[finite], want[finite]) >= LEAST_DB


class Fragile(nn.Module):
    """A difference of two layers that are nearly the same: what their rounding changes is all that is left."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 64, 4, 2, 1)
        self.plus, self.minus = (nn.Conv2d(64, 64, 4, 2, 1, bias=False) for _ in range(2))
        self.last = nn.Conv2d(64, 16, 3, padding=1, bias=False)
        with torch.no_grad():
            self.minus.weight.copy_(self.plus.weight + 2e-4 * torch.randn_like(self.plus.weight))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(self.plus(x) - self.minus(x))


def test_layers_that_harm_the_picture_stay_in_float32() -> None:
    torch.manual_seed(0)
    model, x = Fragile().eval(), torch.randn(1, 16, 64, 64)
    fast = infer.optimize(model, (x,), precision="int8")
    assert {"plus: conv2d", "minus: conv2d"} <= set(fast.kept)
    assert min(fast.psnr.values()) >= LEAST_DB
    with torch.no_grad():
        assert psnr(fast(x), model(x)) >= LEAST_DB
    assert "plus: conv2d stays in float32: rounding it alone leaves" in str(fast.report())
    weights = [tensor for tensor in fast.program.constants.values() if tensor.ndim == 4]
    assert sum(tensor.numel() for tensor in weights) == sum(p.numel() for p in model.parameters() if p.ndim == 4)


def test_what_lies_beyond_the_calibration_is_cut_off() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(16, 64, 4, 2, 1, bias=False).eval(), torch.rand(1, 16, 64, 64)
    narrow = infer.optimize(model, (x,), precision="int8")
    wide = infer.optimize(model, (x,), precision="int8", calibration=[(4 * x,)])
    assert quantized(narrow)
    with torch.no_grad():
        expected = model(4 * x)
    assert psnr(narrow(4 * x), expected) < 25 < LEAST_DB <= psnr(wide(4 * x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8", "calibration": [torch.zeros(1, 3, 8, 8)]}, r"calibration\[0\] must be a tuple"),
        (
            {"precision": "int8", "calibration": [(torch.zeros(1, 3, 8, 8),), (torch.zeros(1, 3, 8, 9),)]},
            r"calibration\[1\]: infer: argument 0 must be \[1, 3, 8, 8\]",
        ),
        (
            {"precision": "int8", "calibration": [()]},
            r"calibration\[0\]: infer: arguments must be those of the",
        ),
        ({"precision": "fp32", "calibration": [(torch.zeros(1, 3, 8, 8),)]}, "calibration is for precision 'int8'"),
    ],
)
def test_calibration_that_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infer.optimize(nn.Conv2d(3, 8, 3).eval(), (torch.zeros(1, 3, 8, 8),), **options)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose factors are a fifth too large, in the program alone."""
    make = engine.FastGenerator.__init__

    def wrong(self: Any, *args: Any) -> None:
        make(self, *args)
        for step in self.program.steps:
            if step.choice and step.choice.algorithm in ALGORITHMS:
                self.program.constants[step.args[2].index] = self.program.constants[step.args[2].index] * 1.2

    torch.manual_seed(0)
    model, x = nn.Conv2d(16, 64, 4, 2, 1).eval(), torch.randn(1, 16, 64, 64)
    assert quantized(infer.optimize(model, (x,), precision="int8"))
    monkeypatch.setattr(engine.FastGenerator, "__init__", wrong)
    monkeypatch.setattr(QuantizedLayers, "least_db", -100.0)
    with pytest.raises(infer.Mismatch, match="differs"):
        infer.optimize(model, (x,), precision="int8")


def test_a_wrong_pass_does_not_hide_behind_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    simplify = engine.simplify

    def wrong(module: fx.GraphModule, precision: str) -> None:
        simplify(module, precision)
        name = next(n.target for n in module.graph.nodes if n.op == "get_attr" and getattr(module, n.target).ndim == 4)
        setattr(module, name, getattr(module, name) * 1.001)

    monkeypatch.setattr(engine, "simplify", wrong)
    with pytest.raises(infer.Mismatch, match="expected at most 1e-04"):
        infer.optimize(nn.Conv2d(3, 8, 3).eval(), (torch.randn(1, 3, 8, 8),), precision="int8")
