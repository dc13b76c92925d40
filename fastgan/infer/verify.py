"""An optimised graph against the original one: the same pictures, or the first layer where they part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from fastgan.infer.functional import Functional
from fastgan.infer.plan import Watch
from fastgan.infer.run import Workspace

# Of the largest value. Winograd's tiles are within 1e-5 in each layer (measured, bench/precision.py); what later layers
# make of that stays below this in all models that were tried.
TOLERANCE = 1e-4
# On a GPU, torch's convolutions and ours multiply in TF32, 10 bits, in different orders.
TOLERANCE_TF32 = 1e-2
# Of two pictures of 40 dB each: thrice the deviation of their difference, of a range up to twice the largest value.
# Other tiles round weights in bfloat16 otherwise; in 8 bits, what is computed in another order may round to the
# neighbouring step.
TOLERANCE_LOSSY = 0.1


def tolerance_on(device: torch.device, precision: str) -> float:
    """What :func:`verify` allows."""
    if precision in ("bf16", "int8"):
        return TOLERANCE_LOSSY
    return TOLERANCE_TF32 if device.type == "cuda" and precision != "high" else TOLERANCE


class Mismatch(RuntimeError):
    """An optimised model that computes something else than the original."""


def difference(got: Tensor, expected: Tensor) -> float:
    """max |got − expected| / max |expected|; infinite where one is finite and the other is not."""
    if got.numel() == 0:
        return 0.0
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(got)):
        return math.inf
    got, expected = got[finite].double(), expected[finite].double()
    scale = expected.abs().max().item() if expected.numel() else 0.0
    worst = (got - expected).abs().max().item() if expected.numel() else 0.0
    return worst / scale if scale > 0 else (math.inf if worst > 0 else 0.0)


def psnr(got: Tensor, expected: Tensor) -> float:
    """10 log₁₀(range² / mean square error) in dB, the range being that of the expected picture."""
    error = (got.double() - expected.double()).square().mean().item()
    span = (expected.max() - expected.min()).double().item()
    return math.inf if error == 0 else 10 * math.log10(max(span, 1e-30) ** 2 / error)


@contextmanager
def same_noise() -> Iterator[None]:
    """What is drawn inside is the same each time, and what is drawn later what it would have been."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def least_psnr(got: Sequence[Any], expected: Sequence[Any]) -> float:
    """The least :func:`psnr` of any result of numbers; -inf where one is finite and the other is not."""
    least = math.inf
    for ours, theirs in zip(got, expected, strict=True):
        if not isinstance(theirs, Tensor) or not theirs.is_floating_point() or theirs.numel() == 0:
            continue
        finite = torch.isfinite(theirs)
        if not torch.equal(finite, torch.isfinite(ours)):
            return -math.inf
        if finite.any():
            least = min(least, psnr(ours[finite], theirs[finite]))
    return least


def noise_like(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Normal noise with the mean and the deviation of each floating-point input; others as they are."""
    return [
        _noise(value.shape, value.dtype, *_moments(value)).to(value.device) if _spreads(value) else value
        for value in inputs
    ]


def _spreads(value: Tensor) -> bool:
    return value.is_floating_point() and value.numel() > 1


def _moments(value: Tensor) -> tuple[float, float]:
    return value.double().mean().item(), value.double().std().item()


def _noise(shape: Sequence[int], dtype: torch.dtype, mean: float, deviation: float) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (noise * deviation + mean).to(dtype)


def results_of(workspace: Workspace | Functional, inputs: Sequence[Tensor], watch: Watch | None = None) -> list[Any]:
    """What a call returns; noise that it draws is the same each time."""
    with same_noise():
        return workspace.run(inputs, watch)


def largest_difference(got: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest :func:`difference` of any result."""
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if isinstance(b, Tensor)]
    return max((difference(ours, theirs) for ours, theirs in pairs), default=0.0)


