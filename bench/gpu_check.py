"""``python -m bench.gpu_check --out FILE``: on a machine with a GPU, prove and time everything; one JSON, one Markdown.

Every test of tests/triton/ and tests/cuda/ runs there on the GPU (elsewhere Triton's interpreter and the C++ kernels
stand in for it), those of the CUDA C++ kernels once more under each tool of compute-sanitizer where that is installed,
then every bench, on each backend, candidates interleaved. What fails is written down and does not stop the rest. The
exit status is 0 if all is well, 1 if anything failed, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.cases import BASELINE
from fastgan.doctor import distribution_version
from fastgan.profile import latency

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "triton"
CUDA_TESTS = ROOT / "tests" / "cuda"
SANITIZER = "compute-sanitizer"
# Out of bounds and misaligned; races in shared memory; uninitialised memory; barriers.
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_MOST_TEXT = 4000


def nvml_facts(uuid: str | None) -> dict[str, Any]:
    """Driver, clocks, power and temperature of the GPU with that UUID, or why NVML does not say them."""
    try:
        import pynvml
    except ImportError:
        return {"nvml": "unavailable: pip install nvidia-ml-py"}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "sm_clock_most_mhz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "other_processes": len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) - 1,
        }
    except pynvml.NVMLError as error:
        return {"nvml": f"unavailable: {error}"}


def facts(device: str) -> dict[str, Any]:
    """Where and with what the check runs."""
    found = latency.environment(device) | {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "triton": distribution_version("triton"),
        "cuda_of_torch": torch.version.cuda,
        "cudnn_allows_tf32": torch.backends.cudnn.allow_tf32,
    }
    if device != "cuda":
        return found
    properties = torch.cuda.get_device_properties(0)
    found |= {
        "cudnn": torch.backends.cudnn.version(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        SANITIZER: shutil.which(SANITIZER),
    }
    uuid = getattr(properties, "uuid", None)
    return found | nvml_facts(None if uuid is None else str(uuid))


def _environment(device: str) -> dict[str, str]:
    """The environment of a test's process: compiled kernels on a GPU, the interpreter on the CPU."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found |= {"FASTGAN_TEST_DEVICE": device, "PYTHONPATH": os.pathsep.join([str(ROOT), found.get("PYTHONPATH", "")])}
    # The tests ask torch for deterministic algorithms, which cuBLAS has with a fixed workspace only.
    return found | ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if device == "cuda" else {"TRITON_INTERPRET": "1"})


def _run(command: Sequence[str], environment: dict[str, str], seconds: float) -> tuple[int | str, str]:
    """(exit status or "timeout", the end of what it printed)."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, text=True, errors="replace", timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        output = error.stdout or ""
        return "timeout", (output if isinstance(output, str) else output.decode(errors="replace"))[-_MOST_TEXT:]
    return done.returncode, done.stdout[-_MOST_TEXT:]


def run_test_file(path: Path, device: str, seconds: float, tool: str | None = None) -> dict[str, Any]:
    """Run one file of tests in a process of its own, under a tool of compute-sanitizer if one is named; counts,
    failures, and what a crash left."""
    with tempfile.TemporaryDirectory() as folder:
        junit, environment = Path(folder) / "junit.xml", _environment(device)
        command = [sys.executable, "-m", "pytest", str(path), "-q", "-p", "no:cacheprovider", f"--junitxml={junit}"]
        if tool is not None:
            # torch's allocator hands out parts of blocks, in which the tools would not see where a tensor ends.
            environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", *command]
        status, output = _run(command, environment, seconds)
        name = path.name if tool is None else f"{path.name} under {tool}"
        result: dict[str, Any] = {"file": name, "status": status, "passed": 0, "skipped": 0, "failures": []}
        if junit.exists():
            result |= read_junit(junit.read_text())
    # 0: all passed; 1: some failed, and are listed. Anything else (a crash, a timeout, no test) is itself a failure.
    if status not in (0, 1) or (status == 1 and not result["failures"]):
        result["failures"].append({"test": f"{name} (the whole file)", "message": f"status {status}\n{output}"})
    return result


def test_runs(args: argparse.Namespace, *, sanitizer: bool) -> list[tuple[Path, str | None]]:
    """(file of tests, tool of compute-sanitizer or None) in the order of the check."""
    if args.skip_tests:
        return []
    tools = (None, *SANITIZER_TOOLS) if sanitizer else (None,)
    runs = [(path, None) for path in sorted(TESTS.glob("test_*.py"))]
    runs += [(path, tool) for path in sorted(CUDA_TESTS.glob("test_*.py")) for tool in tools]
    return [(path, tool) for path, tool in runs if args.only in path.stem]


def read_junit(text: str) -> dict[str, Any]:
    """Counts and failures of pytest's JUnit file."""
    passed, skipped, failures = 0, 0, []
    for case in ElementTree.fromstring(text).iter("testcase"):
        bad = [part for part in case if part.tag in ("failure", "error")]
        if bad:
            message = f"{bad[0].get('message') or ''}\n{bad[0].text or ''}"[-_MOST_TEXT:]
            failures.append({"test": f"{case.get('classname')}::{case.get('name')}", "message": message})
        elif any(part.tag == "skipped" for part in case):
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failures": failures}


