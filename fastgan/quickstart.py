"""``fastgan quickstart``: train a small sketch -> photo generator here, measure the fused layers, write a report."""

from __future__ import annotations

import argparse
import math
import os
import resource
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastgan
from fastgan.train.checkpoint import atomic_write
from fastgan.train.data import PhotoSet, grid_crops, load_photos
from fastgan.train.evaluate import HeldOut, evaluate, generate
from fastgan.train.extras import MissingExtra, require
from fastgan.train.pix2pix import Pix2Pix, Pix2PixConfig, recalibrate
from fastgan.train.session import Interrupted, Limit, Session

if TYPE_CHECKING:
    from fastgan.quickstart_measure import Measurements

DEFAULT_MINUTES = 3.0
MAX_MINUTES = 7 * 24 * 60.0
MAX_STEPS = 10_000_000
HELD_OUT_CROPS = 32
SHOWN_HELD_OUT, SHOWN_SEEN = 8, 4

DRAWING = (
    "Drawings are computed: pencil lines from a difference of Gaussians, and one grey wash over what is dark "
    "(XDoG, Winnemöller et al. 2012). They hold no colour, so the colours are the generator's guess."
)


def _number(kind: type, low: float, high: float, *, open_low: bool = False) -> Callable[[str], Any]:
    """An argparse type: a number of ``kind`` within [low, high], or (low, high]."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if open_low else low <= value) or not value <= high:
            sort = "a whole number" if kind is int else "a number"
            least = f"above {low:g}" if open_low else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"must be {sort} {least} and at most {high:g}, got {text!r}")
        return value

    return parse


def _size(text: str) -> int:
    if text not in ("32", "64", "128", "256"):
        raise argparse.ArgumentTypeError(f"must be 32, 64, 128 or 256, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    default = Pix2PixConfig()
    limit = parser.add_mutually_exclusive_group()
    minutes = _number(float, 0, MAX_MINUTES, open_low=True)
    limit.add_argument(
        "--minutes", type=minutes, help=f"train this long, with what earlier runs did (default {DEFAULT_MINUTES:g})"
    )
    limit.add_argument(
        "--steps",
        type=_number(int, 1, MAX_STEPS),
        help="train up to this step instead; the weights are then repeatable",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart"), help="folder for all results (default quickstart)"
    )
    parser.add_argument("--data", type=Path, help="a folder of images (default: photographs in scikit-image's wheel)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--seed", type=_number(int, 0, 2**31 - 1), default=default.seed, help="default %(default)s")
    parser.add_argument(
        "--width", type=_number(int, 4, 128), default=default.width, help="channels at full size (default %(default)s)"
    )
    parser.add_argument("--batch", type=_number(int, 1, 64), default=default.batch, help="default %(default)s")
    parser.add_argument("--size", type=_size, default=default.size, help="picture side in pixels (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand: 0 done, 1 an error with its text on stderr, 130 or 143 stopped by a signal and saved."""
    try:
        return _run(args)
    except Interrupted as stop:
        print(f"\nStopped and saved. To go on, repeat the command with --resume:\n  {_command(args, resume=True)}")
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("\nStopped; what was saved before is in place.")
        return 130
    except (ValueError, OSError, FloatingPointError, MissingExtra) as error:
        text = str(error)
        if isinstance(error, ValueError) and not text.startswith("quickstart: "):
            # Not about what the user gave: a mistake of ours, whose place the traceback shows.
            raise
        if isinstance(error, OSError) and error.filename is None and error.strerror:
            text = error.strerror
        print(f"fastgan quickstart: error: {text.removeprefix('quickstart: ')}", file=sys.stderr)
        return 1


def _command(args: argparse.Namespace, *, resume: bool | None = None) -> str:
    """The command line that ``args`` came from, defaults left out."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["fastgan", "quickstart"]
    for name, value in vars(args).items():
        if name in ("resume", "command") or value is None or value == parser.get_default(name):
            continue
        words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    if args.resume if resume is None else resume:
        words.append("--resume")
    return shlex.join(words)


def prepare_folder(out: Path) -> None:
    """Make ``out`` and prove that files can be written there, before any work is spent.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-test-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"quickstart: --out must be a folder that can be written, got {str(out)!r} ({error.strerror or error})"
        ) from error


def build(config: Pix2PixConfig) -> Pix2Pix:
    """The fused networks at their random start, which depends on the seed alone."""
    from fastgan import models, nn, ops

    def adversarial(real: Tensor | None, fake: Tensor, side: str) -> Tensor:
        return ops.patch_loss(real, fake, mode=config.loss, side=side).loss

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        generator = models.UNetGenerator(**config.generator_arguments())
        critic = models.PatchGAN(**config.critic_arguments())
    nn.group_spectral_norm(critic)
    return Pix2Pix(generator, critic, adversarial, config)


def _run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    for module, extra in (("PIL.Image", "train"), ("rich", "train"), ("safetensors", "train"), ("jinja2", "report")):
        require(module, extra)
    prepare_folder(args.out)
    photos = load_photos(args.data, size=args.size, seed=args.seed)
    print(_describe_photos(photos), flush=True)
    config = Pix2PixConfig(size=args.size, width=args.width, batch=args.batch, seed=args.seed)
    session = train(args, config, photos)
    return finish(args, session, started)


