"""The convolutions of a network in ncnn's two files: ``.param``, a text of layers, and ``.bin``, their weights.

A ``.param`` has a magic number, the numbers of layers and of blobs, and a line per layer: type, name, number of inputs,
number of results, their names, and ``key=value`` pairs. Of a Convolution, 0 is the number of results, 5 whether there
is a bias, 6 the number of weights. A ``.bin`` has, for each, a tag, the weights in the order [C_out, C_in, kH, kW] and
the bias in float32, without a tag; the tag 0 stands before weights in float32, 0x01306B47 before weights in float16
padded to a multiple of four bytes. Source: ncnn's "param and model file structure" and "operation param weight table".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAGIC = "7767517"
FLOAT32, FLOAT16 = 0, 0x01306B47
# Layers of the networks that are read here which have nothing in the .bin.
_WITHOUT_WEIGHTS = frozenset({"Input", "Split", "Concat", "Eltwise", "BinaryOp", "Interp"})


def read_convolutions(param: Path, binary: Path) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name, weights float32 [C_out * C_in * kH * kW], bias float32 [C_out] or None), in the order of the file.

    Raises:
        ValueError: not ncnn's files, a layer or a storage of another kind, a file that is too short or too long.
    """
    lines = param.read_text().splitlines()
    if not lines or lines[0].strip() != MAGIC:
        raise ValueError(f"ncnn: {param.name} must begin with {MAGIC}, got {lines[0][:20] if lines else ''!r}")
    layers = [line.split() for line in lines[2:] if line.strip()]
    count = int(lines[1].split()[0])
    if len(layers) != count:
        raise ValueError(f"ncnn: {param.name} must have {count} layers, got {len(layers)}")
    blobs = _Blobs(binary)
    for kind, name, inputs, results, *rest in layers:
        if kind == "Convolution":
            pairs = dict(pair.split("=", 1) for pair in rest[int(inputs) + int(results) :])
            weight = blobs.tagged(int(pairs["6"]))
            yield name, weight, blobs.float32(int(pairs["0"])) if pairs.get("5", "0") == "1" else None
        elif kind not in _WITHOUT_WEIGHTS:
            raise ValueError(f"ncnn: {name} must be a Convolution or without weights, got {kind}")
    blobs.end()


class _Blobs:
    """Reads a ``.bin`` from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        self._name, self._data, self._at = path.name, path.read_bytes(), 0

    def _take(self, size: int) -> bytes:
        if self._at + size > len(self._data):
            raise ValueError(f"ncnn: {self._name} must have {self._at + size} bytes or more, got {len(self._data)}")
        self._at += size
        return self._data[self._at - size : self._at]

    def float32(self, count: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(self._take(4 * count), "<f4").astype(np.float32))

    def tagged(self, count: int) -> Tensor:
        (tag,) = struct.unpack("<I", self._take(4))
        if tag == FLOAT32:
            return self.float32(count)
        if tag != FLOAT16:
            raise ValueError(f"ncnn: {self._name} must store float32 or float16, got the tag {tag:#010x}")
        padded = self._take(-(-2 * count // 4) * 4)
        return torch.from_numpy(np.frombuffer(padded, "<f2", count).astype(np.float32))

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError(f"ncnn: {self._name} must have {self._at} bytes, got {len(self._data)}")
