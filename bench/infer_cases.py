"""What ``fastgan.infer`` is to reach: the generators, the engines that each is compared with, and by how much.

Everything is of batch 1, and in float32 but for the rows that say int8. Every candidate's picture is compared with that
of the model in eager torch before it is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import bench_stylegan2, peers
from bench.generators import DCGAN, ResNet9, RRDBNet, UNet256, randomize, trained_dcgan, trained_rrdbnet
from bench.peers import FLOAT32_PEERS, Make, Run
from bench.targets import OURS, Target
from fastgan import infer
from fastgan.models import StyleGAN2Generator
from fastgan.profile.latency import Work
from fastgan.train.data import grid_crops, load_photos

OP = "infer_targets"
INT8_PHOTOS = 8
# Samples shorter than this measure the thread pool of whoever was timed before: ONNX Runtime 2.4 ms a call in bursts,
# 5.3 ms in single calls between others', on a DCGAN.
BURST = 0.05
SGEMM, OPENVINO_INT8 = "sgemm", "OpenVINO int8"


def photographs(count: int, size: int) -> Tensor:
    """The same crops of scikit-image's photographs each time, [count, 3, size, size] in [-1, 1]."""
    return grid_crops(load_photos(None, size=size, seed=0).train, size=size, most=count)[0].photo


# ----------------------------------------------------------------------------------------------------------------------
# The generators, with what they are called on


@dataclass(frozen=True)
class Workload:
    """A generator and a call of it.

    Attributes:
        name: for people.
        architecture: makes it with any weights, here on the meta device to count its work.
        make: makes it in evaluation, with the weights that it is measured with.
        example: makes its argument.
        kwargs: its other arguments.
        calibration: makes further arguments, for int8.
    """

    name: str
    architecture: Callable[[], nn.Module]
    make: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    calibration: Callable[[], list[Tensor]] = list

    def build(self) -> tuple[nn.Module, Tensor]:
        """The model, new and always with the same weights, and its argument."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make(), self.example()

    def work(self, shape: tuple[int, ...]) -> Work:
        """Weights, argument and picture once; two operations per product, of an argument of this shape."""
        with torch.device("meta"):
            model, example = self.architecture().eval(), torch.empty(shape)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            picture = model(example, **self.kwargs)
        elements = sum(parameter.numel() for parameter in model.parameters()) + example.numel() + picture.numel()
        return Work(bytes=4 * elements, flops=counter.get_total_flops())


def unet(width: int) -> Workload:
    return Workload(
        f"U-Net-256 width {width}",
        partial(UNet256, width),
        lambda: randomize(UNet256(width), photographs(4, 256)),
        lambda: photographs(1, 256),
        calibration=lambda: list(photographs(1 + INT8_PHOTOS, 256)[1:].split(1)),
    )


def style_synthesis(resolution: int, channel_base: int) -> Workload:
    def architecture() -> nn.Module:
        return StyleGAN2Generator(512, 0, 512, resolution, 3, channel_base, 512).synthesis

    def make() -> nn.Module:
        model = architecture().eval()
        with torch.no_grad():
            # At their start, noise strengths and biases are zero.
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.normal_(std=0.1)
        return model

    layers = 2 * resolution.bit_length() - 4
    return Workload(
        f"StyleGAN2-{resolution} synthesis, channel_base {channel_base}",
        architecture,
        make,
        # What the mapping gives: normalised, and one for all layers.
        lambda: torch.randn(1, 1, 512).expand(-1, layers, -1).contiguous(),
        {"noise_mode": "const"},
    )


RESNET = Workload("CycleGAN ResNet-9, 256²", ResNet9, lambda: ResNet9().eval(), lambda: photographs(1, 256))
RRDB = Workload("RRDBNet ×4 on 128²", RRDBNet, trained_rrdbnet, lambda: photographs(1, 128) / 2 + 0.5)
FACES = Workload("DCGAN 64²", DCGAN, trained_dcgan, lambda: torch.randn(1, 100, 1, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Candidates


@dataclass(frozen=True)
class Timed:
    """What is timed: a call without gradients. ``facts`` go into its row."""

    run: Run
    example: Tensor
    facts: dict[str, Any]

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.run(self.example)


@torch.no_grad()
def prepare(workload: Workload, name: str, make: Make, *, exact: bool) -> Timed:
    """A candidate, ready to be timed, after its picture was compared with eager's.

    Args:
        workload: what it is made for.
        name: the candidate's.
        make: makes it.
        exact: hold it to the error of float32; of int8 only to what is still the same picture.

    Raises:
        ArithmeticError: its picture is another one.
    """
    model, example = workload.build()
    reference = model(example, **workload.kwargs)
    start = perf_counter()
    run = make(workload.build()[0], example)
    picture = run(example)
    facts: dict[str, Any] = {"ready_s": perf_counter() - start, "versions": peers.versions(name)}
    if name == SGEMM:
        return Timed(run, example, facts)
    facts["max_error"] = ((picture - reference).abs().max() / reference.abs().max()).item()
    decibels = peers.psnr(picture, reference)
    # JSON has no infinity.
    facts["psnr_db"] = decibels if math.isfinite(decibels) else None
    if exact and not facts["max_error"] <= peers.MAX_ERROR:
        raise ArithmeticError(
            f"{workload.name}, {name}: the error must be at most {peers.MAX_ERROR:g} of the largest value, "
            f"got {facts['max_error']:.2g}"
        )
    if not decibels >= peers.MIN_PSNR:
        raise ArithmeticError(
            f"{workload.name}, {name}: PSNR must be at least {peers.MIN_PSNR:g} dB, got {decibels:.1f}"
        )
    return Timed(run, example, facts)


@dataclass(frozen=True, kw_only=True)
class EngineTarget(Target):
    """One whose candidates are engines: functions of a model and an example. ``loose``: those that are not float32."""

    workload: Workload
    loose: tuple[str, ...] = ()
    precision: str = "fp32"

    def passes(self, candidate: str) -> dict[str, Callable[[], object]]:
        make = self.candidates[candidate]
        return {self.which: prepare(self.workload, candidate, make, exact=candidate not in self.loose)}


def optimized(workload: Workload, precision: str = "fp32") -> Make:
    """Ours. Calibration images are calls: tuples of arguments."""

    def make(model: nn.Module, example: Tensor) -> Run:
        options: dict[str, Any] = {"precision": precision}
        if precision == "int8":
            options["calibration"] = [(image,) for image in workload.calibration()]
        return partial(infer.optimize(model, (example,), workload.kwargs, **options), **workload.kwargs)

    return make


def plain_stylegan2(convolve: bench_stylegan2.Convolve, *, compiled: bool = False) -> Make:
    def make(model: nn.Module, example: Tensor) -> Run:
        run = partial(bench_stylegan2.plain_synthesis, parameters=[], network=model, convolve=convolve)
        if not compiled:
            return run
        torch._dynamo.reset()
        return torch.compile(run)

    return make


def sgemm(flops: float) -> Make:
    """The time of so many floating-point operations in torch's matrix product [M, 2048] × [2048, 2048]."""

    def make(model: nn.Module, example: Tensor) -> Run:
        left, right = torch.randn(round(flops / 2 / 2048**2), 2048), torch.randn(2048, 2048)
        out = torch.empty_like(left)
        return lambda _: torch.mm(left, right, out=out)

    return make


