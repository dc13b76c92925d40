"""gpu-check is right the first time that it meets a GPU: every branch that can be tried without one is tried here."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import gpu_bench, gpu_check  # noqa: E402
from bench.cases import Case  # noqa: E402
from fastgan import ops  # noqa: E402
from fastgan.profile import latency  # noqa: E402

CASES = """
import os
import torch
from bench.cases import Case
from fastgan import ops

def inputs():
    return [torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(3, requires_grad=True)]

def eager(x, b):
    return torch.relu(x + b[:, None, None])

def fused(x, b):
    return ops.bias_act(x, b, act="relu", gain=1.0)

def raises(x, b):
    raise RuntimeError("no such kernel image")

def dies(x, b):
    os._exit(7)

def case(name, function):
    return Case("bias_act", name, inputs, {"eager": eager, "fused": function})

CASES = [case("good", fused), case("raises", raises), case("dies", dies), case("good again", fused)]
"""
TESTS = {
    "test_good.py": "import pytest\n\n@pytest.mark.parametrize('i', range(3))\ndef test_it(i): pass\n",
    "test_bad.py": "def test_it(): assert 1 + 1 == 3, 'wrong sum'\n\ndef test_fine(): pass\n",
    "test_crash.py": "import os\n\ndef test_it(): os._exit(9)\n",
    "test_device.py": "import os\n\ndef test_it():\n    assert os.environ['FASTGAN_TEST_DEVICE'] == 'cpu'\n"
    "    assert os.environ['TRITON_INTERPRET'] == '1'\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tests and benches that do what tests and benches may do, in place of ours; limits that cost nothing."""
    tests = tmp_path / "tests"
    tests.mkdir()
    for name, text in TESTS.items():
        (tests / name).write_text(text)
    (tmp_path / "some_cases.py").write_text(CASES)
    monkeypatch.setattr(gpu_check, "TESTS", tests)
    monkeypatch.setattr(gpu_check, "CUDA_TESTS", tmp_path / "cuda")
    monkeypatch.setattr(gpu_check, "bench_modules", lambda: ["some_cases"])
    monkeypatch.setattr(gpu_check.latency, "machine_limits", lambda device: latency.Limits(1e9, 1e12))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def arguments(out: Path, **changes: Any) -> argparse.Namespace:
    found = {"out": out, "device": "cpu", "only": "", "skip_tests": False, "skip_benches": False}
    return argparse.Namespace(**{**found, "seconds": 0.005, "compile": False, "timeout": 60.0, **changes})


