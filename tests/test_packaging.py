"""What is declared, what is packed, and what importing costs.

Compiled wheels and installations into fresh environments are tried by .ci/run; here are the parts that take seconds.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastgan import cli, doctor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Distribution -> the module that it is imported as, where the two names differ.
MODULE_OF = {"pillow": "PIL", "scikit-image": "skimage"}
# Functions that take a module by name: fastgan.train.extras.require and the one that finds without importing.
BY_NAME = ("require", "importlib.util.find_spec")
BUILT = (".so", ".pyc", "_build_info.json")
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "fastgan", "kernels", "csrc")


def requirement_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement).group(0)


def run_setup(folder: Path, *arguments: str, hide_torch: bool = False, **switches: str) -> subprocess.CompletedProcess:
    """Run setup.py of the copy in ``folder``, if asked with a torch that cannot be imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTGAN_")}
    environment.update(switches)
    if hide_torch:
        hidden = folder / "hidden"
        hidden.mkdir(exist_ok=True)
        (hidden / "torch.py").write_text('raise ImportError("torch is hidden")\n')
        environment["PYTHONPATH"] = str(hidden)
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without anything that a build left."""
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def pure_wheel(checkout: Path) -> Path:
    """The wheel of a machine without compiler and without torch."""
    result = run_setup(checkout, "bdist_wheel", hide_torch=True, FASTGAN_BUILD_CPP="0")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^  build_cpp +False$", result.stdout, re.MULTILINE)
    (wheel,) = (checkout / "dist").glob("*.whl")
    return wheel


def test_build_without_torch_fails_loudly(checkout: Path) -> None:
    result = run_setup(
        checkout, "build_ext", hide_torch=True, FASTGAN_BUILD_CPP="1", FASTGAN_BUILD_CUDA="0", CXX="true"
    )
    assert result.returncode != 0
    assert "torch cannot be imported by this build (torch is hidden)" in result.stderr
    assert "--no-build-isolation" in result.stderr
    assert "FASTGAN_BUILD_CPP=0" in result.stderr


def test_pure_wheel_holds_the_python_and_the_reason(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure_wheel) as archive:
        names = set(archive.namelist())
        info = json.loads(archive.read("fastgan/_build_info.json"))
    assert {"fastgan/__init__.py", "fastgan/ops/__init__.py", "fastgan/kernels/__init__.py"} <= names
    assert {name.split("/")[0] for name in names} == {"fastgan", pure_wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastgan").rglob("*.*") if path.suffix != ".py"}
    assert {name for name in data if not name.endswith(BUILT)} <= names
    assert "fastgan/kernels.py" not in names
    assert not [name for name in names if name.endswith(".so")]
    assert (info["build_cpp"], info["cpp_reason"]) == (False, "FASTGAN_BUILD_CPP=0")


def test_pure_wheel_works(pure_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import fastgan.kernels, fastgan.ops, torch; from fastgan import doctor; "
        "assert 'site' in fastgan.__file__ and 'site' in fastgan.kernels.__file__; "
        "y = fastgan.ops.bias_act(torch.ones(1, 2, 3, 3), torch.tensor([0.0, 1.0])); "
        "assert y[0, 1, 0, 0] == 2, y; "
        "print(doctor.render(doctor.examine()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"cpp +not available: not built: FASTGAN_BUILD_CPP=0", result.stdout)


def test_sdist_holds_every_source_and_nothing_built(checkout: Path) -> None:
    (checkout / "fastgan" / "libfastgan_cpu.so").write_bytes(b"stale")
    (checkout / "fastgan" / "_build_info.json").write_text("{}")
    result = run_setup(checkout, "sdist", hide_torch=True)
    assert result.returncode == 0, result.stderr
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    for folder in ("csrc", "fastgan", "kernels"):
        wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.*") if path.is_file()}
        assert {name for name in wanted if "__pycache__" not in name and not name.endswith(BUILT)} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.endswith(BUILT)]


def third_party_imports() -> set[str]:
    """Top-level names outside the standard library that fastgan/ and kernels/ import, at import or on first use."""
    found = set()
    for path in [*(ROOT / "fastgan").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
                found |= {arg.value.split(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found - set(sys.stdlib_module_names) - {"fastgan"}


def test_dependencies_are_what_is_imported() -> None:
    declared = map(requirement_name, [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["report"]])
    modules = {MODULE_OF.get(name, name) for name in declared}
    assert modules == third_party_imports()


def test_doctor_knows_the_extras() -> None:
    expected = {name: tuple(map(requirement_name, EXTRAS[name])) for name in ("train", "report")}
    assert expected == doctor.EXTRAS


def test_formatters_are_pinned_alike() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pins = [requirement for requirement in EXTRAS["dev"] if "==" in requirement]
    assert pins
    assert set(re.findall(r'"([a-z-]+==[^"]+)"', hooks)) == set(pins)


def test_console_script_is_the_command_line() -> None:
    module, _, function = PROJECT["scripts"]["fastgan"].partition(":")
    assert getattr(sys.modules[module], function) is cli.main


IMPORT_PROGRAM = """
import time, sys
import torch
before = set(sys.modules)
start = time.perf_counter()
import fastgan
print(time.perf_counter() - start)
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""


def test_import_is_cheap_and_loads_nothing_heavy() -> None:
    seconds = []
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", IMPORT_PROGRAM], capture_output=True, text=True, check=True)
        elapsed, modules = result.stdout.splitlines()
        seconds.append(float(elapsed))
        assert set(modules.split()) - set(sys.stdlib_module_names) == {"fastgan"}
    assert statistics.median(seconds) < 0.3
