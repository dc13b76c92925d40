"""Proof that a fused layer computes the same numbers: its distance from float64, beside plain PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from fastgan._native import winograd_calls

Function = Callable[..., Any] | nn.Module

# A fused result passes when its error is at most twice eager torch's in the same dtype, plus four roundings of it. The
# floor is measured: the gradient of a bias of few channels is a sum over pixels that cancels, and over twenty draws
# its error lies anywhere from 1e-7 to 1.6e-6 in eager torch as in ours, with medians of 5e-7 and 2e-7.
FACTOR = 2.0
FLOOR_ROUNDINGS = 4.0
# What Winograd's filtering may add to the results of a convolution, which is float32's and the CPU's alone, relative to
# the largest: the library's own bound, which tests/test_direct_conv.py holds it to at 512 channels.
FLOOR_WINOGRAD = 1e-5
# A gradient that is zero by construction, such as that of a bias before a normalisation, is nothing but rounding, in
# float64 too. Below this share of the largest gradient of the comparison a tensor counts as zero, and its error is
# relative to that largest gradient.
ZERO_SHARE = 1e-10


@dataclass(frozen=True)
class Error:
    """One tensor's max-norm error, max|x − reference| / max|reference|, of the original and of the fused one."""

    name: str
    original: float
    fused: float
    floor: float

    @property
    def within(self) -> bool:
        """Whether the fused error is at most twice the original's plus the floor. A NaN is not."""
        return self.fused <= FACTOR * self.original + self.floor


@dataclass(frozen=True)
class Parity:
    """The errors of all outputs and gradients of one comparison."""

    errors: tuple[Error, ...]

    @property
    def worst(self) -> Error:
        """The tensor whose fused error is largest against what it may be."""
        return max(self.errors, key=lambda error: (not error.within, error.fused / max(error.floor, error.original)))

    @property
    def largest(self) -> tuple[float, float]:
        """The largest error of the original and of the fused computation, over all tensors."""
        return max(error.original for error in self.errors), max(error.fused for error in self.errors)

    @property
    def within(self) -> bool:
        """Whether every tensor is within its bound."""
        return all(error.within for error in self.errors)


def check_parity(
    original: Function,
    fused: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    backward: bool,
    seed: int = 0,
) -> Parity:
    """Run both on the same inputs, and ``original`` in float64, and compare outputs and (``backward``) gradients.

    Modules are copied first: running statistics and power iterations start equal, and the caller's stay as they are.
    Randomness (dropout) starts from the same seed in each run.

    Args:
        original, fused: modules or functions; the same positional and keyword arguments fit both.
        args, kwargs: example arguments; floating tensors take part in the gradients.
        backward: compare the gradients too, against one random cotangent.
        seed: of the cotangent and of any dropout.

    Raises:
        ValueError: the two do not return tensors of the same shapes.
    """
    reference = _run(original, args, kwargs, torch.float64, backward, seed)
    plain = _run(original, args, kwargs, None, backward, seed)
    before = winograd_calls()
    ours = _run(fused, args, kwargs, None, backward, seed)
    return against_reference(reference, plain, ours, floor=FLOOR_WINOGRAD if winograd_calls() > before else 0.0)


def against_reference(
    reference: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    fused: Mapping[str, Tensor],
    *,
    floor: float = 0.0,
) -> Parity:
    """Errors of two computations against a third: tensors by name, ``reference`` in float64.

    Names that only ``reference`` and ``original`` have are left out, unless they are outputs.

    Args:
        reference, original, fused: tensors by name; names that start with "gradient" are gradients.
        floor: an error that is allowed in any case, as measured for computations of this kind; at least four roundings
            of the dtype.

    Raises:
        ValueError: an output is missing from ``fused``, or a shape differs.
    """
    errors = []
    gradients = [float(g.abs().max()) for name, g in reference.items() if name.startswith("gradient") and g.numel()]
    largest = max(gradients, default=0.0)
    for name, exact in reference.items():
        if name not in fused:
            if name.startswith("output"):
                raise ValueError(f"compare: fused must return what original does, got no {name}")
            continue
        if fused[name].shape != exact.shape:
            raise ValueError(
                f"compare: {name} of fused must be {list(exact.shape)}, as of original, got {list(fused[name].shape)}"
            )
        least = max(floor, FLOOR_ROUNDINGS * torch.finfo(fused[name].dtype).eps)
        scale = float(exact.abs().max()) if exact.numel() else 0.0
        if name.startswith("gradient") and scale < ZERO_SHARE * largest:
            scale = largest
        distances = (_distance(value[name], exact, scale) for value in (original, fused))
        errors.append(Error(name, *distances, least))
    return Parity(tuple(errors))


def _distance(value: Tensor, exact: Tensor, scale: float) -> float:
    if exact.numel() == 0:
        return 0.0
    return float((value.double() - exact).abs().max()) / max(scale, torch.finfo(torch.float64).tiny)


def _run(
    function: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dtype: torch.dtype | None,
    backward: bool,
    seed: int,
) -> dict[str, Tensor]:
    """Outputs and gradients by name, in ``dtype`` (None: as given)."""
    inputs: list[Tensor] = []

    def prepare(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value.detach().to(dtype or value.dtype, copy=True).requires_grad_(backward)
        inputs.append(value)
        return value

    args, kwargs = tree_map(prepare, (tuple(args), dict(kwargs)))
    parameters: dict[str, Tensor] = {}
    if isinstance(function, nn.Module):
        function = deepcopy(function).to(dtype) if dtype is not None else deepcopy(function)
        parameters = {name: value for name, value in function.named_parameters() if value.requires_grad}
    devices = {value.device for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor) and value.is_cuda}
    with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(backward):
        torch.manual_seed(seed)
        outputs = [value for value in tree_flatten(function(*args, **kwargs))[0] if isinstance(value, Tensor)]
    named = {f"output {index}" if len(outputs) > 1 else "output": value for index, value in enumerate(outputs)}
    found = {name: value.detach() for name, value in named.items()}
    if backward:
        found.update(_gradients(outputs, inputs, parameters, seed))
    return found


def _gradients(
    outputs: list[Tensor], inputs: list[Tensor], parameters: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    roots = [value for value in outputs if value.requires_grad]
    # Drawn in float32 on the CPU and then moved: every dtype and device sees the same cotangent.
    cotangents = [torch.randn(value.shape, generator=generator).to(value) for value in roots]
    wanted = {f"gradient of input {index}": value for index, value in enumerate(inputs)}
    wanted |= {f"gradient of {name}": value for name, value in parameters.items()}
    if not roots:
        return {}
    grads = torch.autograd.grad(roots, list(wanted.values()), cotangents, allow_unused=True)
    return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}
