"""Results that one convolution in 8 bits hands on to the next as bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantized import convolve, geometry, layer
from skips import Skips
from torch import Tensor, nn

from bench.generators import UNet256, randomize
from fastgan import infer
from fastgan.infer.byte_images import handovers
from fastgan.infer.quantize import Steps
from fastgan.ops import _into

STEPS = Steps(0.02, -90, 165)
EPILOGUE = {"act": "lrelu", "alpha": 0.2, "gain": 1.4, "clamp": 800.0}


def layout_of(x: Tensor, weight: Tensor, where: dict[str, Any]) -> list[int]:
    return _into.byte_layout(x, weight, *where.values())


def rounded(x: Tensor, steps: Steps) -> Tensor:
    """x [1, C, H, W] as bytes of each channel."""
    whole = torch.clamp(torch.round(x * torch.tensor(1 / steps.step)), steps.low, steps.high)
    return (whole - steps.low).to(torch.uint8)[0]


def inside(image: Tensor, layout: list[int], shape: torch.Size) -> Tensor:
    """The pixels of an image [rows, columns, depth], as [C, H, W]."""
    _, _, _, top, left = layout
    return image[top : top + shape[2], left : left + shape[3]].permute(2, 0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels

# Slabs that are full, that are not, and several; lines of several blocks; phases, and rows that only some of them have.
LAYERS = [
    pytest.param((1, 16, 16, (8, 8), 3), geometry(1, 1), id="3x3"),
    pytest.param((1, 48, 80, (9, 7), 3), geometry(1, 1), id="3x3, odd sizes"),
    pytest.param((1, 32, 144, (40, 36), 4), geometry(2, 1), id="4x4 of stride 2"),
    pytest.param((1, 32, 32, (11, 6), 3), geometry(2, 2), id="3x3 of stride 2, more padding"),
    pytest.param((1, 64, 96, (9, 17), 4), geometry(2, 1, transposed=True), id="transposed 4x4"),
    pytest.param((1, 32, 16, (6, 5), 3), geometry(2, 1, 1, transposed=True), id="transposed 3x3"),
    pytest.param((1, 32, 48, (6, 5), 3), geometry(2, 1, transposed=True), id="transposed 3x3, an odd result"),
    pytest.param((1, 512, 64, (1, 1), 4), geometry(1, 0, transposed=True), id="one pixel to 4x4"),
]


@pytest.mark.parametrize(("shape", "where"), LAYERS)
def test_bytes_are_what_the_next_layer_would_round(shape: Any, where: dict[str, Any]) -> None:
    """Written to two images at once, beside what another layer writes there, and around it nothing."""
    k = {**layer(*shape, transposed=where["transposed"]), "bias": torch.randn(shape[2]), **EPILOGUE}
    c_out = shape[2]
    floats = convolve(0, torch.empty(size_of(k, where)), steps=STEPS, where=where, **k)
    roundings = [Steps(floats.abs().max().item() / 100, -128, 127), Steps(floats.max().item() / 200, 0, 255)]
    h, w = floats.shape[2:]
    images = [torch.full((h + 3, w + 2, depth), 77, dtype=torch.uint8) for depth in (c_out + 32, c_out)]
    parts = [images[0][1 : 1 + h, 1 : 1 + w, 16 : 16 + c_out], images[1][2 : 2 + h, :w]]
    bytes_of = (None, [part.permute(2, 0, 1) for part in parts])
    settings = [[getattr(r, name) for r in roundings] for name in ("step", "low", "high")]
    out = torch.full_like(floats, torch.nan)
    convolve(0, out, steps=STEPS, where=where, handed_on=(*bytes_of, *settings), **k)
    assert out.isnan().all(), "floats were written too"
    for image, part, rounding in zip(images, parts, roundings, strict=True):
        assert torch.equal(part.permute(2, 0, 1), rounded(floats, rounding))
        assert len(part.unique()) > 20
        part.fill_(77)
        assert (image == 77).all(), "something was written around the result"


@pytest.mark.parametrize(("shape", "where"), LAYERS)
def test_bytes_are_read_as_what_they_were_rounded_from(shape: Any, where: dict[str, Any]) -> None:
    k = {**layer(*shape, transposed=where["transposed"]), "bias": torch.randn(shape[2]), **EPILOGUE}
    want = convolve(0, torch.empty(size_of(k, where)), steps=STEPS, where=where, **k)
    layout = layout_of(k["x"], k["weight"], where)
    assert layout[2] == shape[1]
    image = torch.randint(0, 256, layout[:3], dtype=torch.uint8)
    inside(image, layout, k["x"].shape).copy_(rounded(k["x"], STEPS))
    x, k["x"] = k["x"], torch.full_like(k["x"], torch.nan)
    got = convolve(0, torch.empty_like(want), steps=STEPS, where=where, handed_on=(image, [], [], [], []), **k)
    assert torch.equal(got, want)
    assert torch.equal(inside(image, layout, x.shape), rounded(x, STEPS)), "x was written to"


def size_of(k: dict[str, Any], where: dict[str, Any]) -> torch.Size:
    x, weight = (k[name].to("meta", torch.float32) for name in ("x", "weight"))
    if where["transposed"]:
        return F.conv_transpose2d(x, weight, None, where["stride"], where["padding"], where["output_padding"]).shape
    return F.conv2d(x, weight, None, where["stride"], where["padding"]).shape


@pytest.mark.parametrize(
    ("shape", "where"),
    [
        pytest.param((2, 32, 16, (8, 8), 3), geometry(1, 1), id="two samples"),
        pytest.param((1, 40, 16, (8, 8), 3), geometry(1, 1), id="channels that fill no group"),
        pytest.param((1, 32, 16, (8, 8), 1), geometry(2, 0), id="pixels that are not read"),
        pytest.param((1, 32, 16, (8, 8), 3), geometry(1, 1, reflect=True), id="mirrored padding"),
    ],
)
def test_what_cannot_be_read_as_bytes(shape: Any, where: dict[str, Any]) -> None:
    k = layer(*shape)
    assert layout_of(k["x"], k["weight"], where) in ([0] * 5, [8, 8, 32, 0, 0])


def test_wrong_images_are_refused() -> None:
    k, where = layer(1, 32, 32, (8, 8), 3), geometry(1, 1)
    out, image = torch.empty(1, 32, 8, 8), torch.empty(8, 8, 32, dtype=torch.uint8).permute(2, 0, 1)

    def run(message: str, *handed_on: Any, tile: int = 0, **more: Any) -> None:
        with pytest.raises(RuntimeError, match=f"quantized_conv2d: {message}"):
            convolve(tile, out, steps=STEPS, where=where, handed_on=handed_on, **k, **more)

    rounding = ([0.1], [0], [255])
    run(
        "byte_images must have a step, a low and a high each, got 1 of them and 1, 0 and 1",
        None,
        [image],
        [0.1],
        [],
        [1],
    )
    run("byte_images must be uint8", None, [image.float()], *rounding)
    run("byte_images must be uint8", None, [image.contiguous()], *rounding)
    run("byte_images must be uint8", None, [image[:, :7]], *rounding)
    run("byte_images take no noise or residual", None, [image], *rounding, residual=out)
    run("with tiles it reads and writes floats", None, [image], *rounding, tile=2)
    run("x_bytes must be uint8", torch.empty(10, 9, 32, dtype=torch.uint8), [], [], [], [])
    run("x_bytes must be uint8", torch.empty(10, 10, 32), [], [], [], [])


# ----------------------------------------------------------------------------------------------------------------------
# Engines


@pytest.fixture
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is chosen where processors have VNNI."""
    monkeypatch.setattr(_into, "quantized_tiles", lambda *args: [(0, 1e-6)])