def _describe_photos(photos: PhotoSet) -> str:
    lines = [f"{len(photos.train)} photographs to train on, {len(photos.held_out)} held out ({photos.source})"]
    lines += [f"  skipped {name}: {reason}" for name, reason in photos.skipped]
    if photos.skipped:
        lines.append(f"  {len(photos.skipped)} skipped")
    lines += [f"  {name}: {what}" for name, what in photos.enlarged]
    if photos.enlarged:
        lines.append(f"  {len(photos.enlarged)} smaller than a crop, enlarged")
    return "\n".join([*lines, *(f"  {note}" for note in photos.notes)])


def train(args: argparse.Namespace, config: Pix2PixConfig, photos: PhotoSet) -> Session:
    """Train as the options say, from the start or from the checkpoint."""
    from fastgan.train.progress import Progress

    session = Session(build(config), photos, args.out / "checkpoint.pt")
    if args.resume:
        session.resume()
        print(f"going on from step {session.step}", flush=True)
    elif session.checkpoint.exists():
        previous = session.checkpoint.with_name("checkpoint.previous.pt")
        os.replace(session.checkpoint, previous)
        print(f"the checkpoint of an earlier run is now {previous}", flush=True)
    minutes = None if args.steps is not None else (args.minutes or DEFAULT_MINUTES)
    limit = Limit(args.steps, None if minutes is None else 60 * minutes)
    with Progress(limit, session) as progress:
        session.run(limit, progress.update)
    return session


def finish(args: argparse.Namespace, session: Session, started: float) -> int:
    """Evaluate, export, measure and report; print the five lines that matter."""
    from fastgan.models import saved
    from fastgan.profile import report
    from fastgan.quickstart_measure import measure_all

    config, photos = session.model.config, session.photos
    pairs, names = grid_crops(photos.held_out, size=config.size, most=HELD_OUT_CROPS)
    untrained = build(config).generator
    for model in (session.ema.model, untrained):
        recalibrate(model, session.sampler.calibration())
    held_out = evaluate(session.ema.model, untrained, pairs, len(photos.held_out), photos.mean_colour())

    arguments = config.generator_arguments()
    description = saved.describe("UNetGenerator", arguments, step=session.step, fastgan=fastgan.__version__)
    state = session.ema.model.state_dict()
    for name, write in (("generator.safetensors", saved.write_safetensors), ("generator.pth", saved.write_pth)):
        with atomic_write(args.out / name) as file:
            write(file, state, description)
    rows = _rows(session, pairs, names, held_out)
    report.write_pictures(args.out / "samples", {row.pop("file"): row.pop("strip") for row in rows})

    measurements = measure_all(
        session.model, session.sampler.batch(0), lambda part: print(f"measuring: {part}", flush=True)
    )
    context = _context(args, session, held_out, measurements, rows, started)
    with atomic_write(args.out / "report.html") as file:
        report.write_report(file, context)
    print(_five_lines(args, session, held_out, measurements, context["run"]))
    return 0


def _rows(session: Session, pairs: Any, names: list[str], held_out: HeldOut) -> list[dict[str, Any]]:
    """The pictures of the report: held-out crops first, then crops of training photographs."""
    from fastgan.profile.report import data_uri, encode_png

    seen, seen_names = grid_crops(session.photos.train, size=session.model.config.size, most=SHOWN_SEEN)
    shown = [(False, names, pairs, held_out.pictures, SHOWN_HELD_OUT)]
    shown.append((True, seen_names, seen, generate(session.ema.model, seen.sketch), SHOWN_SEEN))
    rows = []
    for is_seen, captions, both, pictures, most in shown:
        for index in range(min(most, len(captions))):
            triple = (both.sketch[index], pictures[index], both.photo[index])
            row = dict(
                zip(("sketch", "generated", "photo"), (data_uri(encode_png(part)) for part in triple), strict=True)
            )
            strip = torch.cat([part.expand(3, -1, -1) for part in triple], 2)
            stem = f"{'seen' if is_seen else 'held_out'}_{index + 1:02}"
            rows.append({**row, "seen": is_seen, "caption": captions[index], "file": stem, "strip": strip})
    return rows


