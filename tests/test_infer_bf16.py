"""infer.optimize(precision="bf16"): kernels that read weights in bfloat16, and engines made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bench.generators import ResNet9, UNet256, randomize
from fastgan import _native, infer
from fastgan.infer import engine
from fastgan.infer.narrow import NarrowWeights
from fastgan.infer.verify import psnr
from fastgan.ops import _into
from tests.helpers import max_error

# ----------------------------------------------------------------------------------------------------------------------
# Kernels


def layer(
    n: int, c_in: int, c_out: int, size: tuple[int, int], kernel: int, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """x and a weight, float32 of order 1 in x and in the result."""
    g = torch.Generator().manual_seed(c_in + 1000 * c_out)
    weight = torch.randn((c_in, c_out) if transposed else (c_out, c_in), generator=g)
    weight = weight[:, :, None, None] * torch.randn(*weight.shape, kernel, kernel, generator=g)
    return torch.randn(n, c_in, *size, generator=g), weight / (c_in * kernel**2) ** 0.5


def convolve(
    x: Tensor,
    weight: Tensor,
    algorithm: str,
    tile: int,
    storage: str,
    *,
    stride: int = 1,
    padding: int = 0,
    transposed: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """The kernel itself, by an algorithm that is asked for."""
    out = torch.empty_like(plain(x, weight, stride=stride, padding=padding, transposed=transposed)).contiguous()
    pairs = ((stride, stride), (padding, padding), (0, 0), (1, 1))
    _into.scaled_conv2d_into(
        *(x, weight, None, None, None, None, bias, None, *pairs, transposed, 1, False),
        *(False, algorithm, tile, storage, "linear", 0.0, 1.0, None, 1.0, out),
    )
    return out


def plain(x: Tensor, weight: Tensor, *, stride: int, padding: int, transposed: bool) -> Tensor:
    return (F.conv_transpose2d if transposed else F.conv2d)(x, weight, stride=stride, padding=padding)


def rounded(weight: Tensor) -> Tensor:
    return weight.bfloat16().float()


# Channels that fill registers and blocks, that end in the midst of them, and fewer than one register; several blocks of
# columns (kDotColumns, kAxpyColumns); more rows than a task has.
FEW_PIXELS = [
    pytest.param((1, 64, 64, (2, 2), 4), {"stride": 2, "padding": 1}, id="whole blocks"),
    pytest.param((1, 67, 37, (3, 5), 3), {"padding": 1}, id="tails of columns and rows"),
    pytest.param((3, 5, 3, (2, 3), 1), {}, id="fewer columns than a register"),
    pytest.param((1, 200, 70, (4, 4), 4), {"stride": 2, "padding": 1}, id="several blocks, the last narrower"),
    pytest.param((2, 64, 64, (2, 2), 4), {"stride": 2, "padding": 1, "transposed": True}, id="transposed"),
    pytest.param((1, 67, 131, (3, 5), 3), {"padding": 1, "transposed": True}, id="transposed, tails"),
    pytest.param((1, 3, 1, (1, 1), 3), {"transposed": True}, id="transposed, fewer columns than a register"),
]


@pytest.mark.parametrize(("shape", "options"), FEW_PIXELS)
def test_few_pixels_sums_what_it_would_of_rounded_weights(shape: Any, options: dict[str, Any]) -> None:
    x, weight = layer(*shape, transposed=options.get("transposed", False))
    narrow = convolve(x, weight, "few_pixels", 0, "bf16", **options)
    assert max_error(narrow, convolve(x, rounded(weight), "few_pixels", 0, "fp32", **options)) < 1e-6
    assert max_error(narrow, convolve(x, weight, "few_pixels", 0, "fp32", **options)) > 1e-4


WINOGRAD = [
    pytest.param((1, 64, 64, (8, 8), 3), 2, {"padding": 1}, id="F(2, 3)"),
    pytest.param((1, 67, 37, (9, 7), 3), 2, {"padding": 1}, id="F(2, 3), tails of channels, odd sizes"),
    pytest.param((1, 67, 37, (9, 7), 3), 4, {"padding": 1}, id="F(4, 3), tails of channels, odd sizes"),
    pytest.param((2, 300, 70, (5, 5), 3), 2, {"padding": 1}, id="more than one panel deep"),
    pytest.param((1, 33, 50, (18, 14), 4), 3, {"stride": 2, "padding": 1}, id="F(3, 2), four planes"),
    pytest.param((1, 33, 50, (9, 7), 4), 2, {"stride": 2, "padding": 1, "transposed": True}, id="four phases"),
    pytest.param((1, 300, 16, (9, 7), 4), 3, {"stride": 2, "padding": 1, "transposed": True}, id="phases at once"),
    pytest.param((2, 33, 30, (5, 6), 4), 2, {"stride": 2, "padding": 1, "transposed": True}, id="two phases at once"),
    pytest.param((1, 20, 18, (6, 6), 3), 3, {"stride": 2, "padding": 1, "transposed": True}, id="single taps"),
    pytest.param((1, 512, 512, (8, 8), 4), 2, {"stride": 2, "padding": 1}, id="weights that threads divide"),
]


@pytest.mark.parametrize(("shape", "tile", "options"), WINOGRAD)
def test_winograd_multiplies_with_rounded_transforms(shape: Any, tile: int, options: dict[str, Any]) -> None:
    """Against float64 the error is that of rounding each transformed weight, and no more: 2⁻⁹ of it at worst, averaged
    over all channels and amplified by the transform back, by tiles of 4 the most."""
    x, weight = layer(*shape, transposed=options.get("transposed", False))
    exact = plain(x.double(), weight.double(), **{"stride": 1, "padding": 0, "transposed": False, **options})

    def error(storage: str) -> float:
        got = convolve(x, weight, "winograd", tile, storage, **options)
        return ((got - exact).square().mean() / exact.square().mean()).sqrt().item()

    assert error("fp32") < 1e-5
    assert 1e-4 < error("bf16") < (2e-2 if tile == 4 else 4e-3)


# Without the tiles of 4, whose transform divides by 3 and 5.
@pytest.mark.parametrize(("shape", "tile", "options"), [case for case in WINOGRAD if case.values[1] < 4])
def test_winograd_of_transforms_that_bfloat16_has(shape: Any, tile: int, options: dict[str, Any]) -> None:
    """Weights that are signs stay exact: both storages then compute the same bits."""
    x, weight = layer(*shape, transposed=options.get("transposed", False))
    weight = weight.sign()
    narrow = convolve(x, weight, "winograd", tile, "bf16", **options)
    assert torch.equal(narrow, convolve(x, weight, "winograd", tile, "fp32", **options))


@pytest.mark.parametrize(
    ("algorithm", "c_out", "side"), [("unfolded_conv", 64, 8), ("direct_conv", 3, 16), ("torch", 8, 16)]
)
def test_other_algorithms_read_the_weight_as_it_is(algorithm: str, c_out: int, side: int) -> None:
    x, weight = layer(1, 64, c_out, (side, side), 3)
    got = convolve(x, weight, algorithm, 0, "bf16", padding=1)
    assert torch.equal(got, convolve(x, weight, algorithm, 0, "fp32", padding=1))


def test_storage_that_there_is_not() -> None:
    x, weight = layer(1, 4, 4, (2, 2), 1)
    with pytest.raises(RuntimeError, match="storage must be one of fp32, bf16, got 'fp16'"):
        convolve(x, weight, "few_pixels", 0, "fp16")


@pytest.mark.parametrize(("algorithm", "tile"), [("packed_direct", 0), ("few_pixels", 0), ("winograd", 2)])
def test_both_storages_of_one_weight_are_kept_apart_and_outlive_its_values(algorithm: str, tile: int) -> None:
    library = _native.cpu_library()
    x, weight = layer(1, 128, 128, (4, 4), 3)
    values = weight.clone()
    library.fastgan_freeze_weight(weight.data_ptr())
    try:
        narrow = convolve(x, weight, algorithm, tile, "bf16", padding=1)
        of_narrow = library.fastgan_made_bytes(weight.data_ptr())
        if algorithm != "winograd":
            assert of_narrow == weight.numel() * 2
        wide = convolve(x, weight, algorithm, tile, "fp32", padding=1)
        assert torch.equal(wide, convolve(x, values, algorithm, tile, "fp32", padding=1))
        assert not torch.equal(wide, narrow)
        if algorithm == "winograd":
            # Each in whole pages.
            assert library.fastgan_made_bytes(weight.data_ptr()) == pytest.approx(3 * of_narrow, abs=2 * 4096)
        assert library.fastgan_drop_weight(weight.data_ptr(), weight.numel() * 4)
        assert torch.equal(narrow, convolve(x, weight, algorithm, tile, "bf16", padding=1))
    finally:
        library.fastgan_forget_weight(weight.data_ptr())


# ----------------------------------------------------------------------------------------------------------------------
# Engines


@pytest.fixture(scope="module")
def unet() -> tuple[UNet256, Tensor]:
    torch.manual_seed(0)
    photo = torch.randn(1, 3, 256, 256)
    return randomize(UNet256(16), photo), photo


@pytest.fixture(scope="module")
def fast(unet: tuple[UNet256, Tensor]) -> infer.FastGenerator:
    model, photo = unet
    return infer.optimize(model, (photo,), precision="bf16")


def storages(fast: infer.FastGenerator) -> set[str]:
    return {step.choice.storage for step in fast.program.steps if step.choice is not None}


def test_picture_keeps_its_quality_and_the_report_says_it(
    unet: tuple[UNet256, Tensor], fast: infer.FastGenerator
) -> None:
    model, photo = unet
    with torch.no_grad():
        expected = model(photo)
    db = psnr(fast(photo), expected)
    assert NarrowWeights.least_db <= db < 80
    assert fast.psnr["the example"] == pytest.approx(db, abs=0.1)
    assert fast.psnr["noise"] >= NarrowWeights.least_db
    assert "bf16" in storages(fast)
    assert not fast.kept
    text = str(fast.report())
    assert f"PSNR {fast.psnr['the example']:.1f} dB to the original on the example" in text
    assert "packed_direct bf16" in text


def test_file_is_half_the_size_and_computes_the_same(
    unet: tuple[UNet256, Tensor], fast: infer.FastGenerator, tmp_path: Path
) -> None:
    model, photo = unet
    fast.save(tmp_path / "bf16")
    infer.optimize(model, (photo,)).save(tmp_path / "fp32")
    sizes = {name: (tmp_path / name).stat().st_size for name in ("bf16", "fp32")}
    assert sizes["bf16"] < 0.55 * sizes["fp32"]
    again = infer.load(tmp_path / "bf16")
    assert torch.equal(again(photo), fast(photo))
    assert again.precision == "bf16"
    assert again.report() == fast.report()
    again.save(tmp_path / "again")
    assert (tmp_path / "again").stat().st_size == pytest.approx(sizes["bf16"], rel=1e-3)


def test_memory_with_and_without_the_values(unet: tuple[UNet256, Tensor]) -> None:
    model, photo = unet
    wide, narrow = (infer.optimize(model, (photo,), precision=precision) for precision in ("fp32", "bf16"))
    picture, before = narrow(photo), narrow.memory()
    # What is multiplied as it is needs half of its weights.
    packed = sum(
        2 * narrow.program.constants[step.args[1].index].numel()
        for step in narrow.program.steps
        if step.choice is not None and step.choice.algorithm == "packed_direct"
    )
    assert packed > 0
    dropped = narrow.drop_weights()
    after = narrow.memory()
    assert dropped >= 2 * packed
    assert before.weights - after.weights == dropped
    assert after.prepared == before.prepared >= packed
    assert torch.equal(narrow(photo), picture)
    wide.drop_weights()
    assert after.total - after.activations < 0.8 * (wide.memory().total - wide.memory().activations)


def test_tuning_rounds_the_same_weights_and_leaves_nothing_behind(unet: tuple[UNet256, Tensor], tmp_path: Path) -> None:
    """Weights are rounded in the graph: choices of algorithms leave the picture as good as it was."""
    model, photo = unet
    tuned = infer.optimize(model, (photo,), precision="bf16", tune=True)
    assert min(tuned.psnr.values()) >= NarrowWeights.least_db
    tuned.save(tmp_path / "tuned")
    assert tuned.memory().prepared == infer.load(tmp_path / "tuned").memory().prepared
    plain_weights = [n.target for n in tuned._captured.module.graph.nodes if n.meta.get("storage") == "bf16"]
    assert plain_weights
    for name in plain_weights:
        weight = getattr(tuned._captured.module, name)
        assert torch.equal(weight, rounded(weight))


def test_tiles_of_four_keep_float32_transforms() -> None:
    torch.manual_seed(0)
    fast = infer.optimize(ResNet9(32).eval(), (torch.randn(1, 3, 64, 64),), precision="bf16")
    for step in fast.program.steps:
        if step.choice is not None and step.choice.tile == 4:
            assert step.choice.storage == "fp32"
    assert min(fast.psnr.values()) > 45


class Fragile(nn.Module):
    """A difference of two layers that are nearly the same: what their rounding changes is all that is left."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.plus, self.minus = (nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(2))
        self.last = nn.Conv2d(64, 3, 3, padding=1, bias=False)
        with torch.no_grad():
            self.minus.weight.copy_(self.plus.weight + 2e-4 * torch.randn_like(self.plus.weight))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(self.plus(x) - self.minus(x))


