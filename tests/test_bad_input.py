"""Bad input to the quickstart: each gives a text that names what was expected and what came, and exit status 1 or 2."""

from __future__ import annotations

import builtins
import importlib
import os
import stat

import numpy as np
import pytest
from PIL import Image

from fastgan import cli
from fastgan.train import extras
from fastgan.train.data import load_photos
from fastgan.train.extras import MissingExtra, require


def save_photo(path, side=64, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """A folder of four sound photographs."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(4):
        save_photo(folder / f"good_{index}.png", seed=index)
    return folder


def error_of(capsys, *words):
    """Run the command line and return (exit status, what it wrote to stderr)."""
    try:
        status = cli.main(["quickstart", *map(str, words)])
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


def test_data_folder_that_does_not_exist(tmp_path, capsys):
    status, text = error_of(capsys, "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert status == 1
    assert f"--data must be a folder of images, got '{tmp_path}/none' (nothing there)" in text
    assert "Traceback" not in text


def test_data_folder_that_is_a_file(tmp_path, capsys):
    save_photo(tmp_path / "photo.png")
    status, text = error_of(capsys, "--data", tmp_path / "photo.png", "--out", tmp_path / "out")
    assert status == 1
    assert "--data must be a folder of images" in text
    assert "(a file)" in text


@pytest.mark.parametrize("others", [0, 3])
def test_data_folder_without_images(tmp_path, capsys, others):
    (tmp_path / "photos").mkdir()
    for index in range(others):
        (tmp_path / "photos" / f"{index}.txt").write_text("text")
    status, text = error_of(capsys, "--data", tmp_path / "photos", "--out", tmp_path / "out")
    assert status == 1
    assert "--data must hold at least 2 usable images (one is held out), got 0" in text
    assert f"(0 image files, {others} other files)" in text


def test_one_image_is_too_few_and_the_skipped_are_named(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    save_photo(tmp_path / "photos" / "good.png")
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    status, text = error_of(capsys, "--size", 32, "--data", tmp_path / "photos", "--out", tmp_path / "out")
    assert status == 1
    assert "got 1 in" in text
    assert "skipped bad.png: cannot identify image file" in text


def test_a_truncated_image_among_good_ones_is_skipped_named_and_counted(folder):
    for name, source in (("cut.png", "PNG"), ("cut.jpg", "JPEG")):
        Image.open(folder / "good_0.png").save(folder / name, source)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    photos = load_photos(folder, size=32, seed=0)
    assert len(photos.train) + len(photos.held_out) == 4
    reasons = dict(photos.skipped)
    assert sorted(reasons) == ["cut.jpg", "cut.png", "empty.png"]
    assert "truncated" in reasons["cut.jpg"]
    assert "truncated" in reasons["cut.png"]
    assert "cannot identify" in reasons["empty.png"]
    assert str(folder) not in "".join(reasons.values())


def test_greyscale_alpha_palette_and_deep_images_are_used(folder):
    grey = np.random.default_rng(1).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(np.dstack([grey] * 4)).save(folder / "alpha.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(grey).convert("P").save(folder / "palette.gif")
    Image.fromarray(grey).convert("1").save(folder / "bilevel.png")
    Image.fromarray(np.dstack([grey] * 3)).convert("CMYK").save(folder / "print.jpg")
    photos = load_photos(folder, size=32, seed=0)
    assert photos.skipped == []
    assert len(photos.train) + len(photos.held_out) == 10
    assert all(photo.pixels.shape[0] == 3 for photo in photos.train)


def test_images_smaller_than_a_crop_are_enlarged_or_skipped_and_named(folder):
    Image.new("RGB", (40, 20)).save(folder / "small.png")
    Image.new("RGB", (500, 7)).save(folder / "thin.png")
    photos = load_photos(folder, size=32, seed=0)
    assert photos.enlarged == [("small.png", "40×20 enlarged to 64×32")]
    assert photos.skipped == [("thin.png", "500×7 is under a quarter of the 32 px crop")]
    assert all(photo.side >= 32 for photo in [*photos.train, *photos.held_out])


def test_a_file_without_read_permission_is_skipped_with_the_reason(folder, monkeypatch):
    real = builtins.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith("good_1.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refuse)
    assert load_photos(folder, size=32, seed=0).skipped == [("good_1.png", "Permission denied")]


def test_output_folder_with_a_file_in_the_way(tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("in the way")
    status, text = error_of(capsys, "--out", tmp_path / "out")
    assert status == 1
    assert f"--out must be a folder that can be written, got '{tmp_path}/out' (File exists)" in text
    status, text = error_of(capsys, "--out", tmp_path / "out" / "deeper")
    assert status == 1
    assert "(Not a directory)" in text


def test_output_folder_that_refuses_files_is_found_before_any_work(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(out, os.W_OK):
        # The superuser may write everywhere: let the probe's own call fail as it does for everybody else.
        from pathlib import Path

        def refuse(self, data):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "write_bytes", refuse)
    quickstart = importlib.import_module("fastgan.quickstart")
    monkeypatch.setattr(
        quickstart, "load_photos", lambda *a, **k: pytest.fail("work began before the folder was checked")
    )
    status, text = error_of(capsys, "--out", out)
    assert status == 1
    assert "(Permission denied)" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--minutes", "0"], "--minutes: must be a number above 0 and at most 10080, got '0'"),
        (["--minutes", "-1"], "--minutes: must be a number above 0 and at most 10080, got '-1'"),
        (["--minutes", "nan"], "got 'nan'"),
        (["--minutes", "soon"], "got 'soon'"),
        (["--minutes", "1e9"], "at most 10080, got '1e9'"),
        (["--steps", "0"], "--steps: must be a whole number at least 1 and at most 1e+07, got '0'"),
        (["--steps", "1.5"], "--steps: must be a whole number"),
        (["--steps", "5", "--minutes", "1"], "not allowed with argument"),
        (["--width", "0"], "--width: must be a whole number at least 4 and at most 128, got '0'"),
        (["--batch", "65"], "--batch: must be a whole number at least 1 and at most 64, got '65'"),
        (["--size", "100"], "--size: must be 32, 64, 128 or 256, got '100'"),
        (["--seed", "-3"], "--seed: must be a whole number at least 0"),
    ],
)
def test_options_out_of_range(capsys, words, expected):
    status, text = error_of(capsys, *words)
    assert status == 2
    assert expected in text


def test_resume_without_a_checkpoint(folder, tmp_path, capsys):
    words = ["--resume", "--steps", 1, "--size", 32, "--width", 4, "--data", folder, "--out", tmp_path / "out"]
    status, text = error_of(capsys, *words)
    assert status == 1
    assert f"--resume needs a checkpoint, got nothing at {tmp_path}/out/checkpoint.pt" in text


@pytest.mark.parametrize("module", ["PIL.Image", "rich", "safetensors", "jinja2"])
def test_missing_extra_is_named_before_any_work(tmp_path, capsys, monkeypatch, module):
    package = module.split(".")[0]

    def absent(name):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return importlib.import_module(name)

    monkeypatch.setattr(extras, "importlib", type("importlib", (), {"import_module": staticmethod(absent)}))
    status, text = error_of(capsys, "--out", tmp_path / "out")
    assert status == 1
    assert f"fastgan needs {package} for this, and it is not installed: pip install 'fastgan[train,report]'" in text
    assert not (tmp_path / "out").exists()


def test_missing_photographs_are_named_without_scikit_image(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="scikit-image is not installed: pip install"):
        load_photos(None, size=32, seed=0)


def test_scikit_image_without_its_photographs(monkeypatch, tmp_path):
    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec)
    with pytest.raises(
        ValueError, match=r"must be in .*data, got chelsea.png: No such file or directory; .* and 2 more"
    ):
        load_photos(None, size=32, seed=0)


def test_require_passes_on_errors_of_another_kind():
    assert require("math", "train").pi > 3
