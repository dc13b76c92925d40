"""Makes ``fastgan.kernels`` the folder kernels/ in a checkout, where it lies beside fastgan/ and not inside.

A wheel has the folder itself at ``fastgan/kernels/`` and not this file.
"""

import importlib.util
import sys
from pathlib import Path

_folder = Path(__file__).resolve().parent.parent / "kernels"
_spec = importlib.util.spec_from_file_location(
    __name__, _folder / "__init__.py", submodule_search_locations=[str(_folder)]
)
_package = importlib.util.module_from_spec(_spec)
# The import system hands out what sys.modules holds once this file has run.
sys.modules[__name__] = _package
_spec.loader.exec_module(_package)