def test_without_a_gpu_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "result.json")]) == 2
    message = capsys.readouterr().err
    assert "nothing was checked" in message
    assert "Run this on a machine with an NVIDIA GPU" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cuda", "visible", "message"),
    [(None, None, "built without CUDA"), ("13.0", "", "CUDA_VISIBLE_DEVICES is empty"), ("13.0", None, "nvidia-smi")],
)
def test_why_there_is_no_gpu(cuda: str | None, visible: str | None, message: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert message in gpu_check.why_no_gpu()


def test_a_partial_failure_still_writes_everything(folder: Path, capsys: pytest.CaptureFixture) -> None:
    out = folder / "results" / "result.json"
    words = ["--device", "cpu", "--out", str(out), "--seconds", "0.005", "--timeout", "90"]
    assert gpu_check.main(words) == 1
    assert "4 failed" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["complete"]
    tests = {entry["file"]: entry for entry in result["tests"]}
    assert {name: (e["passed"], len(e["failures"])) for name, e in tests.items()} == {
        "test_bad.py": (1, 1),
        "test_crash.py": (0, 1),
        "test_device.py": (1, 0),
        "test_good.py": (3, 0),
    }
    assert "wrong sum" in tests["test_bad.py"]["failures"][0]["message"]
    assert tests["test_crash.py"]["status"] == 9

    (benches,) = result["benches"]
    assert [(f["case"], f["failed"]) for f in benches["failures"]] == [
        ("raises", "RuntimeError: no such kernel image"),
        ("dies", "its process ended with status 7"),
    ]
    assert "in raises" in benches["failures"][0]["trace"]
    assert {row["case"] for row in benches["rows"]} == {"good", "good again"}
    assert {row["pass"] for row in benches["rows"]} == {"fwd", "bwd", "fwd+bwd"}
    candidates = {row["candidate"] for row in benches["rows"]}
    assert {"eager", "fused on reference"} <= candidates
    reasons = {line["left_out"]: line["reason"] for line in benches["left_out"]}
    assert candidates | set(reasons) == {"eager", *[f"fused on {b}" for b in ("cuda", "triton", "cpp", "reference")]}
    assert reasons["fused on cuda"] == "it has no kernel for this op"
    assert all(row["median_ms"] > 0 and row["device"] for row in [{**result["facts"], **r} for r in benches["rows"]])

    text = out.with_suffix(".md").read_text()
    assert "**4 failed**" in text
    assert "wrong sum" in text
    assert "| test_good.py | 3 | 0 | 0 |" in text
    assert re.search(r"\| `bias_act` \| good \| float32, contiguous \| fwd \| fused on reference \| .*× \|", text)
    assert result["facts"]["device"] in text
    assert not list(out.parent.glob("*.part"))


def test_all_well(folder: Path) -> None:
    for name in ("test_bad.py", "test_crash.py"):
        (folder / "tests" / name).unlink()
    (folder / "some_cases.py").write_text(CASES + "\nCASES = CASES[:1]\n")
    out = folder / "result"
    assert gpu_check.main(["--device", "cpu", "--out", str(out), "--seconds", "0.005"]) == 0
    assert "All is well." in out.with_suffix(".md").read_text()
    facts = json.loads(out.with_suffix(".json").read_text())["facts"]
    assert {"commit", "torch", "triton", "python", "device", "date"} <= set(facts)


def test_having_run_nothing_is_a_failure(folder: Path) -> None:
    for path in (folder / "tests").iterdir():
        path.unlink()
    result = gpu_check.check(arguments(folder / "result", skip_benches=True))
    assert gpu_check.failed(result) == 1
    result = gpu_check.check(arguments(folder / "result", skip_benches=True, only="nothing like it"))
    assert gpu_check.failed(result) == 0


def test_only_some(folder: Path) -> None:
    result = gpu_check.check(arguments(folder / "result", only="good"))
    assert [entry["file"] for entry in result["tests"]] == ["test_good.py"]
    assert result["benches"] == []
    result = gpu_check.check(arguments(folder / "result", skip_tests=True, skip_benches=True))
    assert result["tests"] == result["benches"] == []


SANITIZER = """#!{python}
import subprocess, sys
assert sys.argv[1] == "--tool" and sys.argv[3:5] == ["--error-exitcode", "9"], sys.argv
status = subprocess.run(sys.argv[5:]).returncode
print("ERROR SUMMARY: 1 error" if sys.argv[2] == "racecheck" else "ERROR SUMMARY: 0 errors")
sys.exit(9 if sys.argv[2] == "racecheck" else status)
"""


def test_cuda_kernels_run_under_the_sanitizer_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cuda").mkdir()
    (folder / "cuda" / "test_kernels.py").write_text(
        "import os\n\ndef test_it(): assert os.environ.get('PYTORCH_NO_CUDA_MEMORY_CACHING', '0') in '01'\n"
    )
    (folder / "compute-sanitizer").write_text(SANITIZER.format(python=sys.executable))
    (folder / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    facts = gpu_check.facts
    monkeypatch.setattr(gpu_check, "facts", lambda device: facts(device) | {"compute-sanitizer": "there"})
    result = gpu_check.check(arguments(folder / "result", only="kernels", skip_benches=True))
    entries = {entry["file"]: entry for entry in result["tests"]}
    assert list(entries) == [
        "test_kernels.py",
        *[f"test_kernels.py under {tool}" for tool in gpu_check.SANITIZER_TOOLS],
    ]
    assert all(entry["passed"] == 1 for entry in entries.values())
    failures = {name: entry["failures"] for name, entry in entries.items() if entry["failures"]}
    assert list(failures) == ["test_kernels.py under racecheck"]
    assert "status 9\n" in failures["test_kernels.py under racecheck"][0]["message"]
    assert "ERROR SUMMARY: 1 error" in failures["test_kernels.py under racecheck"][0]["message"]


def test_without_a_sanitizer_the_tests_run_once(folder: Path) -> None:
    (folder / "cuda").mkdir()
    (folder / "cuda" / "test_kernels.py").write_text("def test_it(): pass\n")
    result = gpu_check.check(arguments(folder / "result", only="kernels", skip_benches=True))
    assert [entry["file"] for entry in result["tests"]] == ["test_kernels.py"]


def test_what_was_known_survives_an_interruption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str, args: argparse.Namespace) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "run_bench_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.check(arguments(folder / "result"))
    result = json.loads((folder / "result.json").read_text())
    assert len(result["tests"]) == len(TESTS)
    assert not result["complete"]
    assert "the check did not finish" in (folder / "result.md").read_text()


def test_a_file_that_hangs_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "test_hang.py"
    path.write_text("import time\n\ndef test_it(): time.sleep(600)\n")
    entry = gpu_check.run_test_file(path, "cpu", 5.0)
    assert (entry["status"], entry["passed"]) == ("timeout", 0)
    assert "status timeout" in entry["failures"][0]["message"]


def test_a_bench_that_cannot_be_imported(folder: Path) -> None:
    (folder / "some_cases.py").write_text("raise ImportError('no such library')")
    entry = gpu_check.run_bench_file("some_cases", arguments(folder / "result"))
    assert entry["rows"] == []
    (failure,) = entry["failures"]
    assert failure["failed"] == "status 1"
    assert "no such library" in failure["trace"]


def test_a_dead_device_ends_the_process_and_costs_one_case(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal address nothing works in that process: the case is noted, and another process goes on."""
    spec = importlib.util.spec_from_file_location("some_cases", folder / "some_cases.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(gpu_bench, "_device_works", lambda: False)
    with (folder / "rows").open("w") as file, pytest.raises(SystemExit) as stopped:
        gpu_bench.run_cases(module.CASES, arguments(folder, device="cuda", start=1), file)
    assert stopped.value.code == 3
    lines = [json.loads(line) for line in (folder / "rows").read_text().splitlines()]
    assert [next(iter(line)) for line in lines] == ["begin", "failed"]


def test_our_own_benches_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest of them, as on a GPU: every row, on every backend that is here."""
    names = gpu_check.bench_modules()
    assert "bench.bench_patch_loss" in names
    assert len(names) == len(list((ROOT / "bench").glob("bench_*.py")))
    entry = gpu_check.run_bench_file("bench.bench_patch_loss", arguments(tmp_path / "result"))
    assert entry["failures"] == []
    assert {row["candidate"] for row in entry["rows"]} >= {"eager", "fused on reference"}
    assert all({"median_ms", "peak_bytes", "speedup"} <= set(row) for row in entry["rows"])


def test_every_bench_has_cases() -> None:
    for name in gpu_check.bench_modules():
        assert importlib.import_module(name).CASES, name


# ----------------------------------------------------------------------------------------------------------------------
# Cases on a device


def make_case(op: str = "scaled_conv2d") -> Case:
    def inputs() -> list[Any]:
        x, weight = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(6, 4, 3, 3)
        return [[x], weight, torch.rand(6), 1, torch.tensor([1, 2])]

    def fused(xs: list[Tensor], weight: Tensor, scale: Tensor, padding: int, _: Tensor) -> Tensor:
        return ops.scaled_conv2d(xs[0], weight, None, scale, padding=padding)

    def eager(xs: list[Tensor], weight: Tensor, scale: Tensor, padding: int, _: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(xs[0], weight * scale[:, None, None, None], padding=padding)

    return Case(op, "small", inputs, {"eager": eager, "fused": fused}, {"fwd": latency.Work(1, 1)})


def test_precisions_and_layouts() -> None:
    found = list(gpu_bench.variants(make_case(), "cpu"))
    assert [(case.dtype, case.layout, bool(case.work)) for case in found] == [
        ("float32", "contiguous", True),
        ("float16", "channels_last", False),
        ("bfloat16", "channels_last", False),
    ]
    for case in found:
        (x,), weight, scale, padding, whole = case.inputs()
        assert x.requires_grad and x.is_leaf and not weight.requires_grad
        assert {str(t.dtype) for t in (x, weight, scale)} == {f"torch.{case.dtype}"}
        assert (padding, whole.dtype) == (1, torch.int64)
        last = case.layout == "channels_last"
        assert x.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        for name in case.candidates:
            for function in case.passes(name).values():
                function()
    (as_is,) = gpu_bench.variants(make_case("patch_loss"), "cpu")
    assert as_is.dtype == "float32"


def test_an_error_that_is_no_refusal_is_raised() -> None:
    def wrong(*_: Any) -> Tensor:
        raise ValueError("scaled_conv2d: x must be 4-D")

    case = Case("scaled_conv2d", "wrong", make_case().inputs, {"fused": wrong})
    with pytest.raises(ValueError, match="must be 4-D"):
        gpu_bench.on_backends(case)


# ----------------------------------------------------------------------------------------------------------------------
# What NVML and torch say


def fake_nvml(**changes: Any) -> ModuleType:
    class NVMLError(Exception):
        pass

    module = ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0
    module.asked = []
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: module.asked.append(uuid) or "handle"
    module.nvmlDeviceGetHandleByIndex = lambda index: module.asked.append(index) or "handle"
    module.nvmlSystemGetDriverVersion = lambda: "580.12"
    module.nvmlDeviceGetClockInfo = lambda handle, kind: {1: 1980, 2: 2619}[kind]
    module.nvmlDeviceGetMaxClockInfo = lambda handle, kind: 1980
    module.nvmlDeviceGetPowerManagementLimit = lambda handle: 700_000
    module.nvmlDeviceGetTemperature = lambda handle, kind: 41
    module.nvmlDeviceGetComputeRunningProcesses = lambda handle: ["this one"]
    for name, value in changes.items():
        setattr(module, name, value)
    return module


def test_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    found = gpu_check.nvml_facts("1234-56")
    assert (found["driver"], found["sm_clock_mhz"], found["memory_clock_mhz"]) == ("580.12", 1980, 2619)
    assert (found["power_limit_w"], found["temperature_c"], found["other_processes"]) == (700.0, 41, 0)
    gpu_check.nvml_facts(None)
    assert module.asked == ["GPU-1234-56", 0]


def test_nvml_that_is_not_there_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in gpu_check.nvml_facts(None)["nvml"]
    module = fake_nvml()

    def fails() -> None:
        raise module.NVMLError("Driver Not Loaded")

    module.nvmlInit = fails
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert gpu_check.nvml_facts(None) == {"nvml": "unavailable: Driver Not Loaded"}


def test_fake_asks_only_what_nvml_has() -> None:
    import pynvml

    missing = [name for name in vars(fake_nvml()) if not name.startswith("_") and not hasattr(pynvml, name)]
    assert missing == ["asked"]


def test_facts_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=85 * 10**9, uuid="1234", name="NVIDIA H100"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    found = gpu_check.facts("cuda")
    assert (found["device"], found["compute_capability"], found["multiprocessors"]) == ("NVIDIA H100", "9.0", 132)
    assert (found["driver"], found["memory_gib"], found["cudnn"]) == ("580.12", 79.2, 91000)
    json.dumps(found)


def test_tests_on_a_gpu_are_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    on_gpu, on_cpu = gpu_check._environment("cuda"), gpu_check._environment("cpu")
    assert (on_gpu.get("TRITON_INTERPRET"), on_gpu["FASTGAN_TEST_DEVICE"]) == (None, "cuda")
    assert (on_cpu["TRITON_INTERPRET"], on_cpu["FASTGAN_TEST_DEVICE"]) == ("1", "cpu")


# ----------------------------------------------------------------------------------------------------------------------
# Where the tests of the Triton kernels run


@pytest.fixture
def where(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("FASTGAN_TEST_DEVICE", raising=False)
    spec = importlib.util.spec_from_file_location("triton_tests_device", ROOT / "tests" / "triton" / "device.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.interpreted()
    return module


def test_what_tests_make_is_made_on_the_gpu(where: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """meta stands in for cuda: tensors and generators are asked for there, and no longer when the test is over."""
    asked = []
    monkeypatch.setattr(where, "DEVICE", "meta")
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": asked.append(device))
    fixture = where.on_device.__wrapped__ if hasattr(where.on_device, "__wrapped__") else where.on_device
    with monkeypatch.context() as patches:
        running = fixture(patches)
        next(running)
        assert torch.ones(2).device.type == "meta"
        torch.Generator()
        next(running, None)
    torch.Generator()
    assert asked == ["meta", "cpu"]
    assert torch.ones(2).device.type == "cpu"


def test_device_of_the_triton_tests(where: ModuleType) -> None:
    choose = where.choose
    assert choose({"TRITON_INTERPRET": "1"}, False) == "cpu"
    assert choose({"FASTGAN_TEST_DEVICE": "cuda"}, True) == "cuda"
    for environment, gpu, message in [
        ({}, True, "set TRITON_INTERPRET=1"),
        ({"FASTGAN_TEST_DEVICE": "cuda", "TRITON_INTERPRET": "1"}, True, "unset TRITON_INTERPRET"),
        ({"FASTGAN_TEST_DEVICE": "cuda"}, False, "torch sees no CUDA device"),
        ({"FASTGAN_TEST_DEVICE": "tpu"}, True, "must be cpu or cuda, got 'tpu'"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            choose(environment, gpu)


def test_makefile_runs_it() -> None:
    result = subprocess.run(["make", "--dry-run", "gpu-check"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "-m bench.gpu_check" in result.stdout
    assert os.path.exists(ROOT / "bench" / "gpu_check.py")