def bench_modules() -> list[str]:
    """The benches, as modules."""
    return [f"bench.{path.stem}" for path in sorted((ROOT / "bench").glob("bench_*.py"))]


def run_bench_file(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one bench file, going on behind a case that killed its process."""
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    start = 0
    while True:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            path.touch()
            command = [sys.executable, "-m", "bench.gpu_bench", name, "--device", args.device, "--rows", str(path)]
            command += ["--start", str(start), "--seconds", str(args.seconds), *(["--compile"] if args.compile else [])]
            environment = _environment(args.device)
            environment.pop("TRITON_INTERPRET", None)
            status, output = _run(command, environment, args.timeout)
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        begun = [line for line in lines if "begin" in line]
        rows += [line for line in lines if "median_ms" in line]
        failures += [line for line in lines if "failed" in line]
        left_out += [line for line in lines if "left_out" in line]
        if any("end" in line for line in lines):
            break
        if not begun:
            failures.append({"op": name, "case": "(the whole file)", "failed": f"status {status}", "trace": output})
            break
        last = begun[-1]
        if "failed" not in lines[-1]:
            facts = {key: last[key] for key in ("op", "case", "dtype", "layout")}
            failures.append(facts | {"failed": f"its process ended with status {status}", "trace": output})
        start = last["begin"] + 1
    return {"file": name, "rows": rows, "failures": failures, "left_out": left_out}


def failed(result: dict[str, Any]) -> int:
    """How many things failed; a check that ran no test or timed nothing it was asked for counts as one."""
    tests = sum(len(entry["failures"]) for entry in result["tests"])
    benches = sum(len(entry["failures"]) for entry in result["benches"])
    ran = {
        "tests": sum(e["passed"] for e in result["tests"]),
        "benches": sum(len(e["rows"]) for e in result["benches"]),
    }
    empty = sum(result["complete"] and asked and not ran[name] for name, asked in result["asked"].items())
    return tests + benches + empty


def as_markdown(result: dict[str, Any]) -> str:
    """The result for people: where, what passed, what failed, what was gained and lost."""
    where = result["facts"]
    verdict = "all is well" if not failed(result) else f"**{failed(result)} failed**"
    state = verdict if result["complete"] else f"{verdict} so far; **the check did not finish**"
    lines = [f"# gpu-check: {where['device']}", "", f"{state[0].upper()}{state[1:]}.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in where.items()]
    lines += [f"| after: {name} | {value} |" for name, value in result["after"].items()]
    lines += ["", "## Tests", "", "| file | passed | failed | skipped |", "|---|---:|---:|---:|"]
    for entry in result["tests"]:
        lines.append(f"| {entry['file']} | {entry['passed']} | {len(entry['failures'])} | {entry['skipped']} |")
    lines += ["", "## Benches", ""]
    if result["limits"]:
        read, multiply = result["limits"]["read_bytes"] / 1e9, result["limits"]["sgemm_flops"] / 1e12
        lines += [f"Measured limits: {read:.0f} GB/s read, {multiply:.1f} TFLOP/s sgemm.", ""]
    lines += ["Median (p20–p80) in ms of interleaved rounds; the speed-up is the median of the rounds' ratios.", ""]
    lines += [
        "| op | case | dtype, layout | pass | candidate | ms | against eager |",
        "|---|---|---|---|---|---:|---:|",
    ]
    for row in (row for entry in result["benches"] for row in entry["rows"]):
        cells = [f"`{row['op']}`", row["case"], f"{row['dtype']}, {row['layout']}", row["pass"], row["candidate"]]
        gained = "" if row["candidate"] == BASELINE else f"{row['speedup']:.2f}×"
        spread = f"{row['median_ms']:.3f} ({row['p20_ms']:.3f}–{row['p80_ms']:.3f})"
        lines.append("| " + " | ".join([*cells, spread, gained]) + " |")
    lines += _failure_lines(result)
    return "\n".join(lines) + "\n"


def _failure_lines(result: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for entry in (failure for tests in result["tests"] for failure in tests["failures"]):
        lines += [f"### {entry['test']}", "", "```", entry["message"].strip(), "```", ""]
    for entry in (failure for bench in result["benches"] for failure in bench["failures"]):
        title = ", ".join(str(entry[key]) for key in ("op", "case", "dtype", "layout") if key in entry)
        lines += [f"### {title}", "", "```", entry["failed"], entry.get("trace", "").strip(), "```", ""]
    return ["", "## What failed", "", *lines] if lines else []


def write(result: dict[str, Any], out: Path) -> None:
    """Both files, whole or not at all: a check that is killed leaves what it had last written."""
    texts = {".json": json.dumps(result, indent=1, ensure_ascii=False) + "\n", ".md": as_markdown(result)}
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in texts.items():
        path = out.with_suffix(suffix)
        part = path.with_suffix(f"{suffix}.part")
        part.write_text(text)
        part.replace(path)


def why_no_gpu() -> str:
    """Why torch sees no CUDA device, as far as can be told."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "CUDA_VISIBLE_DEVICES is empty" if hidden == "" else "torch sees no CUDA device (does nvidia-smi?)"


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything that ``args`` ask for; the files are rewritten after each step."""
    benches = [] if args.skip_benches else bench_modules()
    benches = [name for name in benches if args.only in name]
    result: dict[str, Any] = {"facts": facts(args.device), "after": {}, "limits": None, "tests": [], "benches": []}
    # With --only, either may rightly be empty; else nothing having run is itself a failure.
    asked = {"tests": not (args.skip_tests or args.only), "benches": not (args.skip_benches or args.only)}
    result |= {"asked": asked, "complete": False}
    write(result, args.out)
    for path, tool in test_runs(args, sanitizer=bool(result["facts"].get(SANITIZER))):
        entry = run_test_file(path, args.device, args.timeout, tool)
        result["tests"].append(entry)
        print(f"{entry['file']:36} {entry['passed']} passed, {len(entry['failures'])} failed", flush=True)
        write(result, args.out)
    if benches:
        result["limits"] = asdict(latency.machine_limits(args.device))
    for name in benches:
        entry = run_bench_file(name, args)
        result["benches"].append(entry)
        print(f"{name:36} {len(entry['rows'])} rows, {len(entry['failures'])} failed", flush=True)
        write(result, args.out)
    if args.device == "cuda":
        uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
        result["after"] = nvml_facts(None if uuid is None else str(uuid))
    result["complete"] = True
    write(result, args.out)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="FILE.json and FILE.md are written")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: the interpreter stands in")
    parser.add_argument("--only", default="", help="only files of tests and benches with this in their name")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-benches", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.0, help="per pass of a case, all candidates together")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the eager candidates (slow)")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one file of tests or benches")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu-check: {why_no_gpu()}, so nothing was checked. Run this on a machine with an NVIDIA GPU; "
            "--device cpu rehearses it on the interpreter.",
            file=sys.stderr,
        )
        return 2
    result = check(args)
    count = failed(result)
    print(f"gpu-check: {count or 'nothing'} failed; {args.out.with_suffix('.md')} and {args.out.with_suffix('.json')}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
