"""``python -m bench.precision``: the error of scaled_conv2d in float32 on the CPU, against float64.

For every convolution of StyleGAN2-256, of the U-Net and of the patch critic, and for a few more kernels, with styles
spread by 10x: torch's own error and, for each precision, the algorithm that serves the layer and its error, of the
value and of the gradients of x and of the weight. Max-norm, relative to the largest element; the worst of ``--seeds``.
``fastgan.precision`` states what it found.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgan
from bench.bench_scaled_conv2d import CRITIC, Layer, unet_layers
from fastgan import ops
from fastgan.backends import PRECISIONS

QUANTITIES = ("value", "grad x", "grad weight")


@dataclass(frozen=True)
class Problem:
    """A convolution of a map of ``size`` with ``padding``, batch 1; ``styled``: a style on x's channels."""

    name: str
    layer: Layer
    padding: int
    styled: bool

    def options(self) -> dict[str, int | bool]:
        return {"stride": self.layer[4], "padding": self.padding, "transposed": self.layer[5]}

    def tensors(self, seed: int) -> list[Tensor | None]:
        """x as leaky ReLU leaves it, the weight, its style; results are of order 1."""
        c_in, c_out, size, kernel, stride, transposed = self.layer
        g = torch.Generator().manual_seed(seed)
        shape = (c_in, c_out) if transposed else (c_out, c_in)
        terms = c_in * kernel**2 / (stride**2 if transposed else 1)
        x = F.leaky_relu(torch.randn(1, c_in, size, size, generator=g), 0.2)
        weight = torch.randn(*shape, kernel, kernel, generator=g) / terms**0.5
        return [x, weight, 10 ** (torch.rand(1, c_in, generator=g) - 0.5) if self.styled else None]


def problems(most: int) -> Iterator[Problem]:
    """The models' layers, with maps of at most ``most`` a side: the error depends on the channels, not on the map."""
    layers = [("U-Net", layer) for layer, _ in unet_layers(64, 256)] + [("critic", layer) for layer, _ in CRITIC]
    for model, layer in layers:
        yield Problem(model, (*layer[:2], min(layer[2], most), *layer[3:]), 1, False)
    for size in (4, 8, 16, 32, 64, 128, 256):
        c, half = min(512, 16384 // size), min(512, 16384 // max(size, 8) * 2)
        shown = min(size, most)
        yield Problem("StyleGAN2", (c, c, shown, 3, 1, False), 1, True)
        yield Problem("StyleGAN2", (c, 3, shown, 1, 1, False), 0, True)
        if size > 4:
            yield Problem("StyleGAN2", (half, c, shown // 2, 3, 2, True), 0, True)
    yield Problem("other", (512, 512, 32, 5, 2, False), 2, True)
    yield Problem("other", (256, 256, 32, 5, 1, False), 2, True)
    yield Problem("other", (512, 512, 32, 4, 2, False), 1, True)
    yield Problem("other", (512, 256, 32, 4, 2, True), 1, True)


def evaluate(problem: Problem, tensors: list[Tensor | None], backend: str, precision: str = "fp32") -> list[Tensor]:
    """The QUANTITIES, against one random cotangent."""
    x, weight, style = (None if t is None else t.detach() for t in tensors)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with fastgan.precision(precision):
        y = ops.scaled_conv2d(x, weight, style, **problem.options(), backend=backend)
    g = torch.Generator().manual_seed(1)
    cotangent = torch.randn(y.shape, generator=g).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), cotangent)]


def errors(problem: Problem, seeds: int) -> dict[str, list[float]]:
    """The worst error of each of the QUANTITIES, of torch and of each precision."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        tensors = problem.tensors(seed)
        exact = evaluate(problem, [None if t is None else t.double() for t in tensors], "reference")
        results = {"torch": evaluate(problem, tensors, "reference")}
        results |= {name: evaluate(problem, tensors, "cpp", name) for name in PRECISIONS}
        for name, values in results.items():
            each = [float((v.double() - e).abs().max() / e.abs().max()) for v, e in zip(values, exact, strict=True)]
            found[name] = [max(a, b) for a, b in zip(found.get(name, each), each, strict=True)]
    return found


def algorithm(problem: Problem, precision: str) -> str:
    """What serves the layer's value."""
    x, weight, style = problem.tensors(0)
    with fastgan.precision(precision):
        return fastgan.explain("scaled_conv2d", x, weight, style, **problem.options()).algorithm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="largest side of a map")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(f"| layer | algorithm, fp32 / high | {' | '.join(f'{q}: torch, fp32, high' for q in QUANTITIES)} |")
    print("|" + "---|" * (2 + len(QUANTITIES)))
    worst = dict.fromkeys(PRECISIONS, 0.0)
    ratios = dict.fromkeys(PRECISIONS, 0.0)
    for problem in problems(arguments.size):
        found = errors(problem, arguments.seeds)
        c_in, c_out, size, kernel, stride, transposed = problem.layer
        form = f"{'transposed ' if transposed else ''}{kernel}×{kernel} stride {stride}"
        cells = [f"{problem.name} {c_in}→{c_out} at {size}² {form}"]
        cells.append(" / ".join(algorithm(problem, name) for name in PRECISIONS))
        cells += [", ".join(f"{found[name][i]:.1e}" for name in found) for i in range(len(QUANTITIES))]
        print(f"| {' | '.join(cells)} |", flush=True)
        for name in PRECISIONS:
            worst[name] = max(worst[name], *found[name])
            ratios[name] = max([ratios[name], *(a / b for a, b in zip(found[name], found["torch"], strict=True))])
    for name in PRECISIONS:
        print(f"{name}: error at most {worst[name]:.2g}, at most {ratios[name]:.2g} times torch's")


if __name__ == "__main__":
    main()
