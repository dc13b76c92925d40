"""Generators on disk: weights with the name and arguments of their class, so that one call rebuilds them."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

# The metadata entry (safetensors) or dictionary key (.pth) that describes the model.
KEY = "fastgan_model"


def describe(name: str, arguments: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """What is stored beside the weights: a class of fastgan.models, its keyword arguments, and facts for people."""
    return {"class": name, "arguments": arguments, **facts}


def write_safetensors(file: BinaryIO, state: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Weights and description as one safetensors file. Needs safetensors."""
    from safetensors.torch import save

    file.write(save({key: value.contiguous() for key, value in state.items()}, {KEY: json.dumps(description)}))


def write_pth(file: BinaryIO, state: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Weights and description as torch.save writes them: {"fastgan_model": ..., "state_dict": ...}."""
    torch.save({KEY: description, "state_dict": state}, file)


def load(path: str | Path, *, device: torch.device | str = "cpu") -> nn.Module:
    """Rebuild a generator that ``fastgan quickstart`` saved.

    Args:
        path: a ``.safetensors`` or ``.pth`` file. Nothing in it is executed.
        device: where the weights go.

    Returns:
        The model in eval mode. It has no part of the training left in it; ``.train()`` and go on is fine.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a generator saved by fastgan, or its weights do not fit the model that it names.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: path must be a saved generator, got {str(path)!r} (no such file)")
    description, state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pth(path)
    from fastgan import models

    names = sorted(models.__all__)
    if description.get("class") not in names:
        raise ValueError(
            f"load: {path} must name one of fastgan.models ({', '.join(names)}), got {description.get('class')!r}"
        )
    try:
        model = getattr(models, description["class"])(**description["arguments"])
        model.load_state_dict(state)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"load: the weights in {path} must fit {description['class']}: {error}") from error
    return model.to(device).eval()


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise ValueError(f"load: {path} must carry {KEY!r} in its metadata, got {sorted(metadata) or 'none'}")
            return json.loads(metadata[KEY]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"load: {path} must be a safetensors file, got one that cannot be read: {error}") from error


def read_archive(path: Path) -> Any:
    """What torch.save wrote to ``path``: tensors and plain values only, on the CPU. Nothing in it is executed.

    Raises:
        ValueError: with the reason, if it is another kind of file, damaged, or holds more than that.
    """
    # torch takes any file that is no archive for its old format, and then raises whatever the bytes lead to.
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not a complete archive of torch.save")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(str(error).strip().splitlines()[0]) from error


def _read_pth(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        stored = read_archive(path)
    except ValueError as error:
        raise ValueError(
            f"load: {path} must be a file that torch.save wrote, got one that cannot be read: {error}"
        ) from error
    if not isinstance(stored, dict) or KEY not in stored:
        raise ValueError(f"load: {path} must hold {KEY!r} beside its weights, got a file that fastgan did not save")
    return stored[KEY], stored["state_dict"]
