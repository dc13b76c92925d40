"""What the CPU kernels are to reach: each line of work with what it is compared with and by how much it is to win.

``python -m bench.cpu_targets`` measures them and prints the table. Everything is float32, of batch 1 but for the
training step, and made of the layers that the models use. Plain torch is given its best memory layout: each of its
forms is timed in each layout, and the fastest of all counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import bench_feature_matching_loss, bench_modulated_conv2d, bench_spectral_sigma, bench_stylegan2
from bench.bench_scaled_conv2d import Layer, unet_layers
from bench.bench_scaled_conv2d import work as convolution_work
from bench.cases import Case
from bench.pix2pix_step import plain_step, step, step_flops
from bench.targets import NCHW, NHWC, OURS, MadeTarget, Target, both_layouts
from fastgan.models._layers import ConvAct, UpConvAct, conv_norm_act
from fastgan.profile.latency import Work

OP = "cpu_targets"


def make_target(
    group: str,
    name: str,
    inputs: Callable[[], list[Any]],
    plain: Mapping[str, Callable[..., Tensor]],
    fused: Callable[..., Tensor],
    work: Work,
    **facts: Any,
) -> Target:
    """A target from plain torch's forms, the fastest of which is the baseline, and ours."""
    which = facts.get("which", "fwd")
    return Target(OP, name, inputs, {**plain, OURS: fused}, {which: work}, baselines=tuple(plain), group=group, **facts)


# ----------------------------------------------------------------------------------------------------------------------
# StyleGAN2's layers and its synthesis network


def layer_inputs(c_in: int, c_out: int, size: int, up: int) -> list[Any]:
    """x, weight, style, noise, bias, up; styles spread by 10× within the layer, as trained ones do."""
    x, weight = torch.randn(1, c_in, size, size), nn.Parameter(torch.randn(c_out, c_in, 3, 3))
    style = 10 ** torch.empty(1, c_in).uniform_(-0.5, 0.5)
    return [x, weight, style, torch.randn(size * up, size * up), torch.randn(c_out), up]


def style_layer(channels: int, size: int, at_least: float) -> Target:
    return make_target(
        "3×3 with style, demodulation, noise, bias, leaky ReLU",
        f"3×3 {channels}→{channels} at {size}²",
        lambda: layer_inputs(channels, channels, size, 1),
        both_layouts({"convolution": lambda x, weight, *_: F.conv2d(x, weight, padding=1)}),
        bench_modulated_conv2d.fused,
        convolution_work((channels, channels, size, 3, 1, False), 1)["fwd"],
        against="torch's convolution alone",
        at_least=at_least,
    )


def up_layer(c_in: int, c_out: int, size: int) -> Target:
    plain = {"scaled": bench_modulated_conv2d.scaled, "grouped": bench_modulated_conv2d.grouped}
    elements = c_in * size**2 + 4 * c_out * size**2 + 9 * c_in * c_out
    return make_target(
        "transposed 3×3 stride 2, filter, epilogue",
        f"up 3×3 {c_in}→{c_out} at {size}→{2 * size}²",
        lambda: layer_inputs(c_in, c_out, size, 2),
        both_layouts(plain),
        bench_modulated_conv2d.fused,
        Work(bytes=4 * elements, flops=2 * 9 * size**2 * c_in * c_out),
        against="the eager sequence",
        at_least=2.0,
    )


