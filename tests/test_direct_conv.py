"""scaled_conv2d where the C++ library runs products of its own, Winograd's and direct ones: against the reference in
float64, in every geometry and with everything that the epilogue can do."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close_to_float64, layouts, max_error
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastgan import ops
from fastgan._native import WINOGRAD_TILES, winograd_tile_calls
from fastgan.ops import scaled_conv2d
from fastgan.reference.activation import ACTIVATIONS

WINOGRAD_BOUND = 1e-5


@dataclass(frozen=True)
class Call:
    """x [n, c_in, h, w], a kernel [kh, kw] and the keywords of scaled_conv2d's geometry; ``kept``: the weight is a
    parameter, and no gradient is recorded."""

    n: int
    c_in: int
    c_out: int
    h: int
    w: int
    kernel: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)
    kept: bool = False

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Float32 values; the product is of order 1, and its scales spread by 10x, as StyleGAN's styles do."""
        g = torch.Generator().manual_seed(seed)
        shape = (self.c_in, self.c_out) if self.options.get("transposed") else (self.c_out, self.c_in)
        stride = self.options.get("stride", 1) if self.options.get("transposed") else 1
        per_result = self.c_in * self.kernel[0] * self.kernel[1] / stride**2
        x = torch.randn(self.n, self.c_in, self.h, self.w, generator=g)
        weight = torch.randn(*shape, *self.kernel, generator=g) / per_result**0.5
        return {
            "x": x,
            "weight": nn.Parameter(weight) if self.kept else weight,
            "in_scale": 10 ** (torch.rand(self.n, self.c_in, generator=g) - 0.5),
            "out_scale": 10 ** (torch.rand(self.n, self.c_out, generator=g) - 0.5),
        }

    def sizes(self) -> tuple[int, int]:
        """Height and width of the result."""
        stride, padding = self.options.get("stride", 1), self.options.get("padding", 0)
        dilation, extra = self.options.get("dilation", 1), self.options.get("output_padding", 0)
        found = []
        for size, kernel in zip((self.h, self.w), self.kernel, strict=True):
            span = dilation * (kernel - 1) + 1
            if self.options.get("transposed"):
                found.append((size - 1) * stride - 2 * padding + span + extra)
            else:
                found.append((size + 2 * padding - span) // stride + 1)
        return found[0], found[1]


def square(n: int, c_in: int, c_out: int, size: int, kernel: int, stride: int, padding: int, **options: Any) -> Call:
    """A square kernel over a map one wider than high, so that rows and columns cannot be taken for each other."""
    return Call(n, c_in, c_out, size, size + 1, (kernel, kernel), {"stride": stride, "padding": padding, **options})


def kept(call: Call) -> Call:
    return replace(call, kept=True)


# Shapes for which csrc/cpu/winograd_conv.cpp's estimate of costs picks Winograd, named after its choice, F(m, r): small
# tiles where few tiles meet many channels, since transforming the weights costs more than it saves on them. Weights
# that are kept cost less: Winograd then takes smaller maps, and planes or phases that differ in taps.
WINOGRAD = {
    "F(2,3) 3x3": square(2, 256, 256, 12, 3, 1, 1),
    "F(2,3) 3x3 transposed": square(2, 256, 256, 12, 3, 1, 1, transposed=True),
    "F(4,3) 3x3": square(2, 128, 130, 19, 3, 1, 1),
    "F(4,3) 3x3, padding 0": square(2, 128, 128, 21, 3, 1, 0),
    "F(4,3) 3x3, more channels than two panels": square(1, 530, 96, 24, 3, 1, 1),
    "F(4,3) 3x3, lines in two pieces": Call(1, 64, 64, 16, 203, (3, 3), {"padding": 1}),
    "F(4,3) 3x3 transposed": square(2, 128, 128, 19, 3, 1, 1, transposed=True),
    "F(4,3) 5x5 stride 2": square(2, 128, 128, 48, 5, 2, 2),
    "F(4,3) 5x5 stride 2 transposed": square(2, 128, 128, 24, 5, 2, 2, transposed=True, output_padding=1),
    "F(4,3) 6x6 stride 2": square(2, 67, 129, 48, 6, 2, 2),
    "F(4,3) 6x6 stride 2 transposed": square(1, 64, 64, 31, 6, 2, 2, transposed=True),
    "F(4,3) 9x9 stride 3": square(3, 67, 129, 55, 9, 3, 4),
    "F(4,3) 9x9 stride 3 transposed": square(1, 64, 64, 30, 9, 3, 4, transposed=True, output_padding=2),
    "F(2,2) 4x4": square(2, 128, 256, 20, 4, 1, 1),
    "F(2,2) 4x4 stride 2": square(2, 128, 256, 40, 4, 2, 1),
    "F(2,2) 4x4 stride 2 transposed": square(2, 512, 512, 13, 4, 2, 1, transposed=True),
    "F(2,2) 6x6 stride 3": square(2, 128, 128, 60, 6, 3, 2),
    "F(3,2) 2x2": square(2, 256, 256, 24, 2, 1, 0),
    "F(3,2) 4x4": square(2, 128, 256, 24, 4, 1, 1),
    "F(3,2) 4x4 transposed": square(2, 128, 128, 24, 4, 1, 1, transposed=True),
    "F(3,2) 4x4 stride 2": square(2, 128, 128, 48, 4, 2, 1),
    "F(3,2) 4x4 stride 2 transposed": square(2, 128, 128, 24, 4, 2, 0, transposed=True, output_padding=1),
    "F(3,2) 8x8 stride 2 transposed": square(1, 67, 129, 40, 8, 2, 3, transposed=True),
    "F(3,2) 6x6 stride 3 transposed": square(2, 128, 128, 26, 6, 3, 2, transposed=True),
    "F(3,2) 3x3 stride 2 transposed, lines in two pieces": Call(
        1, 128, 128, 20, 131, (3, 3), {"stride": 2, "transposed": True}
    ),
}
WINOGRAD |= {
    f"{name}, kept": kept(call)
    for name, call in {
        "F(4,3) 3x3, many samples of a few tiles": Call(16, 250, 256, 4, 8, (3, 3), {"padding": 1}),
        "F(4,3) 3x3, fewer blocks than threads": Call(1, 256, 256, 8, 40, (3, 3), {"padding": 1}),
        "F(4,3) 5x5 stride 2": square(2, 131, 129, 40, 5, 2, 3),
        "F(4,3) 7x7 stride 3": square(2, 128, 128, 48, 7, 3, 3),
        "F(3,2) 4x4 stride 2 transposed": square(2, 256, 256, 16, 4, 2, 1, transposed=True),
        "F(3,2) 3x3 stride 2 transposed, padding 0": Call(
            2, 256, 256, 27, 31, (3, 3), {"stride": 2, "transposed": True}
        ),
        "F(3,2) 3x3 stride 2 transposed, padding 1": Call(
            2, 256, 256, 28, 32, (3, 3), {"stride": 2, "padding": 1, "output_padding": 1, "transposed": True}
        ),
        "F(3,2) 3x3 stride 2 transposed, padding 2": Call(
            2, 256, 256, 29, 33, (3, 3), {"stride": 2, "padding": 2, "transposed": True}
        ),
        "F(2,2) 3x3 stride 2 transposed": square(1, 512, 512, 11, 3, 2, 0, transposed=True),
        "F(3,2) 4x4 stride 3 transposed": square(2, 128, 128, 24, 4, 3, 0, transposed=True),
        "F(3,2) 5x5 stride 3 transposed": square(2, 128, 128, 24, 5, 3, 1, transposed=True, output_padding=1),
        "F(3,2) 4x4 stride 2, odd channels": square(2, 67, 129, 48, 4, 2, 1),
        "F(3,2) 4x4 stride 2 transposed, padding 1": square(1, 90, 256, 43, 4, 2, 1, transposed=True),
        "F(3,2) 8x8 stride 2": square(1, 67, 128, 48, 8, 2, 3),
    }.items()
}

# Few channels on one side, or a large transposed 3x3 of stride 2.
DIRECT = {
    "image in": square(1, 3, 64, 64, 4, 2, 1),
    "pair in, odd": square(2, 6, 13, 31, 4, 2, 1),
    "image out": square(2, 64, 3, 16, 4, 2, 1, transposed=True),
    "logit": square(2, 300, 1, 15, 4, 1, 1),
    "3x3": square(2, 5, 70, 19, 3, 1, 1),
    "1x1": square(3, 130, 3, 17, 1, 1, 0),
    "1x1 stride 2": square(1, 8, 9, 23, 1, 2, 0),
    "7x7": square(1, 3, 11, 21, 7, 1, 3),
    "15x15": square(1, 2, 3, 21, 15, 1, 7),
    "stride 3": square(2, 4, 10, 23, 5, 3, 2),
    "dilated": square(2, 4, 10, 23, 3, 1, 2, dilation=2),
    "dilated stride 2": square(2, 4, 10, 23, 3, 2, 3, dilation=3),
    "padding above the kernel": square(2, 3, 4, 6, 3, 1, 5),
    "transposed 3x3": square(2, 7, 20, 13, 3, 1, 1, transposed=True),
    "transposed 3x3 stride 2": square(2, 7, 20, 13, 3, 2, 1, transposed=True, output_padding=1),
    "transposed 3x3 stride 2, phases of 1, 2 and 4 taps": square(1, 130, 5, 13, 3, 2, 1, transposed=True),
    "transposed 5x5 stride 3, phases of 1, 2 and 4 taps": square(1, 90, 5, 13, 5, 3, 1, transposed=True),
    "transposed 3x3 stride 2, many pixels": square(2, 40, 17, 64, 3, 2, 0, transposed=True),
    "transposed 3x3 stride 2, many pixels, odd": square(1, 30, 17, 97, 3, 2, 1, transposed=True, output_padding=1),
    "transposed stride 3": square(2, 7, 20, 13, 4, 3, 1, transposed=True, output_padding=2),
    "transposed stride above the kernel": square(2, 7, 20, 13, 2, 3, 0, transposed=True, output_padding=2),
    "not square": Call(2, 3, 20, 9, 40, (2, 5), {"padding": 2, "stride": 2}),
    "not square, transposed": Call(2, 20, 3, 9, 40, (5, 2), {"padding": 1, "stride": 2, "transposed": True}),
    "one line": Call(2, 3, 20, 1, 50, (3, 3), {"padding": 1}),
    "one column": Call(2, 3, 20, 50, 1, (3, 3), {"padding": 1}),
    "few in, lines of some stretches": Call(2, 3, 20, 9, 150, (3, 3), {"padding": 1}),
    "few in, joined lines of some stretches": Call(2, 6, 64, 21, 128, (1, 1)),
    "few in, several blocks of rows": Call(1, 3, 130, 20, 64, (3, 3), {"padding": 1}),
    "few in, 7x7": Call(1, 3, 64, 12, 70, (7, 7)),
    # Lines that fill the registers of every instruction set.
    "few out, 1x1": Call(2, 130, 3, 35, 127, (1, 1)),
    "few out, one channel, several panels deep": Call(2, 530, 1, 5, 126, (1, 1)),
    "few out, 7x7": Call(2, 40, 3, 21, 63, (7, 7), {"padding": 3}),
    "few out, not square": Call(1, 300, 2, 20, 62, (5, 2)),
    "few out, dilated": Call(2, 20, 3, 23, 61, (3, 3), {"padding": 2, "dilation": 2}),
    "few out, padding above the kernel": Call(1, 20, 2, 6, 60, (3, 3), {"padding": 5}),
    "few out, 3x3 transposed": Call(1, 20, 7, 19, 64, (3, 3), {"padding": 2, "transposed": True}),
    "few out, 4x4 stride 2 transposed": Call(2, 64, 3, 18, 64, (4, 4), {"stride": 2, "padding": 1, "transposed": True}),
    "few out, 3x3 stride 2 transposed": Call(
        1, 17, 8, 19, 62, (3, 3), {"stride": 2, "padding": 1, "output_padding": 1, "transposed": True}
    ),
    "few out, stride above the kernel": Call(
        2, 20, 3, 13, 60, (2, 2), {"stride": 3, "output_padding": 2, "transposed": True}
    ),
    "few out, 5x5 stride 3 transposed, padding 4": Call(
        1, 20, 3, 13, 60, (5, 5), {"stride": 3, "padding": 4, "transposed": True}
    ),
}

# At most 128 pixels; above 32, below which few_pixels.cpp serves. Transposed only where the weights are many.
UNFOLDED = {
    "few pixels": square(1, 300, 290, 7, 3, 1, 1),
    "few pixels of several samples": square(5, 70, 90, 6, 4, 2, 1),
    "few pixels, 1x1": square(2, 300, 50, 7, 1, 1, 0),
    "few pixels, 7x7": square(1, 33, 50, 9, 7, 1, 3),
    "few pixels, stride 3, dilated": square(2, 40, 25, 17, 3, 3, 2, dilation=2),
    "few pixels, padding above the kernel": square(2, 30, 25, 3, 3, 1, 3),
    "few pixels, not square": Call(2, 30, 25, 3, 12, (2, 5), {"padding": 1}),
    "few pixels transposed": square(1, 530, 520, 7, 4, 2, 1, transposed=True),
    "few pixels of several samples transposed": square(3, 700, 400, 5, 4, 2, 1, transposed=True),
    "few pixels, transposed 3x3 stride 2": square(2, 1030, 512, 5, 3, 2, 1, transposed=True, output_padding=1),
    "few pixels, transposed stride above the kernel": square(2, 1050, 1030, 5, 2, 3, 0, transposed=True),
    "few pixels, transposed, hardly a result": square(1, 600, 500, 6, 4, 4, 10, transposed=True),
}
ALL = WINOGRAD | DIRECT | UNFOLDED


def run(call: Call, inputs: dict[str, Tensor], epilogue: ops.Epilogue | None = None, backend: str = "cpp") -> Tensor:
    with torch.set_grad_enabled(torch.is_grad_enabled() and not call.kept):
        return scaled_conv2d(**inputs, **call.options, epilogue=epilogue or ops.Epilogue(), backend=backend)


def runs_torch(call: Call, inputs: dict[str, Tensor]) -> bool:
    """Whether the op hands this call to torch's convolution."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run(call, inputs)
    return any(event.key.startswith("aten::convolution") for event in trace.key_averages())


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() for k, v in inputs.items()}


def check(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Winograd's own bound; elsewhere the rule of accuracy, with the usual floor."""
    if name in WINOGRAD:
        error = max_error(got, exact)
        assert error <= WINOGRAD_BOUND, f"{name}: error {error:.3g}"
    else:
        assert_close_to_float64(got, plain, exact, floor=1e-6, what=name)


@pytest.mark.parametrize("name", ALL)
def test_values_against_float64(name):
    """Also that the algorithm is the one that is meant, and the same bits for any number of threads."""
    call, inputs = ALL[name], ALL[name].inputs()
    exact = run(call, doubled(inputs), backend="reference")
    assert exact.shape[2:] == call.sizes()
    threads, results, before = torch.get_num_threads(), [], winograd_tile_calls()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(call, inputs))
    finally:
        torch.set_num_threads(threads)
    check(name, results[0], run(call, inputs, backend="reference"), exact)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    ran = {tile: count - before[tile] for tile, count in winograd_tile_calls().items() if count > before[tile]}
    assert ran == ({(int(name[2]), int(name[4])): 3} if name in WINOGRAD else {})
    assert not runs_torch(call, inputs)


