"""The build's switches, what it links to, and what the loader does with a library that is missing or does not fit."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastgan import _native

ROOT = Path(__file__).resolve().parent.parent
INFO = {"torch_version": "2.14.1", "torch_target": "2.10", "cpp_reason": None, "cuda_reason": None}
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
SWITCHES = (
    "FASTGAN_BUILD_CPP",
    "FASTGAN_BUILD_CUDA",
    "FASTGAN_DEBUG",
    "FASTGAN_SANITIZE",
    "TORCH_CUDA_ARCH_LIST",
    "CXX",
    "CUDA_HOME",
)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with every switch unset, both compilers found, and no command run for their versions."""
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("fastgan_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fastgan_setup", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "find_cxx", lambda: "/opt/g++")
    monkeypatch.setattr(module, "find_nvcc", lambda: "/opt/nvcc")
    monkeypatch.setattr(module, "tool_version", lambda command, pattern: f"{command} 1.0")
    return module


def library_file(name: str, folder: Path, content: bytes) -> Path:
    path = folder / {"cpu": "libfastgan_cpu.so", "cuda": "libfastgan_cuda.so"}[name]
    path.write_bytes(content)
    return path


class TestSwitches:
    def test_default_builds_what_there_are_compilers_for(self, build: ModuleType) -> None:
        config = build.resolve_config()
        assert (config.build_cpp, config.build_cuda, config.debug) == (True, True, False)
        assert (config.cpp_reason, config.cuda_reason) == (None, None)
        assert config.cuda_arch_list == build.DEFAULT_ARCH_LIST

    def test_no_compiler_chooses_no_cpp_and_says_so(self, build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "find_cxx", lambda: None)
        config = build.resolve_config()
        assert (config.build_cpp, config.build_cuda) == (False, False)
        assert config.cpp_reason == "FASTGAN_BUILD_CPP=0 was chosen, since no C++ compiler was found"
        assert config.cuda_reason == "FASTGAN_BUILD_CUDA=auto follows FASTGAN_BUILD_CPP, which is 0"

    def test_no_nvcc_leaves_cuda_out(self, build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "find_nvcc", lambda: None)
        config = build.resolve_config()
        assert (config.build_cpp, config.build_cuda) == (True, False)
        assert config.cuda_reason == "FASTGAN_BUILD_CUDA=auto and no nvcc found"

    @pytest.mark.parametrize(
        ("switches", "expected"),
        [
            ({"FASTGAN_BUILD_CPP": "0"}, (False, False, False)),
            ({"FASTGAN_BUILD_CPP": "0", "FASTGAN_BUILD_CUDA": "1"}, (False, True, False)),
            ({"FASTGAN_BUILD_CUDA": "0", "FASTGAN_DEBUG": "1"}, (True, False, True)),
            ({"FASTGAN_SANITIZE": "1"}, (True, False, True)),
        ],
    )
    def test_switches_decide(
        self, build: ModuleType, monkeypatch: pytest.MonkeyPatch, switches: dict[str, str], expected: tuple[bool, ...]
    ) -> None:
        for name, value in switches.items():
            monkeypatch.setenv(name, value)
        config = build.resolve_config()
        assert (config.build_cpp, config.build_cuda, config.debug) == expected

    @pytest.mark.parametrize(
        ("name", "value", "missing", "message"),
        [
            ("FASTGAN_BUILD_CPP", "yes", None, "FASTGAN_BUILD_CPP must be one of 0, 1, got 'yes'"),
            ("FASTGAN_BUILD_CUDA", "on", None, "FASTGAN_BUILD_CUDA must be one of auto, 0, 1, got 'on'"),
            ("FASTGAN_BUILD_CPP", "1", "find_cxx", r"no C\+\+ compiler was found"),
            ("FASTGAN_BUILD_CUDA", "1", "find_nvcc", "no nvcc was found"),
            ("FASTGAN_BUILD_CUDA", "1", "find_cxx", r"no C\+\+ compiler was found for nvcc"),
        ],
    )
    def test_impossible_demand_stops_the_build(
        self, build: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, value: str, missing: str, message: str
    ) -> None:
        monkeypatch.setenv(name, value)
        if missing:
            monkeypatch.setattr(build, missing, lambda: None)
        with pytest.raises(build.SetupError, match=message):
            build.resolve_config()

    def test_debug_changes_the_flags(self, build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        paths = build.TorchPaths(Path("include"), Path("lib"))
        release = build.compile_flags(build.resolve_config(), paths)
        monkeypatch.setenv("FASTGAN_DEBUG", "1")
        debug = build.compile_flags(build.resolve_config(), paths)
        for suffix in (".cpp", ".cu"):
            assert "-O3" in release[suffix]
            assert "-DNDEBUG" in release[suffix]
            assert "-g" in debug[suffix]
            assert "-DNDEBUG" not in debug[suffix]
            for flags in (release[suffix], debug[suffix]):
                assert not {"-ffast-math", "-march=native", "--use_fast_math"} & set(flags)

    def test_sanitizers_are_compiled_and_linked_in_and_end_the_process(
        self, build: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paths = build.TorchPaths(Path("include"), Path("lib"))
        assert not set(build.SANITIZERS) & set(build.compile_flags(build.resolve_config(), paths)[".cpp"])
        monkeypatch.setenv("FASTGAN_SANITIZE", "1")
        flags = build.compile_flags(build.resolve_config(), paths)[".cpp"]
        assert {*build.SANITIZERS, "-DFASTGAN_SANITIZE", "-g"} <= set(flags)
        assert "-fno-sanitize-recover=all" in build.SANITIZERS
        monkeypatch.setenv("FASTGAN_BUILD_CUDA", "1")
        with pytest.raises(build.SetupError, match="FASTGAN_SANITIZE=1 builds the C\\+\\+ library alone"):
            build.resolve_config()

    @pytest.mark.skipif(COMPILER is None, reason="without a C++ compiler nothing is built that could be refused")
    def test_a_sanitized_library_is_not_built_in_place(self) -> None:
        """Where it would lie, no Python without the sanitizers' own libraries could load it."""
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        env = os.environ | {"FASTGAN_SANITIZE": "1", "FASTGAN_BUILD_CPP": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode != 0
        assert "FASTGAN_SANITIZE=1 does not build in place" in done.stderr

    def test_arch_list(self, build: ModuleType) -> None:
        assert build.gencode_flags("7.5 9.0a;12.0+PTX") == [
            "-gencode=arch=compute_75,code=sm_75",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_120,code=sm_120",
            "-gencode=arch=compute_120,code=compute_120",
        ]
        with pytest.raises(build.SetupError, match=r"entries such as 8\.0 or 9\.0\+PTX, got 'Ampere'"):
            build.gencode_flags("Ampere")


class TestBuildsAgainstTorch:
    @staticmethod
    def fake_torch(version: str, cuda: str | None) -> SimpleNamespace:
        return SimpleNamespace(
            __version__=version, __file__="/opt/torch/__init__.py", version=SimpleNamespace(cuda=cuda)
        )

    def test_missing_torch_is_loud(self, build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(
            build.SetupError, match=r"(?s)torch cannot be imported.*no-build-isolation.*FASTGAN_BUILD_CPP=0"
        ):
            build.settle_with_torch(build.resolve_config())

    def test_old_torch_is_refused(self, build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", self.fake_torch("2.9.1+cpu", None))
        with pytest.raises(build.SetupError, match=r"needs torch >= 2\.10 to build, got torch 2\.9\.1"):
            build.settle_with_torch(build.resolve_config())

    def test_cuda_needs_a_cuda_torch(self, build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", self.fake_torch("2.14.1+cpu", None))
        config = build.resolve_config()
        build.settle_with_torch(config)
        assert not config.build_cuda
        assert config.cuda_reason == "torch 2.14.1+cpu is built without CUDA"
        monkeypatch.setenv("FASTGAN_BUILD_CUDA", "1")
        with pytest.raises(
            build.SetupError, match=r"FASTGAN_BUILD_CUDA=1, but torch 2\.14\.1\+cpu is built without CUDA"
        ):
            build.settle_with_torch(build.resolve_config())


class TestBuiltLibraries:
    """What holds for the libraries of this checkout, if they were built; if not, the stored reason must say why."""

    def test_each_library_is_loaded_or_says_why(self) -> None:
        info = _native.read_build_info()
        for name, built in (("cpu", info and info["build_cpp"]), ("cuda", info and info["build_cuda"])):
            status = _native.load()[name]
            if built and (name == "cpu" or torch.version.cuda is not None):
                assert status.reason is None
                assert status.path.exists()
                assert torch._C._dispatch_has_kernel_for_dispatch_key("fastgan::_probe", name.upper())
            else:
                assert status.reason
                assert not torch._C._dispatch_has_kernel_for_dispatch_key("fastgan::_probe", name.upper())

    def test_probe_runs_on_every_device_with_a_library(self) -> None:
        loaded = {name for name, status in _native.load().items() if status.reason is None}
        usable = loaded if torch.cuda.is_available() else loaded - {"cuda"}
        for device in usable:
            assert _native.probe(device)
            assert torch.ops.fastgan._probe(torch.empty(0, device=device)).shape == (0,)
            with pytest.raises(RuntimeError, match="_probe: x must be contiguous float32"):
                torch.ops.fastgan._probe(torch.zeros(2, dtype=torch.float64, device=device))
        for device in {"cpu"} - usable:
            with pytest.raises(NotImplementedError):
                _native.probe(device)

    def test_libraries_need_only_torch_c_functions(self) -> None:
        """The stable ABI's promise: no C++ symbol of torch, c10 or Python is asked for, so none can be missing."""
        libraries = [status.path for status in _native.load().values() if status.path.exists()]
        assert libraries or _native.read_build_info() is None or not _native.read_build_info()["build_cpp"]
        for path in libraries:
            text = subprocess.run(
                ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
            ).stdout
            symbols = [line.split()[-1] for line in text.splitlines()]
            assert any(symbol.startswith(("torch_", "aoti_torch_")) for symbol in symbols)
            foreign = [s for s in symbols if s.startswith(("_ZN2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "Py", "_Py"))]
            assert foreign == []


class TestLoader:
    @pytest.mark.parametrize("running", ["2.10.0", "2.14.1+cu130", "2.21.0.dev20270101"])
    def test_fits_every_torch_from_the_target_on(self, running: str) -> None:
        assert _native.misfit(INFO, running) is None

    @pytest.mark.parametrize(
        ("running", "why"), [("2.9.1+cpu", "it needs torch 2.10 or later"), ("3.0.0", "the major versions differ")]
    )
    def test_misfit_names_both_versions(
        self, running: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        library_file("cpu", tmp_path, b"never opened")
        monkeypatch.setattr(torch, "__version__", running)
        with pytest.warns(RuntimeWarning, match="other backends are used"):
            status = _native.load_library("cpu", tmp_path, INFO)
        assert status.reason == f"built against torch 2.14.1, running torch {running}: {why}"

    def test_damaged_library_warns_and_names_both_versions(self, tmp_path: Path) -> None:
        library_file("cpu", tmp_path, b"not an ELF file at all")
        with pytest.warns(RuntimeWarning, match=r"libfastgan_cpu.so cannot be loaded"):
            status = _native.load_library("cpu", tmp_path, INFO)
        assert status.reason.startswith(f"built against torch 2.14.1, running torch {torch.__version__}: ")

    def test_missing_library_warns(self, tmp_path: Path) -> None:
        with pytest.warns(RuntimeWarning, match="reinstall fastgan"):
            status = _native.load_library("cpu", tmp_path, INFO)
        assert "libfastgan_cpu.so" in status.reason

    @pytest.mark.skipif(COMPILER is None, reason="a library with a missing symbol needs a C++ compiler")
    def test_missing_symbol_is_found_at_load_not_at_first_use(self, tmp_path: Path) -> None:
        source = tmp_path / "missing.cpp"
        source.write_text(
            'extern "C" void torch_function_of_the_future();\nvoid call() { torch_function_of_the_future(); }\n'
        )
        target = tmp_path / "libfastgan_cpu.so"
        subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", target], check=True)
        with pytest.warns(RuntimeWarning, match="torch_function_of_the_future"):
            status = _native.load_library("cpu", tmp_path, INFO)
        assert f"running torch {torch.__version__}" in status.reason

    def test_library_left_out_by_the_build_is_silent(self, tmp_path: Path) -> None:
        info = {**INFO, "cuda_reason": "FASTGAN_BUILD_CUDA=0"}
        assert _native.load_library("cuda", tmp_path, info).reason == "not built: FASTGAN_BUILD_CUDA=0"
        assert _native.load_library("cpu", tmp_path, None).reason == "not built"

    def test_cuda_library_waits_for_a_cuda_torch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        library_file("cuda", tmp_path, b"never opened")
        monkeypatch.setattr(torch.version, "cuda", None)
        reason = _native.load_library("cuda", tmp_path, INFO).reason
        assert reason == f"torch {torch.__version__} is built without CUDA"
