"""Which kernel argument is read with how wide loads: Triton's IR names the argument, its PTX the width.

Every load of the IR carries a source position, and PTX repeats that position before the instructions that the load
became. So the two are joined there, and no layout has to be understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_DEFINITION = re.compile(r"^\s*(%[\w-]+)(?::\d+)? = (?:\"?)([\w.]+)\"? ?(.*)$")
_VALUE = re.compile(r"%[\w-]+(?:#\d+)?")
_ITER_ARGS = re.compile(r"iter_args\((.*?)\) ->")
_ARGUMENTS = re.compile(r"tt\.func public @\w+\((.*)\)\s*(?:->.*)?attributes")
_LOAD = re.compile(
    r"(?:tt\.load|ttg\.async_copy_global_to_local) (%[\w-]+(?:#\d+)?).* : tensor<([\dx]*)x!tt\.ptr<(\w+)>"
)
_COPY = re.compile(r"!tt\.ptr<\w+>, (#\w+)> -> <[^#]*, (#\w+)")
_LAYOUT = re.compile(r"^(#\w+) = #ttg\.\w+<\{(.*)\}>$", re.MULTILINE)
_ORDER = re.compile(r"order = \[([\d, ]+)\]")
_ALIAS = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
_POSITION = re.compile(r'"[^"]*":(\d+):(\d+)')
_PTX_POSITION = re.compile(r"^\s*\.loc\s+\d+ (\d+) (\d+)")
_PTX_LOAD = re.compile(r"\bld\.(?:volatile\.|relaxed\.\w+\.|acquire\.\w+\.)?global[\w.:]*?(?:\.v(\d))?\.[busf](\d+) ")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)")
# Operations that pass a pointer on: which of their operands it is.
_POINTER_OPERAND = {"tt.addptr": (0,), "arith.select": (1, 2), "tt.load": (), "tt.int_to_ptr": ()}


@dataclass(frozen=True)
class TileLoad:
    """One load of a tile in the source.

    Attributes:
        line, column: where it stands in the Python source.
        arguments: the kernel's pointers that it may read through; none where the pointer itself was read from memory.
        elements: of the tile.
        element_bits: 16 for float16.
        widths: bits that a thread reads at once, of the instructions that it became, ascending.
        turned: whether it is copied to shared memory along another axis than the one it is read along.
    """

    line: int
    column: int
    arguments: tuple[str, ...]
    elements: int
    element_bits: int
    widths: tuple[int, ...]
    turned: bool = False

    @property
    def scalar(self) -> bool:
        """Whether every instruction of it reads a single element."""
        return bool(self.widths) and max(self.widths) <= self.element_bits


def tile_loads(ttgir: str, ptx: str) -> list[TileLoad]:
    """The tile loads of one kernel, in source order; scalars, which all threads read together, are left out."""
    pointers = _Pointers(ttgir)
    positions = _positions(ttgir)
    widths = _widths(ptx)
    axes = {name: _fast_axis(layout) for name, layout in _LAYOUT.findall(ttgir)}
    found: dict[tuple[int, int, tuple[str, ...], int], TileLoad] = {}
    for line in ttgir.splitlines():
        match = _LOAD.search(line)
        if match is None:
            continue
        value, shape, element = match.groups()
        position = positions.get(line[line.rfind("loc(") + 4 : -1])
        if position is None:
            continue
        elements = 1
        for extent in shape.split("x"):
            elements *= int(extent)
        bits = int(re.sub(r"\D", "", element.partition("E")[0]) or 64)
        arguments = tuple(sorted(pointers.roots(value)))
        copy = _COPY.search(line)
        turned = copy is not None and axes.get(copy.group(1)) != axes.get(copy.group(2))
        load = TileLoad(*position, arguments, elements, bits, tuple(sorted(widths.get(position, ()))), turned)
        found[(*position, arguments, elements)] = load
    return sorted(found.values(), key=lambda load: (load.line, load.column))


def _fast_axis(layout: str) -> int | None:
    """The axis along which neighbours lie, counted from the end; None for a layout that names none."""
    order = _ORDER.search(layout)
    if order is not None:
        axes = order.group(1).split(", ")
        return int(axes[0]) - len(axes)
    if "transposed = " in layout:
        return -2 if "transposed = true" in layout else -1
    return None


class _Pointers:
    """Follows a pointer of the IR back to the kernel's arguments."""

    def __init__(self, ttgir: str) -> None:
        header = _ARGUMENTS.search(ttgir)
        self.arguments = set(re.findall(r"(%[\w-]+): !tt\.ptr", header.group(1))) if header else set()
        self.sources: dict[str, list[str]] = {}
        for line in ttgir.splitlines():
            self._read(line)

    def _read(self, line: str) -> None:
        definition = _DEFINITION.match(line)
        if definition is None:
            return
        name, operation, rest = definition.groups()
        if operation == "scf.for":
            carried = _ITER_ARGS.search(rest)
            pairs = [pair.split(" = ") for pair in carried.group(1).split(", ")] if carried else []
            for index, (inner, initial) in enumerate(pairs):
                self.sources[inner] = [initial]
                self.sources[f"{name}#{index}"] = [initial]
            if len(pairs) == 1:
                self.sources[name] = [pairs[0][1]]
            return
        operands = _VALUE.findall(rest)
        chosen = _POINTER_OPERAND.get(operation)
        self.sources[name] = operands if chosen is None else [operands[i] for i in chosen if i < len(operands)]

    def roots(self, value: str) -> set[str]:
        seen: set[str] = set()
        found: set[str] = set()
        waiting = [value]
        while waiting:
            current = waiting.pop()
            if current in seen:
                continue
            seen.add(current)
            if current in self.arguments:
                found.add(current[1:])
            waiting += self.sources.get(current, self.sources.get(current.partition("#")[0], []))
        return found


def _positions(ttgir: str) -> dict[str, tuple[int, int]]:
    """Alias -> (line, column), innermost where functions were inlined."""
    aliases = dict(_ALIAS.findall(ttgir))
    found: dict[str, tuple[int, int]] = {}

    def resolve(text: str, depth: int = 0) -> tuple[int, int] | None:
        position = _POSITION.search(text)
        if position is not None:
            return int(position.group(1)), int(position.group(2))
        inner = re.search(r"#loc\d*", text)
        if inner is None or depth > 20:
            return None
        return resolve(aliases.get(inner.group(0), ""), depth + 1)

    for alias, text in aliases.items():
        position = resolve(text)
        if position is not None:
            found[alias] = position
    return found


def _widths(ptx: str) -> dict[tuple[int, int], set[int]]:
    found: dict[tuple[int, int], set[int]] = {}
    for position, bits in _ptx_loads(ptx):
        found.setdefault(position, set()).add(bits)
    return found


def _ptx_loads(ptx: str) -> Iterator[tuple[tuple[int, int], int]]:
    position, assembly = (0, 0), False
    for line in ptx.splitlines():
        if "inline asm" in line:
            assembly = "begin" in line
        at = _PTX_POSITION.match(line)
        if at is not None:
            # Within inline assembly LLVM counts the lines of the assembly on top of the true position.
            position = position if assembly else (int(at.group(1)), int(at.group(2)))
            continue
        load = _PTX_LOAD.search(line)
        if load is not None:
            yield position, int(load.group(1) or 1) * int(load.group(2))
            continue
        copy = _PTX_COPY.search(line)
        if copy is not None:
            yield position, 8 * int(copy.group(1), 0)