def verify(
    workspace: Workspace | Functional, original: fx.GraphModule, inputs: Sequence[Tensor], tolerance: float
) -> float:
    """The largest difference of any result on ``inputs``.

    Args:
        original: the captured graph, before any pass.
        tolerance: of :func:`difference`.

    Raises:
        Mismatch: a difference beyond the tolerance, with the first layer that differs.
    """
    # TF32 as the tolerance has it, whatever the flag says.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tolerance > TOLERANCE), same_noise():
        expected = fx.Interpreter(original).run(*inputs)
    worst = largest_difference(results_of(workspace, inputs), expected)
    if worst <= tolerance:
        return worst
    raise Mismatch(
        f"infer.optimize: the optimised model differs from the original by {worst:.2e} of the largest value, expected "
        f"at most {tolerance:.0e}; {_first_difference(workspace, original, inputs, tolerance)}"
    )


# Values of a result that a file carries to be compared with.
_SAMPLES = 64


def take_sample(workspace: Workspace | Functional, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """A call on noise, and some values of its results, as JSON; of inputs that are no numbers to draw, none."""
    if not all(_spreads(value) for value in inputs):
        return {}
    moments = [_moments(value) for value in inputs]
    device = inputs[0].device if inputs else torch.device("cpu")
    return {"moments": moments, "values": _sampled(workspace, moments, device)}


def _sampled(
    workspace: Workspace | Functional,
    moments: Sequence[Sequence[float]],
    device: torch.device,
    watch: Watch | None = None,
) -> list[list[float]]:
    expected = workspace.program.inputs
    made = [_noise(i[1], i[2], *m).to(device) for i, m in zip(expected, moments, strict=True)]
    results = [value for value in results_of(workspace, made, watch) if isinstance(value, Tensor) and value.numel() > 0]
    return [value.flatten()[:: max(1, value.numel() // _SAMPLES)].double().tolist() for value in results]


def check_sample(
    workspace: Workspace | Functional,
    sample: dict[str, Any],
    device: torch.device,
    tolerance: float,
    watch: Watch | None = None,
) -> None:
    """Raises Mismatch where the call of :func:`take_sample` now has other results; ``watch`` as of a run."""
    if not sample:
        return
    for got, expected in zip(_sampled(workspace, sample["moments"], device, watch), sample["values"], strict=True):
        apart = difference(torch.tensor(got, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64))
        if apart > tolerance:
            raise Mismatch(
                f"infer.load: on this machine the model differs from what it computed when it was saved by {apart:.2e} "
                f"of the largest value, expected at most {tolerance:.0e}"
            )


def _first_difference(
    workspace: Workspace | Functional, original: fx.GraphModule, inputs: Sequence[Tensor], tolerance: float
) -> str:
    """Where both part, by the values that both have."""
    steps = workspace.program.steps
    wanted = {step.node.meta.get("twin") for step in steps}
    expected: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in wanted and isinstance(value, Tensor):
                expected[n.name] = value
            return value

    with same_noise():
        Recorder(original).run(*inputs)
    told: list[str] = []

    def watch(number: int, value: Any) -> None:
        node = steps[number].node
        twin = expected.get(node.meta.get("twin"))
        unfinished = number + 1 < len(steps) and steps[number + 1].node is node
        if told or unfinished or twin is None or not isinstance(value, Tensor) or value.shape != twin.shape:
            return
        apart = difference(value, twin)
        if apart > tolerance:
            choice = steps[number].choice
            by = f" by {choice.algorithm}" if choice else ""
            told.append(f"the first layer that differs is {steps[number].name}{by}, by {apart:.2e}")

    with same_noise():
        workspace.run(inputs, watch)
    return told[0] if told else "no layer differs by itself"


def check_finite(module: fx.GraphModule) -> None:
    """Raises ValueError for a parameter that is not finite."""
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        value = getattr(module, node.target)
        if value.is_floating_point() and not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(
                f"infer.optimize: model must have finite weights, got {bad} of {value.numel()} values NaN or infinite "
                f"in {node.meta.get('parameter', node.target)}"
            )
