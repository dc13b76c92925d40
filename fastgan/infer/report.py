"""What became of a model: for each step what it is, what is fused into it and how it is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastgan.infer.plan import Choice, Program


@dataclass(frozen=True)
class Row:
    """One step.

    Attributes:
        layer: where in the model it comes from.
        kind: the fused layer, or torch's operator.
        shape: of its result.
        fused: what it computes besides.
        algorithm: of a convolution, with Winograd's tile, and how weights are stored if not in float32.
        ms: measured, or of a convolution predicted by the cost model; None where nothing is known.
        measured: whether ``ms`` was, by ``profile`` or while tuning.
        reason: why it is left to torch; None where a kernel of ours computes it.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    fused: tuple[str, ...]
    algorithm: str | None
    ms: float | None
    measured: bool
    reason: str | None


@dataclass(frozen=True)
class Report:
    """The rows and the largest differences from the original; ``str()`` is a table.

    Attributes:
        psnr: of "bf16" and "int8", the least PSNR of any result to the original's, in dB.
        kept: layer -> the PSNR that rounding it alone leaves, of layers that stay in float32 for that reason.
    """

    rows: tuple[Row, ...]
    differences: dict[str, float]
    precision: str
    psnr: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)

    @property
    def left_to_torch(self) -> tuple[Row, ...]:
        """The steps that no kernel of ours computes."""
        return tuple(row for row in self.rows if row.reason is not None)

    def __str__(self) -> str:
        lines = [f"precision {self.precision}: {len(self.rows)} steps, {len(self.left_to_torch)} of them torch's"]
        for name, value in self.differences.items():
            lines.append(f"  differs from the original by {value:.1e} of the largest value on {name}")
        for name, value in self.psnr.items():
            lines.append(f"  PSNR {value:.1f} dB to the original on {name}")
        for layer, value in self.kept.items():
            lines.append(f"  {layer} stays in float32: rounding it alone leaves {value:.1f} dB")
        for row in self.rows:
            time = "" if row.ms is None else f"{row.ms:.2f} ms {'measured' if row.measured else 'predicted'}"
            cells = [row.layer, "×".join(map(str, row.shape)), row.algorithm or row.kind, time]
            lines.append("  " + "  ".join(cell for cell in cells if cell))
            if row.fused:
                lines.append(f"      with {_counted(row.fused)}")
            if row.reason is not None:
                lines.append(f"      torch's {row.kind}: {row.reason}")
        return "\n".join(lines)


def _counted(names: Sequence[str]) -> str:
    return ", ".join(name if count == 1 else f"{count}× {name}" for name, count in Counter(names).items())


def rows_of(program: Program, measured: Sequence[float] | None = None) -> tuple[Row, ...]:
    """A program's steps, with the time of each if it was measured."""
    rows = []
    for number, step in enumerate(program.steps):
        value = step.node.meta.get("val")
        kind = str(getattr(step.node.target, "_name", getattr(step.node.target, "__name__", step.node.target)))
        choice = step.choice
        ms = None if choice is None else choice.measured_ms or choice.predicted_ms or None
        tuned = choice is not None and choice.measured_ms is not None
        rows.append(
            Row(
                step.name,
                kind,
                tuple(getattr(value, "shape", ())),
                tuple(step.fused),
                _algorithm(choice),
                ms if measured is None else measured[number],
                tuned or measured is not None,
                step.reason,
            )
        )
    return tuple(rows)


def _algorithm(choice: Choice | None) -> str | None:
    if choice is None:
        return None
    words = [
        choice.algorithm,
        f"m={choice.tile}" if choice.tile else "",
        "" if choice.storage == "fp32" else choice.storage,
    ]
    return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Memory:
    """Bytes that an optimised model holds.

    Attributes:
        weights: constants of the graph, without those that were dropped.
        prepared: what algorithms made of weights.
        activations: planned memory of one caller.
        alive: what lives in it at the same time at worst; no plan needs less.
        callers: how many callers have had such memory at the same time.
    """

    weights: int
    prepared: int
    activations: int
    alive: int
    callers: int

    @property
    def total(self) -> int:
        return self.weights + self.prepared + self.activations * self.callers

    def __str__(self) -> str:
        def mb(count: int) -> str:
            return f"{count / 1e6:.1f} MB"

        return (
            f"{mb(self.total)}: weights {mb(self.weights)}, prepared {mb(self.prepared)}, activations "
            f"{self.callers} × {mb(self.activations)} (at least {mb(self.alive)})"
        )
