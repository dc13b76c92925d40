"""One call of a kernel in a process of its own, under AddressSanitizer: ``python sanitized_call.py LIBRARY FUNCTION BUG``.

The first report ends the process. test_simt_sanitized.py says which functions there are and what they take.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import simt_build


def main(library: str, function: str, bug: str) -> None:
    module = simt_build.import_library(Path(library))
    x = np.random.default_rng(0).standard_normal(64, dtype=np.float32)
    simt_build.run(module, function, x, np.zeros(128, np.float32), bool(int(bug)))
    print("came to its end")


if __name__ == "__main__":
    main(*sys.argv[1:])
