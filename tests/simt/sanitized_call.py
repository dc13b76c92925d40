"""One call of a kernel under AddressSanitizer and UBSan, in a process of its own: the first report ends it.

``python sanitized_call.py LIBRARY FUNCTION BUG`` calls a kernel of planted.cpp; without the two, the library is
that of spectral_sigma.cpp, and its kernel is checked against NumPy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import simt_build


def planted(module: ModuleType, function: str, bug: str) -> None:
    x = np.random.default_rng(0).standard_normal(64, dtype=np.float32)
    simt_build.run(module, function, x, np.zeros(128, np.float32), bool(int(bug)))


def spectral_sigma(module: ModuleType) -> None:
    """One iteration in both orders; the second weight has several blocks."""
    generator = np.random.default_rng(0)
    weights = [generator.standard_normal(shape, dtype=np.float32) for shape in ((13, 7, 3), (96, 40, 9), (1, 5, 1))]
    shapes = [n for w in weights for n in (3, 0, *w.shape, *(stride // 4 for stride in w.strides))]
    us = [generator.standard_normal(w.shape[0], dtype=np.float32) for w in weights]
    vs = [generator.standard_normal(w.shape[1] * w.shape[2], dtype=np.float32) for w in weights]
    results = np.empty(3, np.float32), np.empty(sum(map(len, us)), np.float32), np.empty(sum(map(len, vs)), np.float32)
    for hook in (False, True):
        simt_build.run(module, "float32", weights, shapes, us, vs, 1, hook, 1e-12, *results)
        for weight, u, v, sigma in zip(weights, us, vs, results[0], strict=True):
            matrix = weight.reshape(len(u), len(v)).astype(np.float64)
            first = matrix.T @ u if hook else matrix @ v
            first /= np.linalg.norm(first)
            np.testing.assert_allclose(sigma, np.linalg.norm(matrix @ first if hook else matrix.T @ first), rtol=1e-5)


def main(library: str, *arguments: str) -> None:
    module = simt_build.import_library(Path(library))
    planted(module, *arguments) if arguments else spectral_sigma(module)
    print("came to its end")


if __name__ == "__main__":
    main(*sys.argv[1:])
