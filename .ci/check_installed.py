"""Checks an installed fastgan: it lies under FASTGAN_PREFIX, its C++ is loaded unless FASTGAN_BUILD_CPP=0 left it out,
and an op runs on it and is right."""

import os
from pathlib import Path

import torch

import fastgan
import fastgan.kernels
import fastgan.ops
from fastgan import _native

prefix = Path(os.environ["FASTGAN_PREFIX"]).resolve()
for module in (fastgan, fastgan.kernels):
    assert prefix in Path(module.__file__).resolve().parents, f"{module.__name__} comes from {module.__file__}"
left_out = os.environ.get("FASTGAN_BUILD_CPP") == "0"
reason = _native.load()["cpu"].reason
assert reason == ("not built: FASTGAN_BUILD_CPP=0" if left_out else None), reason
backend = "reference" if left_out else "cpp"
if not left_out:
    assert _native.probe("cpu")

torch.manual_seed(0)
x, weight = torch.randn(2, 8, 9, 7), torch.randn(4, 8, 3, 3)
scale = torch.rand(2, 8)
got = fastgan.ops.scaled_conv2d(x, weight, scale, padding=1)
want = torch.nn.functional.conv2d(x * scale[:, :, None, None], weight, padding=1)
torch.testing.assert_close(got, want)
assert fastgan.explain("scaled_conv2d", x, weight, scale, padding=1).backend == backend
print(f"fastgan {fastgan.__version__} from {fastgan.__file__}: scaled_conv2d runs on {backend} and is right")