# ----------------------------------------------------------------------------------------------------------------------
# The rows


def make_target(
    workload: Workload,
    baselines: Mapping[str, Make],
    at_least: float,
    against: str,
    work: Work,
    *,
    suffix: str = "",
    precision: str = "fp32",
    **facts: Any,
) -> EngineTarget:
    """A target of one generator; ``suffix`` tells it from others of the same."""
    candidates = {**baselines, OURS: optimized(workload, precision)}
    return EngineTarget(
        OP,
        workload.name + suffix,
        list,
        candidates,
        {"fwd": work},
        dtype="float32" if precision == "fp32" else precision,
        baselines=tuple(baselines),
        memory=False,
        burst=BURST,
        against=against,
        at_least=at_least,
        group="inference engine",
        workload=workload,
        precision=precision,
        loose=() if precision == "fp32" else (OURS, OPENVINO_INT8),
        **facts,
    )


def style_targets(resolution: int, channel_base: int) -> list[EngineTarget]:
    workload = style_synthesis(resolution, channel_base)
    with torch.device("meta"):
        work = bench_stylegan2.work(workload.architecture(), 1)["fwd"]
    plain = {
        "grouped": plain_stylegan2(bench_stylegan2.grouped),
        "scaled": plain_stylegan2(bench_stylegan2.scaled),
        "scaled, torch.compile": plain_stylegan2(bench_stylegan2.scaled, compiled=True),
    }
    direct = {SGEMM: sgemm(work.flops)}
    return [
        make_target(workload, plain, 4.0, "eager grouped, eager scaled, torch.compile", work, min_rounds=3, warmup=1),
        make_target(
            workload, direct, 1 / 0.7, "its direct convolutions' FLOPs in sgemm", work, suffix=", the direct limit"
        ),
    ]


def int8_targets(width: int) -> list[EngineTarget]:
    workload = unet(width)
    work = workload.work((1, 3, 256, 256))

    def quantised(model: nn.Module, example: Tensor) -> Run:
        return peers.openvino_int8(model, example, workload.calibration())

    theirs = make_target(
        workload,
        {OPENVINO_INT8: quantised},
        1.2,
        "OpenVINO int8 of the same model",
        work,
        suffix=", int8",
        precision="int8",
    )
    ours = make_target(
        workload,
        {"ours, float32": optimized(workload)},
        1.5,
        "ours in float32",
        work,
        suffix=", int8 against float32",
        precision="int8",
    )
    return [theirs, ours]


def targets() -> list[EngineTarget]:
    """All of them, in the order of the table."""
    rows = [(unet(64), 2.0, 256), (unet(32), 1.5, 256), (unet(16), 1.5, 256), (RESNET, 2.0, 256), (RRDB, 1.7, 128)]
    against = "eager, torch.compile with freezing, ONNX Runtime, OpenVINO"
    # A round of RRDBNet takes half a minute.
    slow = {"warmup": 1, "min_rounds": 3}
    return [
        *style_targets(256, 16384),
        *style_targets(512, 32768),
        *(
            make_target(w, FLOAT32_PEERS, ratio, against, w.work((1, 3, side, side)), **(slow if w is RRDB else {}))
            for w, ratio, side in rows
        ),
        make_target(FACES, FLOAT32_PEERS, 1.3, against, FACES.work((1, 100, 1, 1))),
        *int8_targets(64),
    ]


TARGETS = targets()