def test_layers_that_harm_the_picture_stay_in_float32() -> None:
    torch.manual_seed(0)
    model, x = Fragile().eval(), torch.randn(1, 3, 12, 12)
    fast = infer.optimize(model, (x,), precision="bf16")
    assert set(fast.kept) == {"plus: conv2d", "minus: conv2d"}
    assert all(value < NarrowWeights.least_db for value in fast.kept.values())
    assert min(fast.psnr.values()) >= NarrowWeights.least_db
    with torch.no_grad():
        assert psnr(fast(x), model(x)) >= NarrowWeights.least_db
    assert "plus: conv2d stays in float32: rounding it alone leaves" in str(fast.report())
    weights = {n.meta["storage"] for n in fast._captured.module.graph.nodes if n.meta.get("storage")}
    assert weights == {"fp32", "bf16"}


class Cancelling(nn.Module):
    """Its one layer's rounding is more than 40 dB, whatever is done: 1 + 2⁻⁹ is a half of it from 1 in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_((torch.eye(8) * (1 + 2.0**-9))[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) - x


def test_a_model_that_no_layer_of_can_be_rounded_is_computed_in_float32() -> None:
    model, x = Cancelling().eval(), torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    fast = infer.optimize(model, (x,), precision="bf16")
    assert list(fast.kept) == ["conv: conv2d"]
    assert storages(fast) == {"fp32"}
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)


def test_a_wrong_pass_does_not_hide_behind_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandth too much is less than rounding may do to the picture, and is found all the same."""
    simplify = engine.simplify

    def wrong(module: fx.GraphModule, precision: str) -> None:
        simplify(module, precision)
        name = next(n.target for n in module.graph.nodes if n.op == "get_attr" and getattr(module, n.target).ndim == 4)
        setattr(module, name, getattr(module, name) * 1.001)

    monkeypatch.setattr(engine, "simplify", wrong)
    with pytest.raises(infer.Mismatch, match="expected at most 1e-04"):
        infer.optimize(nn.Conv2d(3, 8, 3).eval(), (torch.randn(1, 3, 8, 8),), precision="bf16")
