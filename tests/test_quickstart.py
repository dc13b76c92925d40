"""The main job end to end, at a size that takes seconds."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import read_page

import fastgan
from fastgan import cli, quickstart, quickstart_measure
from fastgan.quickstart import HELD_OUT_CROPS, build
from fastgan.train.data import grid_crops, load_photos
from fastgan.train.evaluate import evaluate, mean_l1
from fastgan.train.pix2pix import Pix2PixConfig, recalibrate
from fastgan.train.progress import Progress
from fastgan.train.session import History, Limit, Session

SMALL = ("--size", "32", "--width", "4", "--batch", "2")


@pytest.fixture
def quick(monkeypatch):
    """Shorter timings: their values are not under test here."""
    for name in ("LAYER_SECONDS", "STEP_SECONDS", "GENERATOR_SECONDS"):
        monkeypatch.setattr(quickstart_measure, name, 0.01)


@pytest.fixture
def folder(tmp_path):
    """Photograph-like images: smooth, coloured, with edges; and one that cannot be read."""
    folder = tmp_path / "photos <&>"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(5):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((80, 64), Image.Resampling.BICUBIC).save(folder / f"photo_{index}.png")
    (folder / "broken.jpg").write_bytes(b"broken")
    return folder


def run(*words):
    return cli.main(["quickstart", *SMALL, *map(str, words)])


def test_the_whole_job(quick, folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--steps", 4, "--data", folder, "--out", out, "--seed", 7) == 0
    printed = capsys.readouterr().out

    lines = printed.rstrip().splitlines()[-5:]
    assert [line.split()[0] for line in lines] == ["report", "held-out", "training", "speed", "parity"]
    assert str(out / "report.html") in lines[0]
    assert re.search(r"L1 [\d.]+ of 255; untrained [\d.]+ \([+-]\d+%\), mean colour [\d.]+ \([+-]\d+%\)", lines[1])
    assert "4 steps of 2 crops" in lines[2]
    assert "all within bounds" in lines[4]
    assert "skipped broken.jpg: cannot identify" in printed

    text = (out / "report.html").read_text()
    page = read_page(text)
    assert page.external == []
    assert "url(" not in text
    assert "@import" not in text
    for png in page.images:
        Image.open(io.BytesIO(png)).verify()
    assert len(page.images) % 3 == 0
    assert page.images
    for expected in ("photos &lt;&amp;&gt;", "broken.jpg", "fastgan quickstart --steps 4", "spectral norm", "torch"):
        assert expected in text, expected
    assert "photos <&>" not in text
    assert len(list((out / "samples").glob("*.png"))) == len(page.images) // 3
    names = {path.name for path in out.iterdir()}
    assert names == {"report.html", "generator.safetensors", "generator.pth", "checkpoint.pt", "samples"}

    first, second = (fastgan.load(out / name) for name in ("generator.safetensors", "generator.pth"))
    sketch = torch.rand(1, 1, 32, 32)
    assert torch.equal(first(sketch), second(sketch))


def test_resuming_goes_on_and_another_run_keeps_the_old_checkpoint(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "finish", lambda *arguments: 0)
    out = tmp_path / "out"
    assert run("--steps", 1, "--data", folder, "--out", out) == 0
    assert run("--steps", 2, "--data", folder, "--out", out, "--resume") == 0
    assert "going on from step 1" in capsys.readouterr().out
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 2
    assert run("--steps", 1, "--data", folder, "--out", out) == 0
    assert "the checkpoint of an earlier run is now" in capsys.readouterr().out
    assert torch.load(out / "checkpoint.previous.pt", weights_only=True)["step"] == 2
    # A later option wins, so this is the same run with another width.
    assert run("--width", 8, "--steps", 2, "--data", folder, "--out", out, "--resume") == 1
    assert "must have width = 8, got 4" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(folder, tmp_path, number, status):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastgan.cli", "quickstart", *SMALL, "--steps", "100000"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--data", str(folder), "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, cwd=Path(fastgan.__file__).parents[1],
    )  # fmt: skip
    # The first line of progress comes after the first step.
    while "step 1 " not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert "Stopped and saved" in printed
    assert "--resume" in printed
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] >= 1


def test_training_beats_the_mean_colour_on_held_out_photographs():
    config = Pix2PixConfig(size=32, width=8, critic_width=8, batch=8, seed=0)
    photos = load_photos(None, size=32, seed=0)
    session = Session(build(config), photos, Path(os.devnull))
    session.save = lambda: None
    session.run(Limit(steps=120))
    untrained = build(config).generator
    for model in (session.ema.model, untrained):
        recalibrate(model, session.sampler.calibration())
    pairs, _ = grid_crops(photos.held_out, size=32, most=HELD_OUT_CROPS)
    held_out = evaluate(session.ema.model, untrained, pairs, len(photos.held_out), photos.mean_colour())
    assert held_out.improved
    assert held_out.gain_over(held_out.mean_colour) > 0.1
    assert held_out.gain_over(held_out.untrained) > 0.1


def test_held_out_error_is_in_grey_levels():
    black, white = torch.full((1, 3, 4, 4), -1.0), torch.full((1, 3, 4, 4), 1.0)
    assert mean_l1(black, white) == 255.0
    assert mean_l1(white, white) == 0.0


def test_quickstart_is_imported_only_when_asked_for():
    late = ("PIL", "rich", "jinja2", "fastgan.quickstart")
    code = f"import sys, fastgan.cli; print([name for name in {late} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "[]"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(terminal, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    history = History([0.5], [0.7], [0.25])
    config = Pix2PixConfig(batch=4)
    session = SimpleNamespace(step=0, seconds=0.0, history=history, model=SimpleNamespace(config=config))
    with Progress(Limit(steps=2), session) as progress:
        session.step, session.seconds = 1, 0.5
        progress.update(session)
    printed = capsys.readouterr().out
    text = re.sub("\x1b\\[[^a-zA-Z]*[a-zA-Z]", "", printed)
    assert "step 1  L1 0.250  adversarial 0.70  critic 0.50  8.0 images/s" in text
    assert "50%" in printed
    assert ("\x1b[" in printed) == terminal
