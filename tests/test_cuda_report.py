"""The CUDA C++ kernels in the GPU report: what is read of the built library, what is wrong, what their calls move."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_kernels import cuda_code

from fastgan import _native
from fastgan._native import LibraryStatus, read_build_info
from fastgan.profile.cuda_cases import CASES, cuda_traffic
from fastgan.profile.cuda_code import read_library
from fastgan.profile.devices import device
from fastgan.profile.gpu_checks import check_cuda
from fastgan.profile.gpu_markdown import as_markdown
from fastgan.profile.gpu_report import make_report


def test_report_says_that_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = LibraryStatus(tmp_path / "libfastgan_cuda.so", "not built: no nvcc found")
    monkeypatch.setattr(_native, "load", lambda: {"cuda": missing})
    report = make_report([75], layers=[], launches=[], processes=1)
    assert not report.cuda and not report.cuda_traffic
    assert "There is no library of them here: not built: no nvcc found." in as_markdown(report)


def test_the_built_cuda_kernels_are_read() -> None:
    library = _native.load()["cuda"]
    if read_build_info()["cuda_reason"] is not None:
        assert not library.path.exists()
        return
    kernels = read_library(library.path)
    types = ("float", "__half", "__nv_bfloat16")
    assert {code.kernel for code in kernels} >= {f"sigma_kernel<{dtype}, true>" for dtype in types}
    assert all(code.threads % 32 == 0 and 32 <= code.threads <= 1024 and code.occupancy > 0 for code in kernels)
    assert any(code.code.widest_load == 128 for code in kernels)
    assert not check_cuda(kernels), "\n".join(map(str, check_cuda(kernels)))


def test_what_a_cuda_kernel_asks_for_must_fit() -> None:
    fits, spills, large = cuda_code(80), cuda_code(80, spills=2, stack=8), cuda_code(75, static_shared=65 * 1024)
    assert [(f.kind, f.arch) for f in check_cuda([fits, spills, large])] == [("spill", 80), ("launch", 75)]


def test_what_a_call_moves_beyond_each_tensor_once() -> None:
    planar, rows = cuda_traffic([case for case in CASES if case.op == "norm_act" and "256 at 64²" in case.name])
    once, again = planar.kernels["cuda"], rows.kernels["cuda"]
    assert (len(once), len(again)) == (1, 3)
    assert sum(k.bytes for k in again) - sum(k.bytes for k in once) == 256 * 64**2 * 2


def test_no_time_is_predicted_where_the_instructions_are_missing() -> None:
    (entry,) = cuda_traffic([case for case in CASES if case.op == "modulated_conv2d"][:1])
    assert not entry.runs_on("cuda", device("T4"))
    assert entry.runs_on("triton", device("T4")) and entry.runs_on("cuda", device("A100"))
