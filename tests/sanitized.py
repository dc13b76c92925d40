"""Tests under AddressSanitizer and UBSan: ``python tests/sanitized.py FOLDER [arguments of pytest]``.

FOLDER holds the package that ``FASTGAN_SANITIZE=1 python setup.py build --build-lib FOLDER`` makes; ``make sanitize``
does both. Two planted bugs have to be reported first: the run would else prove nothing. Then come the tests of the
CPU's ops, and the fuzz tests once for each width of registers that the library has code for, 4, 8 and 16 floats: the
width decides how far a kernel reads. Any report fails the run.

torch's CPU allocator calls posix_memalign for each tensor, so a read one float beyond a tensor's storage is reported;
one that stays within the storage of a view is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (4, 8, 16)
OPS = (
    *("bias_act", "direct_conv", "direct_weight_grad", "feature_matching_loss", "few_pixels", "fused_bias_act"),
    *("minibatch_stddev", "modulated_conv2d", "modulated_conv2d_module", "norm_act", "norm_act_kernel", "patch_loss"),
    *("pixel_norm", "scaled_conv2d", "spectral_sigma", "upfirdn2d", "vector_math", "weight_energy"),
    "weight_energy_cache",
)
PLANTED = {
    "heap-buffer-overflow": "library.fastgan_read_beyond(ctypes.c_void_p(torch.ones(24).data_ptr()), ctypes.c_int64(24))",
    "signed integer overflow": "library.fastgan_overflow(2**31 - 1)",
}


def environment(folder: Path, reports: Path) -> dict[str, str]:
    """In which the sanitized library loads and is the one that ``import fastgan`` finds."""
    info = json.loads((folder / "fastgan" / "_build_info.json").read_text())
    if not info["sanitize"]:
        sys.exit(f"{folder} holds a library that was built without FASTGAN_SANITIZE=1")
    # libstdc++ as well: the sanitizer looks for its __cxa_throw when the process starts, and Python does not bring it.
    libraries = [
        subprocess.run([info["cxx"], f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    # Reports go to files, since pytest holds back what a process wrote that is then aborted. No leaks: what Python and
    # torch keep until the process ends would be all that is found.
    options = f"log_path={reports / 'report'}:halt_on_error=1:abort_on_error=1"
    return os.environ | {
        "LD_PRELOAD": ":".join(library.strip() for library in libraries),
        "ASAN_OPTIONS": f"{options}:detect_leaks=0:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": f"{options}:print_stacktrace=1",
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
    }


def take_reports(reports: Path) -> str:
    """What was reported since the last call."""
    paths = sorted(reports.glob("report*"))
    text = "\n".join(path.read_text(errors="replace") for path in paths)
    for path in paths:
        path.unlink()
    return text


def prove(env: dict[str, str], reports: Path, folder: Path) -> None:
    """Stops unless each planted bug is reported, in the library that the tests will load."""
    for word, bug in PLANTED.items():
        code = "import ctypes, torch, fastgan._native as n; path = n.load()['cpu'].path; print(path)\n"
        code += f"library = ctypes.CDLL(str(path)); {bug}"
        done = subprocess.run([sys.executable, "-c", code], cwd=reports, env=env, capture_output=True, text=True)
        text = take_reports(reports)
        if done.returncode == 0 or word not in text or str(folder) not in done.stdout:
            sys.exit(f"a planted {word} went unreported:\n{done.stdout}{done.stderr}{text}")
        print(f"planted {word}: reported", flush=True)


def run(env: dict[str, str], reports: Path, arguments: list[str]) -> bool:
    """pytest in a process of its own; True if its tests passed and nothing was reported."""
    # The script, not -m pytest, which would put the ordinary package of this folder before the sanitized one.
    command = [sys.executable, str(Path(sys.executable).parent / "pytest"), "-q", "-p", "no:cacheprovider", *arguments]
    code = subprocess.run(command, cwd=ROOT, env=env).returncode
    text = take_reports(reports)
    print(text, end="", flush=True)
    return code == 0 and not text


def main() -> int:
    folder, arguments = Path(sys.argv[1]).resolve(), sys.argv[2:]
    reports = folder / "reports"
    reports.mkdir(exist_ok=True)
    take_reports(reports)
    env = environment(folder, reports)
    prove(env, reports, folder)
    if arguments:
        return not run(env, reports, arguments)
    # torch.compile's own compiler would be preloaded with the sanitizer, for minutes.
    passed = run(env, reports, ["-k", "not compile", *(f"tests/test_{name}.py" for name in OPS)])
    for width in WIDTHS:
        passed &= run(env | {"FASTGAN_LANES": str(width)}, reports, ["tests/fuzz"])
    return not passed


if __name__ == "__main__":
    sys.exit(main())
