"""What the library of CUDA C++ kernels holds: per kernel and architecture its registers, instructions and threads.

The library itself is read, as it was built and installed here, so the architectures are those of its build
(TORCH_CUDA_ARCH_LIST). No GPU is needed, and no CUDA toolkit: Triton ships the readers.
"""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastgan.profile.devices import ARCHITECTURES
from fastgan.profile.machine_code import MachineCode, parse

# Dynamic shared memory is asked for at the launch and stands nowhere in the code: bytes, the most that a launch asks
# for, by a part of the kernel's name. norm_act keeps a plane as large as the GPU has memory for: here it is one of 8192
# values in half types; the gradient keeps two. tests/simt holds all of this against the launchers' own numbers.
DYNAMIC_SHARED = {
    "sigma_kernel<": 48128,
    "fir_kernel": 48128,
    "FlreluStrip<2, 12, 2, 12>": 21600,
    "FlreluStrip<4, 24, 2, 12>": 14096,
    "FlreluStrip<2, 12, 4, 24>": 17424,
    "flrelu_tile_kernel<": 49152,
    "norm_plane_kernel<": 16384,
    "norm_plane_grad_kernel<": 32768,
    "ConvTile<1, 8, 16, 128, 2, 4>": 47616,
    "ConvTile<1, 8, 16, 64, 2, 2>": 35328,
    "ConvTile<1, 8, 8, 64, 2, 2>": 25088,
    "ConvTile<4, 4, 4, 64, 2, 2>": 30720,
}

_MAX_THREADS = 0x05  # EIATTR_MAX_THREADS of an .nv.info section: __launch_bounds__
_VALUE_HAS_SIZE = 0x04  # EIFMT_SVAL: a 16-bit size and so many bytes follow; other formats carry 16 bits
_FUNCTION = re.compile(r"^ Function (\S+):\n(.*)$", re.MULTILINE)
_TEXT = re.compile(r"^//-+ \.text\.(\S+) -+$", re.MULTILINE)


@dataclass(frozen=True)
class CudaCode:
    """One kernel's code for one architecture.

    Attributes:
        kernel: its C++ name with template arguments.
        arch: 80 is sm_80.
        threads: per block, the most that it may be launched with (``__launch_bounds__``).
        code: what the machine code holds.
    """

    kernel: str
    arch: int
    threads: int
    code: MachineCode

    @property
    def warps(self) -> int:
        """Per block, at most."""
        return -(-self.threads // 32)

    @property
    def shared(self) -> int:
        """Bytes of shared memory per block, dynamic ones included, at most; without the system's part, which the
        readers count from sm_90 on."""
        system = ARCHITECTURES[self.arch].shared_reserved if self.arch >= 90 else 0
        dynamic = sum(size for part, size in DYNAMIC_SHARED.items() if part in self.kernel)
        return self.code.static_shared - system + dynamic

    @property
    def occupancy(self) -> float:
        """Resident warps as a share of what an SM holds; theoretical; 0 if it cannot be launched so."""
        return ARCHITECTURES[self.arch].occupancy(self.code.registers, self.shared, self.warps)


def read_library(library: Path) -> list[CudaCode]:
    """Every kernel of ``library`` for every architecture that it carries and that is known here, sorted.

    Raises:
        RuntimeError: a reader failed, or said nothing that is understood here; with its own words.
    """
    from triton import knobs

    found = []
    with tempfile.TemporaryDirectory() as folder:
        _run(folder, knobs.nvidia.cuobjdump.path, "-xelf", "all", str(library.resolve()))
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = int(cubin.suffixes[-2].removeprefix(".sm_").rstrip("af"))
            usages = dict(_FUNCTION.findall(_run(folder, knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)))
            if arch not in ARCHITECTURES or not usages:
                continue
            _, *texts = _TEXT.split(_run(folder, knobs.nvidia.nvdisasm.path, "--print-code", cubin))
            listings = dict(zip(texts[::2], texts[1::2], strict=True))
            threads = dict(_launch_bounds(cubin.read_bytes()))
            for symbol, usage in usages.items():
                if symbol in threads:
                    code = parse(usage, listings[symbol])
                    found.append(CudaCode(_readable(symbol), arch, threads[symbol], code))
    return sorted(found, key=lambda code: (code.kernel, code.arch))


def _run(folder: str, *command: str | Path) -> str:
    result = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        words = result.stderr.strip() or result.stdout.strip()
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {words}")
    return result.stdout


def _launch_bounds(cubin: bytes) -> Iterator[tuple[str, int]]:
    """(mangled kernel, threads per block) of the kernels that declare them, from their sections ``.nv.info.KERNEL``."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = headers[names][4]
    for name_at, _, _, _, at, length in headers:
        name = cubin[strings + name_at : cubin.index(b"\0", strings + name_at)].decode()
        if name.startswith(".nv.info."):
            for attribute, value in _attributes(cubin[at : at + length]):
                if attribute == _MAX_THREADS:
                    x, y, z = struct.unpack("<III", value)
                    yield name.removeprefix(".nv.info."), x * y * z


def _attributes(section: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(section):
        form, attribute, size = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == _VALUE_HAS_SIZE:
            yield attribute, section[at : at + size]
            at += size


def _readable(symbol: str) -> str:
    """``sigma_kernel<float, false>`` of the mangled name of ``void fastgan::sigma_kernel<float, false>(...)``."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not text:
        return symbol
    name = ctypes.string_at(text).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    name = name.replace("(anonymous namespace)::", "").replace("fastgan::", "").removeprefix("void ")
    depth = 0
    for at, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:at]
    return name
