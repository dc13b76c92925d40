"""fastgan: fused layers, proof of parity and latency, and a trainer for one-pass image generators."""

from fastgan.backends import backend, explain

__version__ = "0.1.0"
__all__ = ["backend", "explain", "__version__"]
