"""Builds fastgan's two native libraries and the Python package around them.

The libraries are not Python extension modules: they hold kernels that register with torch's dispatcher, and
``fastgan/_native.py`` loads them with ``torch.ops.load_library``. They are written against the LibTorch stable ABI,
so one binary serves every Python and every torch from ``TORCH_TARGET`` on.

Environment:

    FASTGAN_BUILD_CPP       0 or 1. Default: 1 where a C++ compiler is found.
    FASTGAN_BUILD_CUDA      auto, 0 or 1. auto: where nvcc is found, torch has CUDA and the C++ library is built too.
    TORCH_CUDA_ARCH_LIST    GPU architectures, as torch's own extensions take them: "8.0;9.0+PTX".
    FASTGAN_DEBUG           1: assertions, symbols and little optimisation.
    FASTGAN_SANITIZE        1: FASTGAN_DEBUG=1 under AddressSanitizer and UBSan, without CUDA and never in place, since
                            the library then loads only into a process that preloads them, as `make sanitize` does.
    CXX, CUDAHOSTCXX        the compilers. Default: g++, c++ or clang++, whichever is found first.
    CUDA_HOME, CUDA_PATH    where to look for bin/nvcc before PATH.
    MAX_JOBS                parallel compilations. Default: all cores.

What these resolve to is printed and stored in ``fastgan/_build_info.json``, which ``fastgan doctor`` shows.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
INFO_NAME = "_build_info.json"

# The oldest torch that a binary runs on, as (major, minor); the C++ side wants it in the top bytes of a 64-bit word.
TORCH_TARGET = (2, 10)
TORCH_TARGET_WORD = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000ULL"

# One architecture whose cubin serves all of Ampere and Ada, one for Hopper, and its PTX for whatever comes later.
DEFAULT_ARCH_LIST = "8.0;9.0+PTX"


def read_switch(name: str, allowed: tuple[str, ...], default: str) -> str:
    """The value of an environment switch; anything outside ``allowed`` stops the build."""
    value = os.environ.get(name, "").strip().lower() or default
    if value not in allowed:
        raise SetupError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def find_cxx() -> str | None:
    """The C++ compiler: what CXX names, else the first of the usual ones. None where there is none."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)[0]] if named else ["g++", "c++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def find_nvcc() -> str | None:
    """nvcc under CUDA_HOME or CUDA_PATH, on PATH, or in the customary place. None where there is none."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (path := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return path
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def tool_version(command: str, pattern: str) -> str:
    """The first line of ``command --version`` that matches ``pattern``."""
    text = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(pattern, text, re.MULTILINE)
    return found.group(0).strip() if found else text.splitlines()[0].strip()


def gencode_flags(arch_list: str) -> list[str]:
    """``8.0;9.0+PTX`` as nvcc's ``-gencode`` flags: code for each architecture, PTX where it says so."""
    flags = []
    for entry in re.split(r"[;,\s]+", arch_list.strip()):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if not found:
            raise SetupError(f"TORCH_CUDA_ARCH_LIST must hold entries such as 8.0 or 9.0+PTX, got {entry!r}")
        arch = "".join(found.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if found.group(4):
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


@dataclass
class BuildConfig:
    """What the switches and the machine resolve to. The reasons are for people: they say why a part is left out."""

    build_cpp: bool
    build_cuda: bool
    cuda_required: bool
    debug: bool
    sanitize: bool
    cpp_reason: str | None = None
    cuda_reason: str | None = None
    cxx: str | None = None
    cxx_version: str | None = None
    nvcc: str | None = None
    nvcc_version: str | None = None
    cuda_arch_list: str | None = None
    torch_version: str | None = None
    torch_cuda: str | None = None
    torch_target: str = ".".join(map(str, TORCH_TARGET))
    flags: dict[str, list[str]] = field(default_factory=dict)


def resolve_config() -> BuildConfig:
    """Read the switches and look for the compilers. torch is looked at later, by the build itself."""
    cxx, nvcc = find_cxx(), find_nvcc()
    cpp = read_switch("FASTGAN_BUILD_CPP", ("0", "1"), "1" if cxx else "0")
    cuda = read_switch("FASTGAN_BUILD_CUDA", ("auto", "0", "1"), "auto")
    sanitize = read_switch("FASTGAN_SANITIZE", ("0", "1"), "0") == "1"
    debug = sanitize or read_switch("FASTGAN_DEBUG", ("0", "1"), "0") == "1"

    if cpp == "1" and not cxx:
        raise SetupError("FASTGAN_BUILD_CPP=1, but no C++ compiler was found: install g++ or set CXX")
    if cuda == "1" and not nvcc:
        raise SetupError("FASTGAN_BUILD_CUDA=1, but no nvcc was found: install the CUDA toolkit or set CUDA_HOME")
    if cuda == "1" and not cxx:
        raise SetupError("FASTGAN_BUILD_CUDA=1, but no C++ compiler was found for nvcc: install g++ or set CXX")
    if cuda == "1" and sanitize:
        raise SetupError("FASTGAN_BUILD_CUDA=1, but FASTGAN_SANITIZE=1 builds the C++ library alone")

    config = BuildConfig(cpp == "1", build_cuda=False, cuda_required=cuda == "1", debug=debug, sanitize=sanitize)
    if not config.build_cpp:
        chosen = "" if os.environ.get("FASTGAN_BUILD_CPP") else " was chosen, since no C++ compiler was found"
        config.cpp_reason = f"FASTGAN_BUILD_CPP=0{chosen}"
    if cuda == "0":
        config.cuda_reason = "FASTGAN_BUILD_CUDA=0"
    elif sanitize:
        config.cuda_reason = "FASTGAN_SANITIZE=1 builds the C++ library alone"
    elif not nvcc:
        config.cuda_reason = "FASTGAN_BUILD_CUDA=auto and no nvcc found"
    elif cuda == "auto" and not config.build_cpp:
        config.cuda_reason = "FASTGAN_BUILD_CUDA=auto follows FASTGAN_BUILD_CPP, which is 0"
    else:
        config.build_cuda = True

    if config.build_cpp or config.build_cuda:
        config.cxx, config.cxx_version = cxx, tool_version(cxx, r"^.+$")
    if config.build_cuda:
        config.nvcc, config.nvcc_version = nvcc, tool_version(nvcc, r"release \S+ V\S+")
        config.cuda_arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_ARCH_LIST
    return config


@dataclass
class TorchPaths:
    """Where the torch that we build against keeps its headers and libraries."""

    include: Path
    lib: Path


def settle_with_torch(config: BuildConfig) -> TorchPaths:
    """Import torch, refuse one that is missing or too old, and decide about CUDA now that its build is known."""
    try:
        import torch
    except ImportError as error:
        raise SetupError(
            "fastgan's C++ is compiled against torch, and torch cannot be imported by this build "
            f"({error}).\nInstall torch first and build without isolation:\n"
            "    pip install torch && pip install --no-build-isolation .\n"
            "or set FASTGAN_BUILD_CPP=0 for a package without compiled kernels."
        ) from error
    config.torch_version, config.torch_cuda = torch.__version__, torch.version.cuda
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_TARGET:
        raise SetupError(f"fastgan needs torch >= {config.torch_target} to build, got torch {torch.__version__}")
    if config.build_cuda and torch.version.cuda is None:
        config.cuda_reason = f"torch {torch.__version__} is built without CUDA"
        if config.cuda_required:
            raise SetupError(f"FASTGAN_BUILD_CUDA=1, but {config.cuda_reason}: there is no libtorch_cuda to link to")
        config.build_cuda = False
    home = Path(torch.__file__).parent
    return TorchPaths(include=home / "include", lib=home / "lib")


# A report ends the process: a test that goes on after one would pass.
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


def compile_flags(config: BuildConfig, torch_paths: TorchPaths) -> dict[str, list[str]]:
    """Flags by source suffix. No -march (dispatch is at run time) and no -ffast-math (NaN and infinity are kept)."""
    shared = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_WORD}", "-std=c++20"]
    shared += ["-O1", "-g", "-DFASTGAN_DEBUG_BUILD"] if config.debug else ["-O3", "-DNDEBUG"]
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", str(torch_paths.include)]
    host = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
    # Contraction to fused multiply-adds, no errno and no trapping comparisons are what lets loops with exp vectorise;
    # none of them changes what happens to NaN or infinity.
    vector = ["-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    cpp = [*host, *vector, *(["-D_GLIBCXX_ASSERTIONS"] if config.debug else [])]
    if config.sanitize:
        cpp += [*SANITIZERS, "-fno-omit-frame-pointer", "-DFASTGAN_SANITIZE"]
    flags = {".cpp": [*shared, *includes, *cpp]}
    if config.build_cuda:
        device = ["-DUSE_CUDA", "--expt-relaxed-constexpr", "-lineinfo", *gencode_flags(config.cuda_arch_list)]
        # -Wextra drowns in what nvcc itself generates, so the host half of a .cu file has -Wall only.
        device += [f"-Xcompiler={','.join(flag for flag in host if flag != '-Wextra')}"]
        flags[".cu"] = [*shared, *includes, *device]
    return flags


class NativeLibrary(Extension):
    """One shared library: every source in one folder of csrc/ that has one suffix."""

    def __init__(self, name: str, folder: str, suffix: str) -> None:
        sources = sorted((ROOT / folder).glob(f"*{suffix}"))
        if not sources:
            raise SetupError(f"{folder} holds no *{suffix} file, so {name} cannot be built: is csrc/ missing?")
        headers = sorted(path for ext in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{ext}"))
        super().__init__(
            f"fastgan.{name}",
            sources=[path.relative_to(ROOT).as_posix() for path in sources],
            depends=[path.relative_to(ROOT).as_posix() for path in headers],
        )
        self.suffix = suffix


@dataclass
class LibraryPlan:
    """The commands that make one library: compile each source to its object, then link the objects."""

    name: str
    compile: list[str]
    link: list[str]
    objects: dict[Path, Path]
    output: Path


class BuildNative(build_ext):
    """Compiles with ninja where it is found, else with one thread per core, and links the two shared libraries."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # ninja decides per file what is stale; setuptools' own check would skip whole libraries.
        self.force = True

    def get_ext_filename(self, ext_name: str) -> str:
        """``fastgan/libfastgan_cpu.so``: no Python version in the name, since nothing in it links to Python."""
        return str(Path(*ext_name.split("."))) + ".so"

    def run(self) -> None:
        if CONFIG.sanitize and self.inplace:
            raise SetupError("FASTGAN_SANITIZE=1 does not build in place: nothing could import fastgan afterwards")
        self.torch_paths = settle_with_torch(CONFIG)
        if not CONFIG.build_cuda:
            self.extensions = [ext for ext in self.extensions if ext.suffix != ".cu"]
        CONFIG.flags = compile_flags(CONFIG, self.torch_paths)
        report_config()
        super().run()
        write_build_info(Path(self.build_lib) / "fastgan")
        if self.inplace:
            remove_stale_libraries(ROOT / "fastgan", keep=[Path(name).name for name in super().get_outputs()])
            write_build_info(ROOT / "fastgan")

    def build_extensions(self) -> None:
        """All libraries in one go, so that the cores stay busy while nvcc works on its one file."""
        plans = [self.plan(ext) for ext in self.extensions]
        jobs = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
        # Beside the interpreter too: make and pip run a virtual environment that nobody activated.
        ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        if ninja:
            write_ninja_file(Path(self.build_temp) / "build.ninja", plans)
            subprocess.run([ninja, "-C", self.build_temp, f"-j{jobs}"], check=True)
        else:
            build_with_threads(plans, jobs)

    def plan(self, ext: NativeLibrary) -> LibraryPlan:
        """The commands for one library. Only libtorch is linked: the stable ABI is C functions that it exports.

        No rpath: the libraries are loaded after torch, whose own copies then answer for these names.
        """
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = (Path(self.build_temp) / ext.name).resolve()
        for folder in (output.parent, work):
            folder.mkdir(parents=True, exist_ok=True)
        head = [CONFIG.cxx]
        libraries = [f"-L{self.torch_paths.lib}", "-Xlinker", "--no-as-needed", "-ltorch_cpu"]
        if ext.suffix == ".cu":
            head = [CONFIG.nvcc, "-ccbin", CONFIG.cxx]
            # The CUDA runtime is linked statically, so the binary does not ask for the libcudart of one CUDA version.
            libraries += ["-ltorch_cuda", "-cudart", "static"]
        return LibraryPlan(
            name=ext.name.rpartition(".")[2],
            compile=[*head, *CONFIG.flags[ext.suffix]],
            link=[*head, "-shared", *(SANITIZERS if CONFIG.sanitize else []), *libraries],
            objects={work / (Path(source).name + ".o"): ROOT / source for source in ext.sources},
            output=output,
        )

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib) / "fastgan" / INFO_NAME)]


class BuildPython(build_py):
    """Writes the build information also where nothing is compiled, so that doctor can say why."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Without fastgan/kernels.py: in an installed package fastgan/kernels/ is there itself."""
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if entry[:2] != ("fastgan", "kernels")]

    def run(self) -> None:
        super().run()
        if not self.distribution.has_ext_modules():
            folder = ROOT / "fastgan" if self.editable_mode else Path(self.build_lib) / "fastgan"
            report_config()
            remove_stale_libraries(folder, keep=[])
            write_build_info(folder)


class PlatformWheel(bdist_wheel):
    """Nothing in the libraries links to Python, so a wheel serves every Python 3 on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def run_printed(command: list[str]) -> None:
    """Run one compiler command and show it, so that a failure can be repeated by hand."""
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)


def ninja_escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja_file(path: Path, plans: list[LibraryPlan]) -> None:
    """The plans as ninja's rules, with dependency files so that an edited header rebuilds what includes it."""
    lines = ["ninja_required_version = 1.3"]
    for plan in plans:
        compile_text, link_text = (shlex.join(command).replace("$", "$$") for command in (plan.compile, plan.link))
        lines += [
            f"rule compile_{plan.name}",
            f"  command = {compile_text} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"rule link_{plan.name}",
            f"  command = {link_text} $in -o $out",
        ]
        for target, source in plan.objects.items():
            lines.append(f"build {ninja_escape(target)}: compile_{plan.name} {ninja_escape(source)}")
        lines.append(f"build {ninja_escape(plan.output)}: link_{plan.name} {' '.join(map(ninja_escape, plan.objects))}")
    path.write_text("\n".join(lines) + "\n")


def build_with_threads(plans: list[LibraryPlan], jobs: int) -> None:
    """What ninja would do, without its knowledge of what is up to date."""
    commands = [
        [*plan.compile, "-c", str(source), "-o", str(target)]
        for plan in plans
        for target, source in plan.objects.items()
    ]
    with ThreadPoolExecutor(jobs) as pool:
        # list() takes every result, and so raises what a failed compilation raised.
        list(pool.map(run_printed, commands))
    for plan in plans:
        run_printed([*plan.link, *map(str, plan.objects), "-o", str(plan.output)])


def report_config() -> None:
    """Print the resolved configuration, one fact a line."""
    print("fastgan build configuration:")
    for key, value in asdict(CONFIG).items():
        print(f"  {key:16} {shlex.join(value) if isinstance(value, list) else value}", flush=True)


def remove_stale_libraries(folder: Path, keep: list[str]) -> None:
    """Delete what an earlier build with other switches left, so that nothing loads what this build left out."""
    for path in folder.glob("libfastgan_*.so"):
        if path.name not in keep:
            path.unlink()


def write_build_info(folder: Path) -> None:
    info = {**asdict(CONFIG), "built_at": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INFO_NAME).write_text(json.dumps(info, indent=2) + "\n")


CONFIG = resolve_config()

if __name__ == "__main__":
    libraries = []
    if CONFIG.build_cpp:
        libraries.append(NativeLibrary("libfastgan_cpu", "csrc/cpu", ".cpp"))
    if CONFIG.build_cuda:
        libraries.append(NativeLibrary("libfastgan_cuda", "csrc/cuda", ".cu"))
    setup(
        ext_modules=libraries,
        packages=[*find_packages(include=["fastgan", "fastgan.*"]), "fastgan.kernels"],
        package_dir={"fastgan.kernels": "kernels"},
        cmdclass={"bdist_wheel": PlatformWheel, "build_ext": BuildNative, "build_py": BuildPython},
    )
