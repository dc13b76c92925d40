"""Photographs, drawings and crops: what is read and what is skipped; crops depend on (seed, step) alone."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.train import data
from fastgan.train.data import CropSampler, grid_crops, load_photos
from fastgan.train.images import UnreadableImage, find_images, read_photo
from fastgan.train.sketch import draw, gaussian_blur


@pytest.fixture
def folder(tmp_path):
    """Four sound colour images, 80×64 and up."""
    rng = np.random.default_rng(0)
    for index in range(4):
        pixels = rng.integers(0, 256, (64 + index, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photo_{index}.png")
    return tmp_path


def test_bundled_photographs_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    photos = load_photos(None, size=64, seed=0)
    assert not photos.skipped
    assert {photo.name for photo in photos.held_out} == {"camera.png", "chelsea.png"}
    assert not {photo.name for photo in photos.train} & {photo.name for photo in photos.held_out}
    assert all(photo.credit for photo in [*photos.train, *photos.held_out])


def test_the_stereo_pair_is_on_one_side_of_the_split():
    sides = {entry.held_out for entry in data.BUNDLED if entry.file.startswith("motorcycle")}
    assert len(sides) == 1


def test_mean_colour_weighs_photographs_equally(folder):
    photos = load_photos(folder, size=32, seed=0)
    expected = np.mean([photo.pixels.numpy().reshape(3, -1).mean(1) for photo in photos.train], axis=0) / 255
    torch.testing.assert_close(photos.mean_colour(), torch.tensor(expected).float())


def test_crops_depend_on_seed_and_step_alone(folder):
    photos = load_photos(folder, size=32, seed=0)
    make = lambda seed: CropSampler(photos.train, size=32, batch=3, seed=seed)  # noqa: E731
    straight = make(5)
    for step in range(3):
        straight.batch(step)
    torch.manual_seed(123)
    fresh = make(5).batch(3)
    assert torch.equal(straight.batch(3).photo, fresh.photo)
    assert torch.equal(straight.batch(3).sketch, fresh.sketch)
    assert not torch.equal(fresh.photo, make(5).batch(4).photo)
    assert not torch.equal(fresh.photo, make(6).batch(3).photo)


def test_calibration_crops_repeat_and_are_no_training_step(folder):
    sampler = CropSampler(load_photos(folder, size=32, seed=0).train, size=32, batch=8, seed=0)
    first, again = next(sampler.calibration()), next(sampler.calibration())
    assert torch.equal(first, again)
    assert not torch.equal(first, sampler.batch(0).sketch)


def test_crops_cover_scales_and_flips():
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256).contiguous()
    sampler = CropSampler([data.Photo("ramp", ramp)], size=32, batch=64, seed=0)
    photo = sampler.batch(0).photo[:, 0, 16]
    rise = (photo[:, -1] - photo[:, 0]) * 127.5
    # Along the ramp, a crop's rise is its side in pixels and its sign says whether it was flipped.
    assert (rise > 0).any()
    assert (rise < 0).any()
    assert rise.abs().min() < 45
    assert rise.abs().max() > 180


def test_pairs_are_aligned_and_in_range(folder):
    pairs = CropSampler(load_photos(folder, size=32, seed=0).train, size=32, batch=2, seed=0).batch(0)
    assert pairs.sketch.shape == (2, 1, 32, 32)
    assert pairs.photo.shape == (2, 3, 32, 32)
    assert pairs.photo.min() >= -1
    assert pairs.photo.max() <= 1
    torch.testing.assert_close(draw((pairs.photo + 1) / 2) * 2 - 1, pairs.sketch)


def test_drawing_is_paper_on_flat_light_grey_on_dark_and_a_line_at_an_edge():
    photo = torch.full((1, 3, 64, 64), 0.9)
    assert draw(photo).min() > 0.99
    assert draw(torch.full((1, 3, 64, 64), 0.05)).sub(0.75).abs().max() < 0.02
    photo[..., 32:] = 0.6
    drawing = draw(photo)[0, 0, 32]
    assert drawing[30:36].min() < 0.8
    assert drawing[:20].min() > 0.95
    assert drawing[45:].min() > 0.95


def test_gaussian_blur_keeps_the_mean_and_agrees_with_a_convolution():
    x = torch.rand(2, 1, 40, 56, generator=torch.Generator().manual_seed(0))
    taps = torch.exp(-torch.arange(-4, 5).square() / (2 * 1.2**2))
    kernel = (taps / taps.sum()).view(1, 1, 1, -1)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4), mode="reflect")
    expected = torch.nn.functional.conv2d(torch.nn.functional.conv2d(padded, kernel), kernel.mT)
    torch.testing.assert_close(gaussian_blur(x, 1.2), expected)


def test_folder_split_is_by_whole_images_and_repeats(folder):
    first, again = (load_photos(folder, size=32, seed=0) for _ in range(2))
    assert [photo.name for photo in first.held_out] == [photo.name for photo in again.held_out]
    assert first.fingerprint() == again.fingerprint()
    assert len(first.held_out) == 1
    assert len(first.train) == 3
    splits = {load_photos(folder, size=32, seed=seed).held_out[0].name for seed in range(8)}
    assert len(splits) > 1


def test_fingerprint_sees_one_changed_pixel(folder):
    before = load_photos(folder, size=32, seed=0).fingerprint()
    pixels = np.array(Image.open(folder / "photo_2.png"))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "photo_2.png")
    assert load_photos(folder, size=32, seed=0).fingerprint() != before


def test_subfolders_and_suffixes_in_capitals_are_found_and_hidden_files_are_not(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "photo_0.png").rename(folder / "deep" / "er" / "PHOTO.PNG")
    (folder / "._photo_1.png").write_bytes(b"resource fork")
    (folder / "notes.txt").write_text("not an image")
    names = [path.name for path in find_images(folder)]
    assert names == ["PHOTO.PNG", "photo_1.png", "photo_2.png", "photo_3.png"]


def test_memory_budget_leaves_images_unread_and_says_so(folder, monkeypatch):
    monkeypatch.setattr(data, "PIXEL_BUDGET", 2 * 64 * 80 * 3)
    photos = load_photos(folder, size=32, seed=0)
    assert len(photos.train) + len(photos.held_out) == 2
    assert photos.notes == [
        "2 of 4 images were not read: the first 2, in an order drawn from the seed, fill the 0 MiB kept for pixels"
    ]


def test_large_images_are_shrunk_on_reading(tmp_path):
    Image.new("RGB", (900, 600), "red").save(tmp_path / "large.jpg")
    photo = read_photo(tmp_path / "large.jpg", "large.jpg", max_side=128)
    assert tuple(photo.pixels.shape) == (3, 128, 192)


def _saved(path, array, mode=None):
    Image.fromarray(array, mode).save(path) if mode else Image.fromarray(array).save(path)
    return read_photo(path, path.name)


def test_greyscale_becomes_three_equal_channels(tmp_path):
    photo = _saved(tmp_path / "grey.png", np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert photo.pixels.shape == (3, 8, 8)
    assert (photo.pixels == torch.arange(64).view(8, 8)).all()


def test_alpha_is_laid_on_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (200, 10, 30, 255)
    rgba[2:] = (200, 10, 30, 0)
    photo = _saved(tmp_path / "alpha.png", rgba)
    assert photo.pixels[:, 0, 0].tolist() == [200, 10, 30]
    assert photo.pixels[:, 3, 0].tolist() == [255, 255, 255]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    assert _saved(tmp_path / "deep.png", values).pixels[0, 0].tolist() == [0, 1, 128, 255]


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "palette.png", transparency=1)
    photo = read_photo(tmp_path / "palette.png", "palette.png")
    assert photo.pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert photo.pixels[:, 0, 1].tolist() == [255, 255, 255]


def test_orientation_tag_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by a quarter turn to show upright
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert tuple(read_photo(tmp_path / "turned.jpg", "turned.jpg").pixels.shape) == (3, 40, 20)


def test_floating_point_pixels_are_refused_with_the_reason(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UnreadableImage, match="floating-point pixels have no known white"):
        read_photo(tmp_path / "float.tif", "float.tif")


def test_grid_crops_repeat_and_take_photographs_in_turn(folder):
    photos = load_photos(folder, size=16, seed=0)
    pairs, names = grid_crops(photos.train, size=16, most=6)
    again, _ = grid_crops(photos.train, size=16, most=6)
    assert pairs.photo.shape == (6, 3, 16, 16)
    assert torch.equal(pairs.photo, again.photo)
    assert names[:3] == [photo.name for photo in photos.train]