def test_every_tile_of_winograd_is_tested():
    assert {(int(name[2]), int(name[4])) for name in WINOGRAD} == set(WINOGRAD_TILES)


@pytest.mark.parametrize("name", ["F(4,3) 3x3", "F(3,2) 3x3 stride 2 transposed, padding 0, kept"])
def test_a_batch_of_nothing(name):
    call, inputs = ALL[name], ALL[name].inputs()
    for key in ("x", "in_scale", "out_scale"):
        inputs[key] = inputs[key][:0]
    assert run(call, inputs).shape == (0, call.c_out, *call.sizes())


@pytest.mark.parametrize(
    "call",
    [
        square(1, 512, 512, 32, 3, 1, 1),
        square(2, 512, 512, 24, 4, 1, 1),
        square(1, 512, 256, 32, 4, 2, 1, transposed=True),
    ],
    ids=["3x3", "4x4", "4x4 transposed"],
)
def test_winograds_error_at_512_channels(call):
    """The bound of the project, with scales spread by 10x and without any."""
    scaled = call.inputs()
    for inputs in (scaled, {k: scaled[k] for k in ("x", "weight")}):
        assert not runs_torch(call, inputs)
        assert max_error(run(call, inputs), run(call, doubled(inputs), backend="reference")) <= WINOGRAD_BOUND