def int8_engine(model: nn.Module, x: Tensor) -> infer.FastGenerator:
    torch.manual_seed(1)
    calls = [(torch.randn_like(x),) for _ in range(2)]
    return infer.optimize(model, (x,), precision="int8", calibration=calls)


def check_against_floats(fast: infer.FastGenerator, x: Tensor) -> None:
    """Watched, each step has floats; results are the same bit for bit."""
    with torch.no_grad(), fast.pool.borrow() as workspace:
        for factor in (1.0, 0.3):
            (by_steps,), (got,) = (workspace.run([factor * x], watch) for watch in (lambda number, value: None, None))
            assert torch.equal(got, by_steps)


def names_of(fast: infer.FastGenerator) -> tuple[set[str], set[str]]:
    """Steps that read bytes, and steps that write them."""
    found = handovers(fast.program)
    steps = [(step.name.split(":")[0], found.get(step.slot)) for step in fast.program.steps]
    reading = {name for name, handover in steps if handover and handover.x}
    return reading, {name for name, handover in steps if handover and handover.results}


def skips(seen: str = "") -> tuple[infer.FastGenerator, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, 32, 48, 48)
    return int8_engine(Skips(seen).eval(), x), x


@pytest.mark.usefixtures("without_tiles")
def test_values_are_handed_on_between_layers() -> None:
    fast, x = skips()
    assert {row.algorithm for row in fast.report().rows} == {"quantized_direct int8"}
    assert names_of(fast) == (
        {"second", "third", "up", "joined", "last"},
        {"first", "second", "third", "up", "joined"},
    )
    check_against_floats(fast, x)


@pytest.mark.usefixtures("without_tiles")
def test_what_torch_reads_too_stays_floats() -> None:
    """And with it what is read beside it."""
    fast, x = skips("torch")
    reading, writing = names_of(fast)
    assert reading.isdisjoint({"second", "joined"})
    assert writing.isdisjoint({"first", "up"})
    assert {"third", "up"} <= reading
    check_against_floats(fast, x)


@pytest.mark.usefixtures("without_tiles")
def test_a_u_net() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 256, 256)
    model = UNet256(width=16)
    randomize(model, x)
    fast = int8_engine(model.eval(), x)
    assert len(handovers(fast.program)) >= 8
    check_against_floats(fast, x)


@pytest.mark.usefixtures("without_tiles")
def test_samples_side_by_side_stay_floats() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 24, 24)
    fast = int8_engine(Skips().eval(), x)
    assert not handovers(fast.program)


def test_tiles_read_and_write_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_into, "quantized_tiles", lambda *args: [(2, 1e-6)])
    fast, x = skips()
    assert {row.algorithm for row in fast.report().rows} == {"quantized_winograd m=2 int16"}
    assert not handovers(fast.program)
    check_against_floats(fast, x)
