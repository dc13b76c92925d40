"""Reads photographs: any mode that Pillow knows into 8-bit RGB, and a reason for every file that it cannot read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgan.train.extras import require

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pnm", ".jp2")
)

# What Pillow raises for a file that is damaged, or not what its name says (SyntaxError: a broken PNG).
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError)


class UnreadableImage(Exception):
    """A file that cannot become a photograph; the text is the reason, without the file's name."""


@dataclass(frozen=True)
class Photo:
    """One decoded image. ``pixels``: uint8 [3, H, W], sRGB, channels last in memory, as torch resizes fastest."""

    name: str
    pixels: Tensor = field(repr=False)
    credit: str = ""

    @property
    def side(self) -> int:
        """The shorter side in pixels: the largest square crop."""
        return min(self.pixels.shape[1:])


def read_photo(path: Path, name: str, credit: str = "", *, max_side: int | None = None) -> Photo:
    """Decode one file. Orientation tags are applied, transparency is laid on white, deeper than 8 bits is scaled down.

    Args:
        path: the file.
        name: what reports call it.
        credit: its author and licence, for the report.
        max_side: shrink so that the shorter side is at most this many pixels; None keeps the size.

    Raises:
        UnreadableImage: with the reason, if the file is missing, truncated or of a kind that has no photograph in it.
    """
    image_module = require("PIL.Image", "train")
    try:
        with image_module.open(path) as image:
            if max_side is not None:
                image.draft("RGB", (2 * max_side, 2 * max_side))
            image.load()
            image = require("PIL.ImageOps", "train").exif_transpose(image)
            image = _to_rgb(image, image_module)
    except (*_DECODE_ERRORS, image_module.DecompressionBombError) as error:
        raise UnreadableImage(_reason(error, path)) from error
    if max_side is not None and min(image.size) > max_side:
        scale = max_side / min(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        image = image.resize(size, image_module.Resampling.LANCZOS)
    return Photo(name, torch.from_numpy(np.array(image)).permute(2, 0, 1), credit)


def _reason(error: BaseException, path: Path) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or type(error).__name__
    # Pillow repeats the whole path in its text; the caller names the file already.
    return str(error).replace(repr(str(path)), "it").replace(str(path), "it") or type(error).__name__


def _to_rgb(image, image_module):
    """``image`` as 8-bit RGB. Pillow's own convert clips 16-bit grey to white and shows colours under full alpha."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integer pixels outside 0..65535 have no known white")
        return image_module.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known white")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        paper = image_module.new("RGBA", rgba.size, "white")
        return image_module.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")


def find_images(folder: Path) -> list[Path]:
    """Every file under ``folder`` that is an image by its suffix, sorted by path: the same order everywhere."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted((path for path in paths if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())