# One of each kind of product: lines that are whole registers or not, phases, several samples side by side.
KINDS = [
    "F(4,3) 3x3",
    "F(4,3) 6x6 stride 2",
    "F(4,3) 6x6 stride 2 transposed",
    "image in",
    "pair in, odd",
    "image out",
    "transposed 3x3 stride 2, many pixels",
    "few in, lines of some stretches",
    "few out, 7x7",
    "few out, 4x4 stride 2 transposed",
    "few pixels of several samples",
    "few pixels of several samples transposed",
]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_epilogue(act):
    """Every activation once, in turn with every kind of product; noise, bias, clamp and residual each absent once."""
    name = KINDS[list(ACTIVATIONS).index(act) % len(KINDS)]
    call, inputs = ALL[name], ALL[name].inputs()
    g = torch.Generator().manual_seed(1)
    n, (h, w) = call.n, call.sizes()
    # The product's largest value: clips where bias or gain add to it, and what the bound is relative to keeps its size.
    clamp = float(run(call, inputs).abs().max())
    for absent in ("noise", "bias", "clamp", "residual", "noise per sample"):
        terms: dict[str, Any] = {"act": act, "bias": torch.randn(call.c_out, generator=g), "clamp": clamp}
        terms["noise"] = torch.randn(*(() if absent == "noise per sample" else (n, 1)), h, w, generator=g)
        terms["noise_strength"] = torch.tensor(0.3)
        terms["residual"] = torch.randn(n, call.c_out, h, w, generator=g)
        terms["residual_gain"] = 0.7
        terms = {k: v for k, v in terms.items() if not (k == absent or k.startswith(absent + "_"))}
        wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in terms.items()}
        got, plain = (run(call, inputs, ops.Epilogue(**terms), backend) for backend in ("cpp", "reference"))
        check(name, got, plain, run(call, doubled(inputs), ops.Epilogue(**wide), "reference"))


