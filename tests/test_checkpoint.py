"""Checkpoints: atomic on a failing disk, exact to continue from, and refused where they belong to another run."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastgan
from fastgan.quickstart import build
from fastgan.train import checkpoint
from fastgan.train.checkpoint import atomic_write, load_checkpoint, save_checkpoint
from fastgan.train.data import Photo, PhotoSet
from fastgan.train.pix2pix import Ema, Pix2PixConfig, recalibrate
from fastgan.train.session import Interrupted, Limit, Session

CONFIG = Pix2PixConfig(size=32, width=4, critic_width=4, critic_layers=1, batch=2, seed=3)


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    images = [Photo(f"{i}", torch.from_numpy(rng.integers(0, 256, (3, 40, 48), dtype=np.uint8))) for i in range(3)]
    return PhotoSet("noise", images[:2], images[2:])


def new_session(photos, folder, config=CONFIG):
    return Session(build(config), photos, folder / "checkpoint.pt")


def weights(session):
    state = session.state()
    parts = ("generator", "critic", "ema")
    found = {f"{part}.{key}": value.clone() for part in parts for key, value in state[part].items()}
    for name in ("generator_optimizer", "critic_optimizer"):
        for index, slots in state[name]["state"].items():
            found |= {f"{name}.{index}.{key}": value.clone() for key, value in slots.items()}
    return found


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_same_seed_same_weights_and_another_seed_others(photos, tmp_path):
    runs = []
    for name, config in (("a", CONFIG), ("b", CONFIG), ("c", replace(CONFIG, seed=4))):
        (tmp_path / name).mkdir()
        session = new_session(photos, tmp_path / name, config)
        session.run(Limit(steps=3))
        runs.append(weights(session))
        # What a user draws in between must not matter.
        torch.rand(5)
    assert_same(runs[0], runs[1])
    assert any(not torch.equal(value, runs[2][key]) for key, value in runs[0].items())


def test_a_resumed_run_is_the_uninterrupted_run(photos, tmp_path):
    straight = new_session(photos, tmp_path)
    straight.run(Limit(steps=5))
    expected, losses = weights(straight), straight.history

    (tmp_path / "cut").mkdir()
    first = new_session(photos, tmp_path / "cut")

    def stop_after_two(session):
        if session.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as stop:
        first.run(Limit(steps=5), stop_after_two)
    assert stop.value.signum == signal.SIGINT

    second = new_session(photos, tmp_path / "cut")
    second.resume()
    assert second.step == 2
    second.run(Limit(steps=5))
    assert_same(expected, weights(second))
    assert second.history == losses


def test_a_time_limit_only_chooses_where_to_stop(photos, tmp_path):
    timed = new_session(photos, tmp_path)
    timed.run(Limit(seconds=0.2))
    assert timed.seconds >= 0.2
    (tmp_path / "counted").mkdir()
    counted = new_session(photos, tmp_path / "counted")
    counted.run(Limit(steps=timed.step))
    assert_same(weights(timed), weights(counted))


def test_training_leaves_the_global_random_state_alone(photos, tmp_path):
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    new_session(photos, tmp_path).run(Limit(steps=1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_second_interrupt_stops_at_once(photos, tmp_path):
    def impatient(session):
        # Not os.kill: the system may deliver both before Python looks, and it would see one.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        new_session(photos, tmp_path).run(Limit(steps=3), impatient)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(photos, tmp_path):
    session = new_session(photos, tmp_path)
    session.run(Limit(steps=1))
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    with torch.no_grad():
        next(session.model.generator.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss must be finite, got nan at step 2"):
        session.run(Limit(steps=3))
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_the_last_checkpoint_survives_a_disk_error(photos, tmp_path, monkeypatch, when):
    session = new_session(photos, tmp_path)
    session.run(Limit(steps=1))
    good = session.checkpoint.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if when == "write":
        real_open = open

        def open_full(*args, **kwargs):
            file = real_open(*args, **kwargs)

            class Full:
                """Takes the first kilobytes, then the disk is full: in the middle of torch's archive."""

                taken = 0

                def write(self, chunk):
                    self.taken += len(chunk)
                    return full() if self.taken > 4096 else file.write(chunk)

                def __getattr__(self, name):
                    return getattr(file, name)

                def __enter__(self):
                    return self

                def __exit__(self, *error):
                    file.close()

            return Full()

        monkeypatch.setattr(checkpoint, "open", open_full, raising=False)
    else:
        monkeypatch.setattr(checkpoint.os, when, full)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint\.pt: No space left .*; what was there") as caught:
        session.run(Limit(steps=2))
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert session.checkpoint.read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    resumed = new_session(photos, tmp_path)
    resumed.resume()
    assert resumed.step == 1


