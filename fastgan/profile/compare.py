"""Does the fused layer compute the same, and how many milliseconds does it save? Answered on the device at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from fastgan.profile.latency import Timing, measure, speedup
from fastgan.profile.parity import Function, Parity, check_parity


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; ``print`` it. ``forward`` and ``training`` map "original" and "fused" to timings."""

    name: str
    parity: Parity
    forward: Mapping[str, Timing]
    training: Mapping[str, Timing] | None

    def speedup(self, what: str = "forward") -> float:
        """How many times as fast fused is, the median over the rounds. ``what``: "forward" or "training"."""
        return speedup(getattr(self, what), "fused", "original")

    def __str__(self) -> str:
        worst = self.parity.worst
        verdict = "within" if self.parity.within else "OUTSIDE"
        errors = f"{worst.fused:.1e} from float64, original {worst.original:.1e}"
        lines = [
            f"{self.name}",
            f"  parity    {verdict} bounds; worst {worst.name}: {errors}",
        ]
        for title, timings in (("forward", self.forward), ("training", self.training)):
            if timings is None:
                continue
            parts = [f"{key} {format_ms(value)}" for key, value in timings.items()]
            lines.append(f"  {title:<10}{', '.join(parts)}: {self.speedup(title):.2f}×")
        return "\n".join(lines)


def format_ms(timing: Timing) -> str:
    """A median with its p20 and p80, in milliseconds."""
    return f"{timing.median * 1e3:.3f} ms ({timing.p20 * 1e3:.3f}–{timing.p80 * 1e3:.3f})"


def compare(
    original: Function,
    fused: Function,
    example_args: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    backward: bool = True,
    seconds: float = 1.0,
) -> Comparison:
    """Compare a computation with its fused form: numbers against float64, and interleaved times, where the inputs are.

    Args:
        original: what there is today, a module or a function of tensors; it must also run in float64.
        fused: its replacement, taking the same arguments; a module's parameters must hold the same values.
        example_args, example_kwargs: example inputs. Floating tensors take part in the gradients.
        name: for reports; the class or function name of ``fused`` when None.
        backward: also compare gradients, and time forward and backward together ("training").
        seconds: how long each of the two timings may take.

    Returns:
        A :class:`Comparison`.

    Raises:
        ValueError: they do not return tensors of the same shapes.

    Example:
        >>> print(compare(nn.Conv2d(64, 64, 3), my_layer, [torch.randn(1, 64, 32, 32)]))
    """
    kwargs = dict(example_kwargs or {})
    parity = check_parity(original, fused, example_args, kwargs, backward=backward)
    # Copies: a forward in training advances running statistics and power iterations, and the caller's stay as they are.
    both = {"original": _own(original), "fused": _own(fused)}
    tensors = [value for value in tree_flatten((list(example_args), kwargs))[0] if isinstance(value, Tensor)]
    device = tensors[0].device if tensors else "cpu"
    forward = measure(
        {key: _forward(function, example_args, kwargs) for key, function in both.items()},
        seconds=seconds,
        device=device,
    )
    training = None
    if backward:
        training = measure(
            {key: _forward_backward(function, example_args, kwargs) for key, function in both.items()},
            seconds=seconds,
            device=device,
        )
    label = name or getattr(fused, "__name__", type(fused).__name__)
    return Comparison(label, parity, forward, training)


def _own(function: Function) -> Function:
    return deepcopy(function) if isinstance(function, nn.Module) else function


def _forward(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        function(*args, **kwargs)

    return run


def _forward_backward(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], None]:
    """Forward, and gradients of everything that wants one: what a training step asks of a layer."""
    inputs: list[Tensor] = []

    def prepare(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            inputs.append(value)
        return value

    args, kwargs = tree_map(prepare, (tuple(args), dict(kwargs)))
    if isinstance(function, nn.Module):
        inputs.extend(value for value in function.parameters() if value.requires_grad)
    cotangents: list[Tensor] = []

    def run() -> None:
        outputs = [value for value in tree_flatten(function(*args, **kwargs))[0] if isinstance(value, Tensor)]
        outputs = [value for value in outputs if value.requires_grad]
        if not cotangents:
            cotangents.extend(torch.ones_like(value) for value in outputs)
        torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)

    return run
