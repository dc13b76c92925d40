"""Photographs for the sketch -> photo task: sources, what is held out, crops that depend on (seed, step) alone."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.train.extras import MissingExtra
from fastgan.train.images import Photo, UnreadableImage, find_images, read_photo
from fastgan.train.sketch import draw

# Of a folder's images, one in ten is held out, and never none.
HELD_OUT_SHARE = 0.1
# Decoded pixels that are kept in memory (uint8). With the shorter side at MAX_SIDE this is several hundred photographs.
PIXEL_BUDGET = 512 * 2**20
# Crops are at most this many times the training size: more detail than that is averaged away by the resize.
MAX_SCALE = 4
# 96 crops fix a mean and a variance to a few percent, which is finer than what training itself jitters.
CALIBRATION_BATCHES, CALIBRATION_BATCH = 12, 8
# An image may be enlarged this much to fill a crop; beyond that there is nothing in it to learn.
MAX_ENLARGE = 4


@dataclass(frozen=True)
class Bundled:
    """One photograph in scikit-image's wheel. ``held_out``: it is never trained on."""

    file: str
    credit: str
    held_out: bool = False


# The photographs in the wheel that suit the task. Left out are diagrams, silhouettes, scans of text, microscopy and the
# sky, and, from training only, greyscale: with textures of grass, gravel and brick among them, the answer that
# minimises L1 is grey for everything. Licences as scikit-image documents them in skimage.data. The two motorcycles are
# a stereo pair and stay together.
BUNDLED = (
    Bundled("chelsea.png", "Chelsea the cat. Stefan van der Walt, CC0", held_out=True),
    Bundled("camera.png", "Lav Varshney, CC0", held_out=True),
    Bundled("astronaut.png", "Eileen Collins. NASA Great Images, public domain"),
    Bundled("coffee.png", "Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0"),
    Bundled("motorcycle_left.png", "Middlebury stereo benchmark, D. Scharstein et al., 2014"),
    Bundled("rocket.jpg", "Falcon 9 with DSCOVR. SpaceX, public domain"),
    Bundled("motorcycle_right.png", "Middlebury stereo benchmark, D. Scharstein et al., 2014"),
)


@dataclass
class PhotoSet:
    """Decoded photographs, split by whole images, and what was left out or altered (name, why)."""

    source: str
    train: list[Photo]
    held_out: list[Photo]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    enlarged: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """A hash of every pixel and of the split: equal where training sees the same data."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.held_out):
            for photo in part:
                digest.update(f"{photo.name} {tuple(photo.pixels.shape)}\n".encode())
                digest.update(photo.pixels.permute(1, 2, 0).contiguous().numpy())
            digest.update(b"--\n")
        return digest.hexdigest()

    def mean_colour(self) -> Tensor:
        """The training photographs' mean sRGB colour [3] in [0, 1], each photograph counting the same."""
        means = [photo.pixels.to(torch.float64).mean((1, 2)) for photo in self.train]
        return (torch.stack(means).mean(0) / 255).float()


def load_photos(
    folder: str | Path | None, *, size: int, seed: int, on_file: Callable[[str], None] | None = None
) -> PhotoSet:
    """The photographs of ``folder``, or those in scikit-image's wheel when it is None. Nothing is downloaded.

    Args:
        folder: any folder, searched with its subfolders.
        size: crop size in pixels; smaller images are enlarged to it, and skipped if that is more than four times.
        seed: chooses which images of a folder are held out.
        on_file: called with each file's name before it is read.

    Raises:
        ValueError: the folder does not exist, is not a folder, or holds fewer than two usable images.
        MissingExtra: Pillow or scikit-image is not installed.
    """
    if folder is None:
        return _load_bundled(size, on_file)
    return _load_folder(Path(folder), size, seed, on_file)


def _load_bundled(size: int, on_file: Callable[[str], None] | None) -> PhotoSet:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise MissingExtra(
            "fastgan quickstart trains on the photographs in scikit-image's wheel, and scikit-image is not installed: "
            "pip install 'fastgan[train,report]', or give a folder of your own with --data"
        )
    # The files are opened by path: skimage.data's own functions would go to the network for one that is missing.
    home = Path(spec.origin).parent / "data"
    photos = PhotoSet("photographs in scikit-image's wheel", [], [])
    for entry in BUNDLED:
        photo = _read_usable(home / entry.file, entry.file, entry.credit, size, photos, on_file)
        if photo is not None:
            (photos.held_out if entry.held_out else photos.train).append(photo)
    if not photos.train or not photos.held_out:
        raise ValueError(
            f"quickstart: scikit-image's photographs must be in {home}, got {_listed(photos.skipped)}; "
            "reinstall scikit-image from its wheel, or give a folder of your own with --data"
        )
    return photos


def _load_folder(folder: Path, size: int, seed: int, on_file: Callable[[str], None] | None) -> PhotoSet:
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing there"
        raise ValueError(f"quickstart: --data must be a folder of images, got {str(folder)!r} ({got})")
    paths = find_images(folder)
    photos = PhotoSet(f"images in {folder}", [], [])
    # Read in seeded order, so that the memory budget cuts a random part and not the end of the alphabet.
    order = np.random.default_rng([seed, 0]).permutation(len(paths))
    kept: list[Photo] = []
    budget = PIXEL_BUDGET
    for rank, index in enumerate(order):
        if budget <= 0:
            photos.notes.append(
                f"{len(order) - rank} of {len(order)} images were not read: the first {rank}, in an order drawn from "
                f"the seed, fill the {PIXEL_BUDGET >> 20} MiB kept for pixels"
            )
            break
        name = paths[index].relative_to(folder).as_posix()
        photo = _read_usable(paths[index], name, "", size, photos, on_file)
        if photo is not None:
            kept.append(photo)
            budget -= photo.pixels.numel()
    if len(kept) < 2:
        others = sum(1 for path in folder.rglob("*") if path.is_file()) - len(paths)
        raise ValueError(
            f"quickstart: --data must hold at least 2 usable images (one is held out), got {len(kept)} in "
            f"{str(folder)!r} ({len(paths)} image files, {others} other files{_listed(photos.skipped, '; skipped ')})"
        )
    held_out = max(1, round(HELD_OUT_SHARE * len(kept)))
    photos.held_out, photos.train = kept[:held_out], kept[held_out:]
    return photos


