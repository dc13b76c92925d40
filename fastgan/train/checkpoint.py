"""Checkpoints that a crash or a full disk cannot damage: written beside the last one, synced, then renamed over it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastgan.models.saved import read_archive

FORMAT = "fastgan.pix2pix"
VERSION = 1


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes ``path``'s place only once it is complete and on the disk.

    Raises:
        OSError: with the errno of what failed and ``path``; what was at ``path`` before is untouched.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        cause = _disk_error(error)
        if cause is None:
            raise
        kept = "; what was there before is untouched" if path.exists() else ""
        raise OSError(cause.errno, f"cannot write {path}: {cause.strerror}{kept}") from error


def _disk_error(error: BaseException) -> OSError | None:
    """The OSError behind ``error``: torch.save buries a full disk under a RuntimeError about file positions."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable: without this a power cut can bring the old name back, or neither."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) atomically.

    Raises:
        OSError: for example on a full disk; the checkpoint that was there is untouched.
    """
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **state}, file)


def load_checkpoint(path: Path, *, config: dict[str, Any], data: str) -> dict[str, Any]:
    """Read a checkpoint that goes on with the run that ``config`` and ``data`` describe. Nothing in it is executed.

    Args:
        path: the file.
        config: the run's configuration, as plain values.
        data: the fingerprint of the photographs.

    Raises:
        ValueError: it is not such a checkpoint, or belongs to another configuration or other photographs; the text
            names what differs.
    """
    if not path.is_file():
        raise ValueError(f"quickstart: --resume needs a checkpoint, got nothing at {path}")
    try:
        state = read_archive(path)
    except ValueError as error:
        raise ValueError(
            f"quickstart: {path} must be a checkpoint of fastgan, got a file that cannot be read: {error}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"quickstart: {path} must be a checkpoint of `fastgan quickstart`, got something else")
    if state["version"] != VERSION:
        raise ValueError(f"quickstart: {path} must have format version {VERSION}, got {state['version']}")
    if state["config"] != config:
        differing = [
            f"{key} = {config.get(key)!r}, got {state['config'].get(key)!r}"
            for key in {**config, **state["config"]}
            if config.get(key) != state["config"].get(key)
        ]
        raise ValueError(
            f"quickstart: checkpoint {path} must have {'; '.join(differing)}; give the same options, or another --out"
        )
    if state["data"] != data:
        raise ValueError(
            f"quickstart: checkpoint {path} must come from these photographs (fingerprint {data}), got "
            f"{state['data']}: the files or the split changed since; train anew in another --out"
        )
    return state
