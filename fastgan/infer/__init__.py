"""The inference engine: fold, fuse, plan, run. :func:`optimize` makes a trained generator fast; :func:`load` reads one
that was saved."""

from fastgan.infer.engine import FastGenerator, load, optimize
from fastgan.infer.report import Memory, Report
from fastgan.infer.verify import Mismatch

__all__ = ["FastGenerator", "Memory", "Mismatch", "Report", "load", "optimize"]