def _listed(skipped: Sequence[tuple[str, str]], prefix: str = "", most: int = 5) -> str:
    if not skipped:
        return ""
    more = f" and {len(skipped) - most} more" if len(skipped) > most else ""
    return prefix + "; ".join(f"{name}: {reason}" for name, reason in skipped[:most]) + more


def _read_usable(
    path: Path, name: str, credit: str, size: int, photos: PhotoSet, on_file: Callable[[str], None] | None
) -> Photo | None:
    """Read one photograph, enlarged if it is smaller than a crop; None if it was skipped (noted in ``photos``)."""
    if on_file is not None:
        on_file(name)
    try:
        photo = read_photo(path, name, credit, max_side=MAX_SCALE * size)
    except UnreadableImage as error:
        photos.skipped.append((name, str(error)))
        return None
    height, width = photo.pixels.shape[1:]
    if photo.side * MAX_ENLARGE < size:
        photos.skipped.append((name, f"{width}×{height} is under a quarter of the {size} px crop"))
        return None
    if photo.side >= size:
        return photo
    scale = size / photo.side
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    larger = F.interpolate(photo.pixels[None].float(), size=target, mode="bicubic", align_corners=False)
    photos.enlarged.append((name, f"{width}×{height} enlarged to {target[1]}×{target[0]}"))
    pixels = larger[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return Photo(name, pixels, credit)


@dataclass(frozen=True)
class Pairs:
    """Aligned pairs in [-1, 1]: ``sketch`` [N, 1, S, S] (1 is paper), ``photo`` [N, 3, S, S]."""

    sketch: Tensor
    photo: Tensor


def make_pairs(crops: Tensor) -> Pairs:
    """Pairs from photograph crops [N, 3, S, S] in [0, 1]."""
    return Pairs(draw(crops) * 2 - 1, crops * 2 - 1)


def _cut(photo: Photo, top: int, left: int, side: int, size: int) -> Tensor:
    """A square crop [1, 3, size, size] in [0, 1], shrunk with antialiasing."""
    crop = photo.pixels[None, :, top : top + side, left : left + side]
    if side != size:
        # On 8-bit pixels: torch's antialiased resize is several times faster there than on float.
        crop = F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return crop.float() / 255


class CropSampler:
    """Random training crops: a photograph, a scale between the crop size and the whole, a place and a flip.

    Step k's batch is a function of (seed, k) alone, so a resumed run sees what an uninterrupted one would.
    """

    def __init__(self, photos: Sequence[Photo], *, size: int, batch: int, seed: int) -> None:
        """``size`` in pixels; every photograph's shorter side is at least that."""
        self.photos, self.size, self.batch_size, self.seed = list(photos), size, batch, seed

    def batch(self, step: int) -> Pairs:
        """The pairs of one step, from 0 on."""
        rng = np.random.default_rng([self.seed, 1, step])
        return make_pairs(torch.cat([self._draw_crop(rng) for _ in range(self.batch_size)]))

    def calibration(self) -> Iterator[Tensor]:
        """Drawings for :func:`fastgan.train.pix2pix.recalibrate`: the same ones every time, none of them a step's."""
        for index in range(CALIBRATION_BATCHES):
            rng = np.random.default_rng([self.seed, 2, index])
            yield make_pairs(torch.cat([self._draw_crop(rng) for _ in range(CALIBRATION_BATCH)])).sketch

    def _draw_crop(self, rng: np.random.Generator) -> Tensor:
        photo = self.photos[rng.integers(len(self.photos))]
        height, width = photo.pixels.shape[1:]
        # Log-uniform: half as many crops at twice the scale, as objects come at all distances.
        side = round(math.exp(rng.uniform(math.log(self.size), math.log(photo.side))))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        crop = _cut(photo, int(top), int(left), side, self.size)
        return crop.flip(-1) if rng.random() < 0.5 else crop


def grid_crops(photos: Sequence[Photo], *, size: int, most: int) -> tuple[Pairs, list[str]]:
    """The same crops every time, for evaluation: of each photograph the widest squares, then a grid at half that scale.

    Args:
        photos: photographs whose shorter side is at least ``size``.
        size: crop size in pixels.
        most: at most this many crops, taken from the photographs in turn.

    Returns:
        The pairs and, for each, the photograph's name.
    """
    per_photo = [list(_grid(photo, size)) for photo in photos]
    crops, names = [], []
    for turn in range(max(map(len, per_photo))):
        for photo, places in zip(photos, per_photo, strict=True):
            if turn < len(places) and len(crops) < most:
                crops.append(_cut(photo, *places[turn], size))
                names.append(photo.name)
    return make_pairs(torch.cat(crops)), names


def _grid(photo: Photo, size: int) -> Iterator[tuple[int, int, int]]:
    height, width = photo.pixels.shape[1:]
    sides = [photo.side] if photo.side < 2 * size else [photo.side, photo.side // 2]
    for side in sides:
        for top in _starts(height, side):
            for left in _starts(width, side):
                yield top, left, side


def _starts(length: int, side: int) -> list[int]:
    count = math.ceil(length / side)
    return [0] if count == 1 else [round(i * (length - side) / (count - 1)) for i in range(count)]
