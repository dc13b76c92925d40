"""``python -m bench.cpu_targets [README.md]``: measure what the CPU kernels are to reach; a table of met and missed.

The rows go to bench/results/ like every bench's; the table is made of the newest row of each target there. With
``--table`` nothing is measured. ``make bench-cpu`` runs all of it.
"""

from __future__ import annotations

from bench.cpu_cases import TARGETS
from bench.targets import run

if __name__ == "__main__":
    run("cpu_targets", __doc__.splitlines()[0], TARGETS)