def test_a_write_that_the_kernel_refuses_half_way(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1, "payload": torch.zeros(50_000)})
    good = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*: File too large; what was there before is untouched"):
            save_checkpoint(path, {"step": 2, "payload": torch.zeros(500_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == good
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_really_full_disk(photos, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no right to mount a small disk here; the two tests above cover it ({mounted.stderr.strip()})")
    try:
        session = new_session(photos, disk)
        save_checkpoint(session.checkpoint, {"step": 1, "payload": torch.zeros(50_000)})
        good = session.checkpoint.read_bytes()
        with pytest.raises(OSError, match="No space left on device; what was there before is untouched"):
            save_checkpoint(session.checkpoint, {"step": 2, "payload": torch.zeros(500_000)})
        assert session.checkpoint.read_bytes() == good
        assert [path.name for path in disk.iterdir()] == ["checkpoint.pt"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_atomic_write_leaves_nothing_behind_when_its_body_fails(tmp_path):
    def write_half():
        with atomic_write(tmp_path / "file") as file:
            file.write(b"half")
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def _saved_state(photos, tmp_path):
    session = new_session(photos, tmp_path)
    session.save()
    return session


def test_a_checkpoint_of_another_architecture_is_refused(photos, tmp_path):
    _saved_state(photos, tmp_path)
    other = new_session(photos, tmp_path, replace(CONFIG, width=8, batch=4))
    with pytest.raises(ValueError, match=r"must have width = 8, got 4; batch = 4, got 2; give the same options"):
        other.resume()


def test_a_checkpoint_of_other_photographs_is_refused(photos, tmp_path):
    _saved_state(photos, tmp_path)
    swapped = PhotoSet("noise", photos.held_out, photos.train)
    with pytest.raises(ValueError, match="must come from these photographs"):
        new_session(swapped, tmp_path).resume()


def test_no_checkpoint_and_damaged_checkpoints_are_refused(photos, tmp_path):
    session = new_session(photos, tmp_path)
    with pytest.raises(ValueError, match="--resume needs a checkpoint, got nothing at"):
        session.resume()
    session.save()
    whole = session.checkpoint.read_bytes()
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        session.checkpoint.write_bytes(damaged)
        with pytest.raises(ValueError, match="must be a checkpoint of fastgan, got a file that cannot be read"):
            session.resume()
    torch.save({"weights": torch.zeros(2)}, session.checkpoint)
    with pytest.raises(ValueError, match="got something else"):
        session.resume()


def test_a_checkpoint_of_another_format_version_is_refused(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    session = _saved_state(photos, tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="must have format version 1, got 2"):
        session.resume()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": checkpoint.FORMAT, "x": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(tmp_path / "evil.pt", config={}, data="")
    assert not (tmp_path / "ran").exists()


def test_ema_follows_weights_and_copies_buffers():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    with torch.no_grad():
        model[0].weight.fill_(0.0)
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    model[1].running_mean.fill_(7.0)
    ema.update(model, 1000)
    assert ema.model[0].weight.item() == pytest.approx(0.1)
    assert ema.model[1].running_mean.item() == 7.0
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_ema_forgets_its_start_early():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = Ema(model, 0.999)
    with torch.no_grad():
        model.weight.fill_(5.0)
    for step in range(1, 60):
        ema.update(model, step)
    assert ema.model.weight.item() == pytest.approx(5.0, abs=1e-3)


def test_recalibrated_statistics_are_those_of_the_data():
    norm = torch.nn.BatchNorm2d(2)
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), norm).train()
    batches = [torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) * 3 + 1 for seed in range(3)]
    recalibrate(model, batches)
    torch.testing.assert_close(norm.running_mean, torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0))
    expected = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in batches]).mean(0)
    torch.testing.assert_close(norm.running_var, expected)
    assert norm.momentum == 0.1
    assert model.training
    assert norm.training


def test_load_rebuilds_a_saved_generator(tmp_path):
    from fastgan.models import saved

    model = build(CONFIG).generator.eval()
    description = saved.describe("UNetGenerator", CONFIG.generator_arguments(), step=1)
    for name, write in (("g.safetensors", saved.write_safetensors), ("g.pth", saved.write_pth)):
        with atomic_write(tmp_path / name) as file:
            write(file, model.state_dict(), description)
        loaded = fastgan.load(tmp_path / name)
        sketch = torch.rand(1, 1, 32, 32)
        assert not loaded.training
        assert torch.equal(loaded(sketch), model(sketch))


def test_load_refuses_what_is_no_saved_generator(tmp_path):
    from safetensors.torch import save_file

    from fastgan.models import saved

    with pytest.raises(FileNotFoundError, match=r"load: path must be a saved generator, got .* \(no such file\)"):
        fastgan.load(tmp_path / "none.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="must carry 'fastgan_model' in its metadata, got none"):
        fastgan.load(tmp_path / "plain.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="got a file that fastgan did not save"):
        fastgan.load(tmp_path / "plain.pth")
    for name in ("broken.safetensors", "broken.pth"):
        (tmp_path / name).write_bytes(b"broken")
        with pytest.raises(ValueError, match="cannot be read"):
            fastgan.load(tmp_path / name)
    state = build(CONFIG).generator.state_dict()
    for description, text in (
        (saved.describe("Elsewhere", {}), "must name one of fastgan.models .*, got 'Elsewhere'"),
        (saved.describe("UNetGenerator", {**CONFIG.generator_arguments(), "width": 8}), "must fit UNetGenerator"),
        (saved.describe("UNetGenerator", {"wide": 8}), "must fit UNetGenerator"),
    ):
        with open(tmp_path / "wrong.pth", "wb") as file:
            saved.write_pth(file, state, description)
        with pytest.raises(ValueError, match=text):
            fastgan.load(tmp_path / "wrong.pth")
