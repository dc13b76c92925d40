"""Progress for people: a live bar in a terminal, one line every few seconds where output goes to a file."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import TYPE_CHECKING

from fastgan.train.extras import require

if TYPE_CHECKING:
    from fastgan.train.session import Limit, Session

# Between two lines where nothing can be redrawn.
LINE_SECONDS = 10.0
# Losses and speed shown are means over this many steps.
WINDOW = 20


def describe_step(session: Session, speed: float) -> str:
    """The latest losses and the speed, in one line."""
    history = session.history
    critic, adversarial, l1 = (
        sum(values[-WINDOW:]) / max(1, len(values[-WINDOW:]))
        for values in (history.critic, history.adversarial, history.l1)
    )
    return f"step {session.step}  L1 {l1:.3f}  adversarial {adversarial:.2f}  critic {critic:.2f}  {speed:.1f} images/s"


class Progress:
    """``with Progress(...) as progress: session.run(limit, progress.update)``."""

    def __init__(self, limit: Limit, session: Session) -> None:
        console = require("rich.console", "train").Console(stderr=False)
        self.limit, self.console = limit, console
        self.bar = None
        self.marks = [(session.seconds, session.step)]
        self.printed_at = -math.inf
        if console.is_terminal:
            bar = require("rich.progress", "train")
            self.bar = bar.Progress(
                bar.TextColumn("training"),
                bar.BarColumn(),
                bar.TaskProgressColumn(),
                bar.TextColumn("{task.description}"),
                console=console,
            )
            self.task = self.bar.add_task("", total=1.0)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, session: Session) -> None:
        """After each step."""
        self.marks = [*self.marks[-WINDOW:], (session.seconds, session.step)]
        seconds, steps = (last - first for first, last in zip(self.marks[0], self.marks[-1], strict=True))
        speed = steps * session.model.config.batch / seconds if seconds > 0 else 0.0
        share = self.limit.share(session.step, session.seconds)
        if self.bar is not None:
            self.bar.update(self.task, completed=share, description=describe_step(session, speed))
        elif time.monotonic() - self.printed_at >= LINE_SECONDS:
            self.printed_at = time.monotonic()
            print(f"{share:4.0%}  {describe_step(session, speed)}", flush=True)
