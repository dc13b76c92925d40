"""How many cases are drawn: FASTGAN_FUZZ_CASES, 500 where it is not set and 4,000 in ``make fuzz``.

500 are the same at every run, so that a change fails where it was made; ``make fuzz`` draws new ones each time, begins
with what failed last, and prints for a failure the call and hypothesis' own key to it.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

DEFAULT = 500
CASES = int(os.environ.get("FASTGAN_FUZZ_CASES", DEFAULT))


def share(percent: float) -> settings:
    """hypothesis' settings for a test that draws ``percent`` of all cases."""
    return settings(
        max_examples=max(1, round(CASES * percent / 100)),
        derandomize=CASES == DEFAULT,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