def _context(
    args: argparse.Namespace,
    session: Session,
    held_out: HeldOut,
    measurements: Measurements,
    rows: list[dict[str, Any]],
    started: float,
) -> dict[str, Any]:
    from fastgan.profile.report import line_chart

    photos, history, config = session.photos, session.history, session.model.config
    machine = _machine()
    speed = session.step * config.batch / session.seconds
    run_facts = {
        "training": f"{session.step} steps of {config.batch} crops in {session.seconds:.0f} s ({speed:.1f} images/s)",
        "whole job": f"{time.monotonic() - started:.0f} s of this run, up to this page",
        "peak memory": f"{peak_memory_gib():.2f} GiB resident",
        "generator": f"U-Net, width {config.width}, {config.norm} norm, "
        f"{_millions(session.model.generator)} parameters",
        "critic": f"PatchGAN with spectral norm, width {config.critic_width}, "
        f"{_millions(session.model.critic)} parameters",
        "training rule": f"{config.loss} GAN loss + {config.l1_weight:g} · L1, Adam {config.lr_generator:g} / "
        f"{config.lr_critic:g} (generator / critic), weights averaged over steps with decay {config.ema_decay:g}",
        "seed": config.seed,
    }
    roles = [(photo, "training") for photo in photos.train] + [(photo, "held out") for photo in photos.held_out]
    return {
        "title": "fastgan quickstart",
        "drawing": DRAWING,
        "headline": _headline(session, held_out, measurements, speed),
        "rows": rows,
        "charts": [
            ("L1", "generated against photograph, pictures in −1 … 1", line_chart(history.l1)),
            ("Generator, adversarial", "0.69 where the critic cannot tell", line_chart(history.adversarial)),
            ("Critic", "0.69 where it cannot tell, 0 where it is sure", line_chart(history.critic)),
        ],
        "held_out": held_out,
        "measurements": measurements,
        "environment": machine,
        "command": _command(args),
        "run": run_facts,
        "sources": [(photo.name, photo.credit, role) for photo, role in roles],
        "left_out": [*photos.skipped, *photos.enlarged],
        "notes": [*photos.notes, *_not_done()],
    }


def _headline(
    session: Session, held_out: HeldOut, measurements: Measurements, speed: float
) -> list[tuple[str, str, str]]:
    generator = measurements.generator
    ours, best = generator.timings["fastgan"].median, generator.timings[generator.best_plain].median
    parities = measurements.parities
    baselines = f"untrained {held_out.untrained:.1f}, mean colour {held_out.mean_colour:.1f}"
    return [
        ("held-out error", f"{held_out.trained:.1f}", baselines),
        ("training", f"{speed:.1f} images/s", f"{session.step} steps in {session.seconds:.0f} s"),
        ("generator", f"{ours * 1e3:.1f} ms", f"plain PyTorch {best * 1e3:.1f} ms: {generator.speedup:.2f}×"),
        (
            "parity",
            f"{sum(parity.within for _, parity in parities)} of {len(parities)}",
            "comparisons within bounds",
        ),
    ]


def _machine() -> dict[str, Any]:
    from fastgan.profile.latency import environment, machine_limits

    limits = machine_limits()
    facts = {name: value for name, value in environment().items() if value is not None}
    return {
        **facts,
        "reading memory": f"{limits.read_bytes / 1e9:.0f} GB/s (measured: a float32 sum)",
        "multiplying": f"{limits.sgemm_flops / 1e9:.0f} GFLOP/s (measured: a float32 matrix product)",
    }


def _not_done() -> list[str]:
    notes = [
        "torch.compile is not timed here: compiling both networks takes longer than this job. bench/ has it.",
        "Nothing is said about image quality beyond the held-out L1: with a handful of photographs no distance between "
        "distributions would mean anything.",
    ]
    found = "A GPU was found, but this job uses" if torch.cuda.is_available() else "No GPU was found: this job used"
    notes.append(f"{found} the CPU only, and no number here says anything about a GPU.")
    return notes


def _five_lines(
    args: argparse.Namespace, session: Session, held_out: HeldOut, measurements: Measurements, facts: dict[str, Any]
) -> str:
    generator, step = measurements.generator, measurements.step
    parities = measurements.parities
    plain_error, fused_error = (max(values) for values in zip(*(p.largest for _, p in parities), strict=True))
    outside = [title for title, parity in parities if not parity.within]
    state = "all within bounds" if not outside else f"OUTSIDE bounds: {', '.join(outside)}"
    untrained, colour = held_out.gain_over(held_out.untrained), held_out.gain_over(held_out.mean_colour)
    return "\n".join(
        [
            "",
            f"report     {args.out / 'report.html'}  (generator.safetensors, generator.pth and samples/ beside it)",
            f"held-out   L1 {held_out.trained:.2f} of 255; untrained {held_out.untrained:.2f} ({-untrained:+.0%}), "
            f"mean colour {held_out.mean_colour:.2f} ({-colour:+.0%})",
            f"training   {facts['training']}, peak memory {facts['peak memory']}",
            f"speed      generator {generator.timings['fastgan'].median * 1e3:.1f} ms, plain PyTorch "
            f"{generator.timings[generator.best_plain].median * 1e3:.1f} ms ({generator.speedup:.2f}×); training step "
            f"{step.timings['fastgan'].median * 1e3:.0f} ms, plain {step.timings[step.best_plain].median * 1e3:.0f} ms "
            f"({step.speedup:.2f}×)",
            f"parity     {len(parities)} comparisons, {state}; largest error against float64 {fused_error:.0e}, plain "
            f"PyTorch's {plain_error:.0e}",
        ]
    )


def _millions(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M"


def peak_memory_gib() -> float:
    """The most memory that this process had resident, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
