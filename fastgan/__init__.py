"""fastgan: fused layers, proof of parity and latency, and a trainer for one-pass image generators."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastgan.backends import backend, explain, precision

if TYPE_CHECKING:
    import os
    from types import ModuleType

    import torch

__version__ = "0.1.0"
__all__ = ["backend", "explain", "load", "precision", "__version__"]


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> torch.nn.Module:
    """Rebuild a generator that fastgan saved (``.safetensors`` or ``.pth``), in eval mode; see models.saved.load.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a generator saved by fastgan, or its weights do not fit the model that it names.
    """
    # Imported here: models bring in every layer, and ``import fastgan`` should not.
    from fastgan.models import saved

    return saved.load(path, device=device)


def __getattr__(name: str) -> ModuleType:
    """``fastgan.ops`` and its siblings, imported on first use."""
    if name in ("infer", "models", "nn", "ops", "profile", "train"):
        return importlib.import_module(f"fastgan.{name}")
    raise AttributeError(f"module 'fastgan' has no attribute {name!r}")
