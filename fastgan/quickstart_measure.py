"""What ``fastgan quickstart`` measures: every fused layer, a training step and the generator against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgan.profile import plain
from fastgan.profile.compare import Comparison, compare
from fastgan.profile.latency import Timing, measure, speedup
from fastgan.profile.layers import pair_layers
from fastgan.profile.parity import FACTOR, Parity, against_reference, check_parity
from fastgan.train.data import Pairs
from fastgan.train.pix2pix import Pix2Pix, Pix2PixConfig

LAYER_SECONDS = 0.3
STEP_SECONDS = 8.0
GENERATOR_SECONDS = 3.0

# Plain PyTorch's own largest error in a step of these networks, over ten seeds at width 4 and size 32, is 1.9e-6 to
# 2.4e-5, found in sums that nearly cancel (the last bias of the critic, gains of norms). Which of two float32
# computations is luckier there says nothing, so an error below this is within bounds for every tensor of a step.
STEP_FLOOR = 3e-5

# In a trained network one activation or one L1 difference next to zero takes the other sign in float32 than in float64,
# and moves the gradient of whichever layer it meets by about 1e-4 (measured at width 24: over six batches up to 1.2e-3
# in plain PyTorch, 2.2e-3 in fastgan; in float64 the two agree to 4e-14). Which layer that is says nothing either, so
# the bound of every tensor is at least twice plain PyTorch's largest error over all tensors of the step.

# The two memory layouts that plain PyTorch offers; which is faster depends on the model and the processor.
LAYOUTS: Mapping[str, torch.memory_format] = {
    "plain PyTorch": torch.contiguous_format,
    "plain PyTorch, channels_last": torch.channels_last,
}


@dataclass(frozen=True)
class Contest:
    """fastgan against plain PyTorch in its layouts, interleaved; the ratio is against the fastest plain one."""

    title: str
    parity: Parity
    timings: Mapping[str, Timing]  # "fastgan" and the keys of LAYOUTS

    @property
    def best_plain(self) -> str:
        """The faster of the plain layouts."""
        return min(LAYOUTS, key=lambda name: self.timings[name].median)

    @property
    def speedup(self) -> float:
        """How many times as fast fastgan is, the median over the rounds."""
        return speedup(self.timings, "fastgan", self.best_plain)


@dataclass(frozen=True)
class Measurements:
    """All of it: a comparison for each distinct layer, and two contests. ``counts``: how often each layer occurs."""

    layers: tuple[Comparison, ...]
    counts: tuple[int, ...]
    step: Contest
    generator: Contest

    @property
    def parities(self) -> list[tuple[str, Parity]]:
        """Everything whose numbers were compared, by title."""
        rows = [(layer.name, layer.parity) for layer in self.layers]
        return [*rows, *((contest.title, contest.parity) for contest in (self.step, self.generator))]


def measure_all(model: Pix2Pix, pairs: Pairs, on_part: Callable[[str], None]) -> Measurements:
    """Measure the trained networks of ``model`` on ``pairs``, which are left as they are.

    Args:
        model: as trained; its networks are copied.
        pairs: a training batch.
        on_part: called with the name of each part before it starts.
    """
    config = model.config
    twins = plain.UNet(**config.generator_arguments()), plain.PatchCritic(**config.critic_arguments())
    for twin, fused in zip(twins, (model.generator, model.critic), strict=True):
        twin.load_state_dict(fused.state_dict())
    on_part("layers")
    both = torch.cat([pairs.sketch, pairs.photo], 1)
    found = [
        *pair_layers(model.generator, twins[0], pairs.sketch),
        *pair_layers(model.critic, twins[1], torch.cat([both, both])),
    ]
    generator = torch.Generator().manual_seed(config.seed)
    layers = tuple(
        compare(
            pair.plain,
            pair.fused,
            [torch.randn(pair.shape, generator=generator)],
            name=pair.title,
            seconds=LAYER_SECONDS,
        )
        for pair in found
    )
    on_part("training step")
    step = measure_step(model, twins, pairs)
    on_part("generator")
    return Measurements(
        layers, tuple(len(pair.names) for pair in found), step, measure_generator(model, twins[0], pairs)
    )


def measure_step(model: Pix2Pix, twins: tuple[nn.Module, nn.Module], pairs: Pairs) -> Contest:
    """One whole training step: its losses and every gradient against float64, and its time."""
    config = model.config
    reference = _step_results(plain_trainer(*twins, config, dtype=torch.float64), pairs, torch.float64)
    original = _step_results(plain_trainer(*twins, config), pairs)
    fused = _step_results(_copy(model), pairs)
    largest = against_reference(reference, original, original).largest[0]
    parity = against_reference(reference, original, fused, floor=max(STEP_FLOOR, FACTOR * largest))
    trainers = {"fastgan": _copy(model)}
    batches = {"fastgan": pairs}
    for name, layout in LAYOUTS.items():
        trainers[name] = plain_trainer(*twins, config, layout=layout)
        batches[name] = Pairs(pairs.sketch.to(memory_format=layout), pairs.photo.to(memory_format=layout))

    def stepper(name: str) -> Callable[[], object]:
        return lambda: trainers[name].step(batches[name])

    with torch.random.fork_rng(devices=[]):
        timings = measure({name: stepper(name) for name in trainers}, seconds=STEP_SECONDS)
    return Contest(f"training step, batch {config.batch}", parity, timings)


def plain_trainer(
    generator: nn.Module,
    critic: nn.Module,
    config: Pix2PixConfig,
    *,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> Pix2Pix:
    """A trainer of copies of the twins, with torch's own loss."""
    networks = [deepcopy(network).to(dtype=dtype, memory_format=layout) for network in (generator, critic)]
    return Pix2Pix(*networks, plain.bce_adversarial, config)


def _copy(model: Pix2Pix) -> Pix2Pix:
    return Pix2Pix(deepcopy(model.generator), deepcopy(model.critic), model.adversarial, model.config)


def _step_results(trainer: Pix2Pix, pairs: Pairs, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Losses and gradients of one step. Dropout is off: its masks need not agree between dtypes."""
    trainer.generator.eval()
    trainer.critic.train()
    losses = trainer.step(Pairs(pairs.sketch.to(dtype), pairs.photo.to(dtype)))
    found = {f"{name} loss": value for name, value in vars(losses).items()}
    for title in ("generator", "critic"):
        parameters = getattr(trainer, title).named_parameters()
        found |= {f"gradient of {title} {name}": value.grad for name, value in parameters if value.grad is not None}
    return found


def measure_generator(model: Pix2Pix, twin: nn.Module, pairs: Pairs) -> Contest:
    """The generator alone, in eval mode on one drawing: what a user of it waits for."""
    sketch = pairs.sketch[:1].contiguous()
    fused = deepcopy(model.generator).eval()
    twin = deepcopy(twin).eval()
    parity = check_parity(twin, fused, [sketch], {}, backward=False)
    cases: dict[str, Callable[[], object]] = {"fastgan": lambda: fused(sketch)}
    for name, layout in LAYOUTS.items():
        cases[name] = _inference(deepcopy(twin).to(memory_format=layout), sketch.to(memory_format=layout))
    with torch.inference_mode():
        timings = measure(cases, seconds=GENERATOR_SECONDS)
    size = model.config.size
    return Contest(f"generator, one {size}×{size} drawing", parity, timings)


def _inference(model: nn.Module, sketch: Tensor) -> Callable[[], Tensor]:
    return lambda: model(sketch)