def synthesis() -> Target:
    case = bench_stylegan2.make_case(256, 16384, 1)
    compiled: list[Callable[..., Tensor]] = []

    def compile_late(*args: Any) -> Tensor:
        if not compiled:
            compiled.append(torch.compile(partial(bench_stylegan2.plain_synthesis, convolve=bench_stylegan2.scaled)))
        return compiled[0](*args)

    plain = {
        "grouped": case.candidates["eager"],
        "scaled": case.candidates["scaled"],
        "scaled, torch.compile": compile_late,
    }
    return make_target(
        "StyleGAN2-256 synthesis module",
        case.name,
        case.inputs,
        plain,
        case.candidates["fused"],
        case.work["fwd"],
        against="eager grouped, eager scaled, torch.compile",
        at_least=3.0,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Pix2Pix: the layers of U-Net-256 in evaluation, and a training step


def unet_layer(layer: Layer, act: str, normalised: bool) -> Target:
    c_in, c_out, size, _, _, transposed = layer
    modules = {"lrelu": nn.LeakyReLU(0.2, True), "relu": nn.ReLU(True), "tanh": nn.Tanh()}
    plain_kind, fused_kind = (nn.ConvTranspose2d, UpConvAct) if transposed else (nn.Conv2d, ConvAct)
    bias = act == "tanh"

    def inputs() -> list[Any]:
        convolution = plain_kind(c_in, c_out, 4, 2, 1, bias=bias)
        norm = nn.BatchNorm2d(c_out).eval()
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
        plain = nn.Sequential(convolution, *([norm] if normalised else []), modules[act])
        ours = fused_kind(c_in, c_out, 4, 2, 1, bias=bias, act="linear" if normalised else act)
        ours.load_state_dict(convolution.state_dict())
        return [torch.randn(1, c_in, size, size), plain, ours, norm]

    def fused(x: Tensor, plain: nn.Module, ours: nn.Module, norm: nn.Module) -> Tensor:
        return conv_norm_act(ours, norm, x, act) if normalised else ours(x)

    kind = "transposed 4×4" if transposed else "4×4 stride 2"
    return make_target(
        "4×4 of the U-Net, norm, activation",
        f"U-Net {kind} {c_in}→{c_out} at {size}²",
        inputs,
        both_layouts({"sequence": lambda x, plain, *_: plain(x)}),
        fused,
        convolution_work(layer, 1)["fwd"],
        against="torch's convolution + norm + activation",
        at_least=1.5,
    )


def unet_targets() -> list[Target]:
    layers = unet_layers(64, 256)
    bottleneck = len(layers) // 2 - 1
    return [unet_layer(layer, act, i not in (0, bottleneck, len(layers) - 1)) for i, (layer, act) in enumerate(layers)]


def training_step() -> Target:
    candidates = {
        f"eager{NCHW}": lambda: plain_step(torch.contiguous_format),
        f"eager{NHWC}": lambda: plain_step(torch.channels_last),
        OURS: step,
    }
    return MadeTarget(
        OP,
        "Pix2Pix training step, 256², batch 4",
        list,
        candidates,
        {"step": Work(flops=step_flops())},
        baselines=(f"eager{NCHW}", f"eager{NHWC}"),
        # A round takes several seconds.
        warmup=1,
        min_rounds=3,
        memory=False,
        against="the same step in eager torch",
        at_least=1.5,
        which="step",
        group="Pix2Pix training step",
    )


# ----------------------------------------------------------------------------------------------------------------------
# Spectral norm and feature matching, as their own benches have them


def from_bench(case: Case, group: str, baseline: str, **facts: Any) -> Target:
    kept = {name: case.candidates[name] for name in (baseline, OURS)}
    return Target(
        OP, f"{case.op}, {case.name}", case.inputs, kept, case.work, baselines=(baseline,), group=group, **facts
    )


def targets() -> list[Target]:
    """All of them, in the order of the table."""
    sizes = [(512, 64, 2.5), (256, 128, 2.2), (128, 256, 2.2), (64, 256, 1.5)]
    sigma = bench_spectral_sigma.make_case("twelve 512×512×3×3")
    features = bench_feature_matching_loss.CASES[0]
    return [
        *[style_layer(*size) for size in sizes],
        up_layer(512, 256, 32),
        up_layer(256, 128, 64),
        *unet_targets(),
        synthesis(),
        training_step(),
        from_bench(sigma, "spectral_sigma", "read", against="one plain read of the weights", at_least=1 / 1.2),
        from_bench(features, "feature matching", "eager", against="eager torch", at_least=2.5, which="fwd+bwd"),
    ]


TARGETS = targets()
