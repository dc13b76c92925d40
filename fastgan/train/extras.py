"""Optional dependencies: imported on first use, with a message that says which extra brings them."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """An optional dependency is not installed; the text says what to install."""


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``.

    Args:
        module: dotted name, such as "PIL.Image".
        extra: the extra of fastgan that installs it, "train" or "report".

    Raises:
        MissingExtra: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).split(".")[0]
        raise MissingExtra(
            f"fastgan needs {package} for this, and it is not installed: pip install 'fastgan[train,report]' "
            f"({package} is part of the extra {extra!r})"
        ) from error