@pytest.mark.parametrize("name", KINDS)
def test_gradients_against_float64(name):
    """All of them: x's runs the adjoint's own product, and out_scale's needs the product that the forward saves."""
    call = ALL[name]
    g = torch.Generator().manual_seed(1)
    inputs = call.inputs() | {"bias": torch.randn(call.c_out, generator=g)}
    cotangent = torch.randn(call.n, call.c_out, *call.sizes(), generator=g)

    def gradients(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        epilogue = ops.Epilogue(bias=leaves["bias"], act="lrelu")
        y = run(call, {k: v for k, v in leaves.items() if k != "bias"}, epilogue, backend)
        grads = torch.autograd.grad(y, list(leaves.values()), cotangent.to(y.dtype))
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    exact, got, plain = (
        gradients(doubled(inputs), "reference"),
        gradients(inputs, "cpp"),
        gradients(inputs, "reference"),
    )
    # Where a value lies so near to zero that its sign depends on rounding, lrelu's slope does too.
    flipped = (exact["y"].sign() != got["y"].sign()).any()
    for key, value in exact.items():
        bound = 1e-3 if flipped else WINOGRAD_BOUND if name in WINOGRAD else 2 * max_error(plain[key], value) + 1e-6
        assert max_error(got[key], value) <= bound, key


@pytest.mark.parametrize("name", [name for name in KINDS if ALL[name].n > 1])
def test_nan_stays_in_its_sample(name):
    call, inputs = ALL[name], ALL[name].inputs()
    clean = run(call, inputs)
    inputs["x"][1] = torch.nan
    y = run(call, inputs)
    assert y[1].isnan().any()
    kept = [i for i in range(call.n) if i != 1]
    assert torch.equal(y[kept], clean[kept])


@pytest.mark.parametrize("name", [name for name in KINDS if name not in WINOGRAD])
def test_nan_of_one_pixel_reaches_what_its_taps_reach(name):
    """Taps over padding are no products with the image: what torch's definition leaves finite is finite."""
    call, inputs = ALL[name], ALL[name].inputs()
    inputs["x"][0, 1, 1, 2] = torch.nan
    want = run(call, doubled(inputs), backend="reference").isnan()
    assert torch.equal(run(call, inputs).isnan(), want)
    assert not want.all()


@pytest.mark.parametrize("name", KINDS)
def test_views_of_x(name):
    """Any strides but channels_last's: the values are those of the dense x, bit for bit."""
    call, inputs = ALL[name], ALL[name].inputs()
    for layout in ("sliced", "expanded"):
        x = layouts(inputs["x"])[layout]
        before = x.clone()
        want = run(call, inputs | {"x": x.contiguous()})
        assert torch.equal(run(call, inputs | {"x": x}), want), layout
        assert torch.equal(x, before)


def test_channels_last_goes_to_torch():
    """Of x or of the weight: torch then answers in that layout."""
    for name in ("F(4,3) 3x3", "image in"):
        call, inputs = ALL[name], ALL[name].inputs()
        for key in ("x", "weight"):
            other = inputs | {key: inputs[key].contiguous(memory_format=torch.channels_last)}
            assert runs_torch(call, other)
            torch.testing.assert_close(run(call, other), run(call, inputs), rtol=1e-4, atol=1e-4)


def test_nothing_is_read_before_it_is_written():
    """With results filled with NaN, and with every block from malloc filled with 3e38 (MALLOC_PERTURB_ of glibc; its
    largest blocks come from the system as zeros and are not covered)."""
    code = (
        "import sys, torch; sys.path[:0] = ['tests']; import test_direct_conv as t\n"
        "torch.use_deterministic_algorithms(True); assert torch.utils.deterministic.fill_uninitialized_memory\n"
        "for name in t.KINDS:\n"
        "    call, inputs = t.ALL[name], t.ALL[name].inputs()\n"
        "    want = t.run(call, t.doubled(inputs), backend='reference')\n"
        "    error = t.max_error(t.run(call, inputs), want)\n"
        "    assert error <= t.WINOGRAD_BOUND, (name, error)\n"
        "print('checked', len(t.KINDS))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"MALLOC_PERTURB_": "128"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.endswith(f"checked {len(KINDS)}\n"), done.stderr
