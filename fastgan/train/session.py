"""A training run: steps until a limit, checkpoints, interruption, and exact continuation."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgan.train.checkpoint import load_checkpoint, save_checkpoint
from fastgan.train.data import CropSampler, PhotoSet
from fastgan.train.pix2pix import Ema, Pix2Pix

SAVE_EVERY_SECONDS = 60.0


@dataclass(frozen=True)
class Limit:
    """Where training stops: after so many steps or seconds of it, counted over all runs. One of the two is None."""

    steps: int | None = None
    seconds: float | None = None

    def reached(self, step: int, seconds: float) -> bool:
        """Whether a run that has made ``step`` steps in ``seconds`` is done."""
        return (self.steps is not None and step >= self.steps) or (self.seconds is not None and seconds >= self.seconds)

    def share(self, step: int, seconds: float) -> float:
        """How much of the run is done, 0 to 1."""
        return min(1.0, step / self.steps if self.steps is not None else seconds / self.seconds)


@dataclass
class History:
    """One value a step: the losses, in the order of the steps."""

    critic: list[float] = field(default_factory=list)
    adversarial: list[float] = field(default_factory=list)
    l1: list[float] = field(default_factory=list)


class Interrupted(Exception):
    """The run was asked to stop and has saved; ``signum`` says by which signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Session:
    """Trains a :class:`Pix2Pix` on a :class:`PhotoSet`, from step 0 or from a checkpoint."""

    def __init__(self, model: Pix2Pix, photos: PhotoSet, checkpoint: Path) -> None:
        config = model.config
        self.model, self.photos, self.checkpoint = model, photos, checkpoint
        self.data = photos.fingerprint()
        self.ema = Ema(model.generator, config.ema_decay)
        self.sampler = CropSampler(photos.train, size=config.size, batch=config.batch, seed=config.seed)
        self.step = 0
        self.seconds = 0.0
        self.history = History()

    def state(self) -> dict[str, Any]:
        """Everything that continuing needs, and what identifies the run."""
        model = self.model
        return {
            "config": model.config.to_dict(),
            "data": self.data,
            "step": self.step,
            "seconds": self.seconds,
            "history": vars(self.history),
            "generator": model.generator.state_dict(),
            "critic": model.critic.state_dict(),
            "ema": self.ema.model.state_dict(),
            "generator_optimizer": model.generator_optimizer.state_dict(),
            "critic_optimizer": model.critic_optimizer.state_dict(),
        }

    def save(self) -> None:
        """Write the checkpoint. Raises OSError when the disk refuses; the last one is then untouched."""
        save_checkpoint(self.checkpoint, self.state())

    def resume(self) -> None:
        """Continue from the checkpoint. Raises ValueError if there is none, or it belongs to another run."""
        model = self.model
        state = load_checkpoint(self.checkpoint, config=model.config.to_dict(), data=self.data)
        for name in ("generator", "critic", "generator_optimizer", "critic_optimizer"):
            getattr(model, name).load_state_dict(state[name])
        self.ema.model.load_state_dict(state["ema"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = History(**state["history"])

    def run(self, limit: Limit, on_step: Callable[[Session], None] | None = None) -> None:
        """Train until ``limit``; save every minute, at the end, and when a signal asks to stop.

        Raises:
            Interrupted: after saving, on SIGINT or SIGTERM. A second signal stops at once, without saving.
            FloatingPointError: a loss is not finite; nothing is saved, so the last checkpoint is from before.
            OSError: a checkpoint cannot be written.
        """
        saved_at = self.seconds
        with _asked_to_stop() as asked, torch.random.fork_rng(devices=[]):
            while not limit.reached(self.step, self.seconds):
                started = time.perf_counter()
                self._train_one()
                self.seconds += time.perf_counter() - started
                if on_step is not None:
                    on_step(self)
                if asked or self.seconds - saved_at >= SAVE_EVERY_SECONDS:
                    self.save()
                    saved_at = self.seconds
                if asked:
                    raise Interrupted(asked[0])
        self.save()

    def _train_one(self) -> None:
        # Dropout draws from torch's global generator: seeding it from (seed, step) makes a step repeatable by itself.
        torch.manual_seed((self.model.config.seed * 1_000_003 + self.step) % 2**63)
        losses = self.model.step(self.sampler.batch(self.step))
        self.step += 1
        self.ema.update(self.model.generator, self.step)
        for name, values in vars(self.history).items():
            value = float(getattr(losses, name))
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"quickstart: the {name} loss must be finite, got {value} at step {self.step}; the last "
                    "checkpoint is from before"
                )
            values.append(value)


@contextmanager
def _asked_to_stop():
    """Collects the first SIGINT or SIGTERM instead of raising; a second one acts as usual."""
    asked: list[int] = []
    previous = {}

    def note(signum: int, frame: object) -> None:
        asked.append(signum)
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:
        # Only the main thread may set handlers; elsewhere the caller's own handling stays.
        previous.clear()
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
