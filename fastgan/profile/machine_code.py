"""What a cubin says about itself: registers, local memory, shared memory, and its instructions.

Triton ships both readers, cuobjdump (resource usage) and nvdisasm (instructions), so this needs no CUDA toolkit and no
GPU. Instructions are counted where they stand, not as often as they run.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

# Matrix products of a warp: Turing to Ada and GeForce Blackwell (HMMA, IMMA, QMMA, OMMA); of a warp group: Hopper
# (HGMMA, ...); of tensor memory: data-centre Blackwell (UTCHMMA, ...). DMMA is float64 and counts for nothing here.
_TENSOR = re.compile(r"(H|I|Q|O|B)(G)?MMA|UTC[HIQO]MMA")
_WIDTH = re.compile(r"\.(?:U|S)?(8|16|32|64|128|256)(?=\.|$)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_ADDRESS = re.compile(r"\s*/\*([0-9a-f]{4,})\*/")
_EXECUTABLE = 4  # SHF_EXECINSTR
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class MachineCode:
    """One kernel's code.

    Attributes:
        registers: per thread.
        stack: bytes of local memory per thread: where spilled registers go.
        static_shared: bytes of shared memory that the code itself declares, the system's part included.
        spills: instructions that write or read local memory.
        tensor: tensor-core instruction -> how many.
        loads: bits that a thread reads from global memory at once -> how many instructions; "TMA" for bulk copies.
        stores: the same for writing.
    """

    registers: int
    stack: int
    static_shared: int
    spills: int
    tensor: dict[str, int]
    loads: dict[int | str, int]
    stores: dict[int | str, int]

    @property
    def widest_load(self) -> int:
        """Bits; a bulk copy counts as 128, code that loads nothing as 0."""
        return _widest(self.loads)

    @property
    def widest_store(self) -> int:
        """Bits, as :attr:`widest_load`."""
        return _widest(self.stores)


def _widest(counts: dict[int | str, int]) -> int:
    return max((128 if width == "TMA" else int(width) for width in counts), default=0)


def read(cubins: Sequence[bytes], arch: int) -> list[MachineCode]:
    """Read compiled kernels of one architecture (80 is sm_80) at once: nvdisasm takes longer to begin, some 0.4 s, than
    to print eight of them.

    Raises:
        RuntimeError: a tool failed, or said nothing that is understood here; with its own words.
    """
    from triton import knobs

    instructions = [_instructions(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        usages = []
        for cubin in cubins:
            path.write_bytes(cubin)
            usages.append(_run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)))
        path.write_bytes(b"".join(instructions))
        listing = _run(knobs.nvidia.nvdisasm.path, "--no-dataflow", "--binary", f"SM{arch}", str(path))
    return list(map(parse, usages, _split(listing, map(len, instructions))))


def _instructions(cubin: bytes) -> bytes:
    """The executable sections of an ELF file of 64 bits (``Elf64_Ehdr`` and ``Elf64_Shdr`` of the System V ABI)."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    return b"".join(cubin[at : at + length] for _, _, flags, _, at, length in headers if flags & _EXECUTABLE)


def _split(listing: str, lengths: Iterable[int]) -> list[str]:
    """The listing of each piece of code, by the addresses."""
    ends = list(accumulate(lengths))
    parts: list[list[str]] = [[] for _ in ends]
    for line in listing.splitlines():
        address = _ADDRESS.match(line)
        if address is not None:
            parts[bisect_right(ends, int(address.group(1), 16))].append(line)
    return ["\n".join(part) for part in parts]


def parse(usage: str, listing: str) -> MachineCode:
    """One kernel's code, from what the two tools print of it."""
    found = _USAGE.search(usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage.strip()[:500]!r}")
    opcodes = Counter(_INSTRUCTION.findall(listing))
    if not opcodes:
        raise RuntimeError(f"nvdisasm printed no instructions: {listing.strip()[:500]!r}")
    registers, stack, shared, local = map(int, found.groups())
    tensor: Counter[str] = Counter()
    loads: Counter[int | str] = Counter()
    stores: Counter[int | str] = Counter()
    spills = 0
    for opcode, count in opcodes.items():
        base = opcode.partition(".")[0]
        if _TENSOR.fullmatch(base):
            tensor[base] += count
        elif base in ("LDG", "LDGSTS"):
            loads[_width(opcode)] += count
        elif base == "STG":
            stores[_width(opcode)] += count
        elif base in ("UTMALDG", "UBLKCP"):
            loads["TMA"] += count
        elif base in ("UTMASTG", "UTMAREDG"):
            stores["TMA"] += count
        elif base in ("STL", "LDL"):
            spills += count
    return MachineCode(registers, stack + local, shared, spills, dict(tensor), dict(loads), dict(stores))


def _width(opcode: str) -> int:
    """Bits per thread; an opcode without a size moves one register. ``LTC128B`` is a cache hint, not a size."""
    widths = _WIDTH.findall(opcode)
    return int(widths[-1]) if widths else 32


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout
