"""Tests under AddressSanitizer and UBSan: ``python tests/sanitized.py FOLDER [arguments of pytest]``.

FOLDER holds the package that ``FASTGAN_SANITIZE=1 python setup.py build --build-lib FOLDER`` makes; ``make sanitize``
does both. Two planted bugs have to be reported first: the run would else prove nothing. Then come the tests of the
CPU's ops, and the fuzz tests once for each width of registers that the library has code for, 4, 8 and 16 floats: the
width decides how far a kernel reads. Of the ops' own tests nothing but a report counts, since values are the ordinary
build's affair; the fuzz tests must pass.

That takes hours on a small machine. Each file at each width is a process of its own, which a report ends and no other
file's; FOLDER/ran notes what came to its end, and a further run leaves that out until the package or the tests change.

torch's CPU allocator calls posix_memalign for each tensor, so a read one float beyond a tensor's storage is reported;
one that stays within the storage of a view is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (4, 8, 16)
OPS = (
    *(
        "bias_act",
        "dense_block",
        "direct_conv",
        "direct_weight_grad",
        "feature_matching_loss",
        "few_pixels",
        "fused_bias_act",
    ),
    *("minibatch_stddev", "modulated_conv2d", "modulated_conv2d_module", "norm_act", "norm_act_kernel", "patch_loss"),
    *("pixel_norm", "scaled_conv2d", "spectral_sigma", "upfirdn2d", "vector_math", "weight_energy"),
    *("kept_weights", "weight_energy_cache", "packed_direct", "infer", "infer_bf16", "infer_int8"),
    *("infer_byte_images", "infer_grouped_images"),
)
# The exit status of a process that a report ended; pytest's own are 0 to 5.
REPORTED = 86
PLANTED = {
    "heap-buffer-overflow": "x = torch.ones(24); library.fastgan_read_beyond(*map(ctypes.c_int64, (x.data_ptr(), 24)))",
    "signed integer overflow": "library.fastgan_overflow(2**31 - 1)",
}


def environment(folder: Path) -> dict[str, str]:
    """In which the sanitized library loads and is the one that ``import fastgan`` finds."""
    info = json.loads((folder / "fastgan" / "_build_info.json").read_text())
    if not info["sanitize"]:
        sys.exit(f"{folder} holds a library that was built without FASTGAN_SANITIZE=1")
    # libstdc++ as well: the sanitizer looks for its __cxa_throw when the process starts, and Python does not bring it.
    libraries = [
        subprocess.run([info["cxx"], f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    return os.environ | {
        "LD_PRELOAD": ":".join(library.strip() for library in libraries),
        # No leaks: what Python and torch keep until the process ends would be all that is found.
        "ASAN_OPTIONS": f"exitcode={REPORTED}:detect_leaks=0:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": f"exitcode={REPORTED}:print_stacktrace=1",
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        # Waiting threads sleep: under the sanitizers they wait long.
        "OMP_WAIT_POLICY": "passive",
    }


def prove(env: dict[str, str], folder: Path) -> None:
    """Stops unless each planted bug ends the process with its report, in the library that the tests will load."""
    for report, bug in PLANTED.items():
        code = "import ctypes, torch, fastgan._native as n; path = n.load()['cpu'].path; print(path)\n"
        code += f"library = ctypes.CDLL(str(path)); {bug}"
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode != REPORTED or report not in done.stderr or str(folder) not in done.stdout:
            sys.exit(f"a planted {report} went unreported:\n{done.stdout}{done.stderr}")
        print(f"planted {report}: reported", flush=True)


def run(env: dict[str, str], *arguments: str) -> int:
    """pytest in a process of its own, which a report ends; its exit status."""
    # The script, not -m pytest, which would put the ordinary package of this folder before the sanitized one. Captured
    # are Python's own streams alone: a report is on its way when the process dies.
    pytest = [sys.executable, str(Path(sys.executable).parent / "pytest"), "-q", "--capture=sys"]
    return subprocess.run([*pytest, *arguments], cwd=ROOT, env=env).returncode


def pieces() -> list[tuple[Path, str, bool]]:
    """The files, each with the floats of a register, "" for the machine's own, and whether its tests must pass."""
    # A test of an op that fails is no report: some bounds on long sums are met in vector registers alone, which
    # instrumented loops do without.
    ops = [(ROOT / f"tests/test_{name}.py", os.environ.get("FASTGAN_LANES", ""), False) for name in OPS]
    fuzz = sorted(ROOT.glob("tests/fuzz/test_*.py"))
    return ops + [(file, str(width), True) for width in WIDTHS for file in fuzz]


def run_piece(env: dict[str, str], folder: Path, file: Path, width: str, must_pass: bool) -> bool:
    """Whether the file came to its end, now or in an earlier run with as many cases of fuzz."""
    label = "-".join(filter(None, (file.stem, width, os.environ.get("FASTGAN_FUZZ_CASES") if must_pass else None)))
    mark = folder / "ran" / label
    package = (path for path in (folder / "fastgan").rglob("*") if path.suffix in (".py", ".so"))
    helpers = (path for path in file.parent.glob("*.py") if not path.name.startswith("test_"))
    if mark.exists() and mark.stat().st_mtime > max(path.stat().st_mtime for path in (file, *helpers, *package)):
        print(f"{label}: ran before", flush=True)
        return True
    started = time.time()
    # Without torch.compile, whose own compiler would run with the sanitizer preloaded, for minutes.
    status = run(env | ({"FASTGAN_LANES": width} if width else {}), "-k", "not compile", str(file))
    passed = status == 0 or (status == 1 and not must_pass)
    print(f"{label}: {'passed' if passed else f'status {status}'}, {time.time() - started:.0f} s", flush=True)
    if passed:
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
        # What was edited meanwhile did not run.
        os.utime(mark, (started, started))
    return passed


def main() -> int:
    folder, arguments = Path(sys.argv[1]).resolve(), sys.argv[2:]
    env = environment(folder)
    prove(env, folder)
    if arguments:
        return run(env, *arguments)
    failed = [f"{file.stem} {width}" for file, width, must in pieces() if not run_piece(env, folder, file, width, must)]
    print(f"failed: {', '.join(failed)}" if failed else "no report")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
