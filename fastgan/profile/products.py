"""Which matrix products a kernel asks for: Triton's IR names their element type and the precision of their inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator

_DOT = re.compile(r"tt\.dot(?:_scaled)? .* : tensor<[\dx]+x(\w+)[,>]")
_PRECISION = re.compile(r"inputPrecision = (\w+)")


def products(ttir: str) -> Iterator[tuple[str, str]]:
    """(element type, input precision) of each product, as :class:`fastgan.profile.compiled.Compiled` has them."""
    for line in ttir.splitlines():
        product = _DOT.search(line)
        if product is not None:
            precision = _PRECISION.search(line)
            yield product.group(1), precision.group(1) if precision else "ieee"
