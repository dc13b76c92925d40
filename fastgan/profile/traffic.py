"""Counts kernels, bytes and operations of a computation that does not run: *modelled* traffic with device memory.

The computation is real code on fake CUDA tensors (shapes, dtypes and strides without memory), watched below autograd.
What counts as what:

- An ATen call is one kernel that reads each of its tensors once and writes each result once; in place counts as both.
  An element that is broadcast (stride 0) counts once. Caches, workspaces and layout changes inside libraries are not
  seen, so for plain torch this is a lower bound.
- Views and allocations are nothing. ``copy_``, ``fill_`` and ``zero_`` do not read what they write.
- A convolution with a bias is two kernels, since ATen adds the bias behind cuDNN in place (aten/src/ATen/native/
  Convolution.cpp, ``_convolution``); constant padding is a fill and a copy (aten/src/ATen/native/PadNd.cpp).
- A fastgan op runs its Triton launcher, whose launches count with the bytes and operations that they state themselves;
  an op of CUDA C++ counts as one kernel, as an ATen call does; an op or a call without a kernel counts as the plain
  torch that stands in for it.
- Operations are those of torch.utils.flop_counter: a multiply-add is two, elementwise work is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastgan.kernels._launch import Launch, planned
from fastgan.ops._library import FALLBACKS, TRITON_KERNELS

CUDA = "_cuda"  # what the names of ops of CUDA C++ end with
_WRITES_ONLY = ("copy_", "fill_", "zero_")
_ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_PASSES_ON = (
    "detach",
    "detach_",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "sym_size",
    "sym_stride",
    "sym_numel",
    "is_same_size",
)


@dataclass(frozen=True)
class Kernel:
    """One kernel of the computation.

    Attributes:
        name: the Triton kernel's, or the ATen operator's.
        bytes, flops: modelled, as the module says.
        dtype: of its largest tensor: what its products are computed in.
        launch: the planned launch; None for a kernel of torch.
    """

    name: str
    bytes: int
    flops: int
    dtype: torch.dtype
    launch: Launch | None = None


def count(function: Callable[..., Any], make_inputs: Callable[[], Iterable[Any]]) -> list[Kernel]:
    """The kernels of ``function(*make_inputs())`` on a GPU, in order; nothing is allocated and nothing runs.

    Args:
        function: any torch code; called under the caller's grad mode.
        make_inputs: makes the tensors on the device "cuda" with torch's factories; what it does is not counted.
    """
    with FakeTensorMode():
        inputs = list(make_inputs())
        with _Watch() as watch:
            function(*inputs)
    return watch.kernels


def bytes_of(tensor: Tensor) -> int:
    """The bytes of ``tensor``'s distinct elements."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= 1 if stride == 0 and size > 0 else size
    return elements * tensor.element_size()


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._opname
        in_cuda = func.namespace == "fastgan" and name.endswith(CUDA)
        if func.namespace == "fastgan" and not in_cuda and (name in TRITON_KERNELS or name in FALLBACKS):
            return self._fastgan(name, args)
        result = func(*args, **kwargs)
        counted = in_cuda or func.namespace in ("aten", "prims")
        if counted and not (func.is_view or name in _ALLOCATES or name in _PASSES_ON):
            self._aten(func, args, kwargs, result)
        return result

    def _fastgan(self, name: str, args: Any) -> Any:
        # Watching goes on inside: a launcher may fill or cast with torch, and a fallback is torch altogether.
        with self, planned() as launches:
            before = len(self.kernels)
            result = TRITON_KERNELS[name](*args) if name in TRITON_KERNELS else FALLBACKS[name](*args)
            self.kernels[before:before] = [_of_launch(launch) for launch in launches]
        return result

    def _aten(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._opname
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        tensors = [*given, *made]
        if not made or not sum(x.numel() for x in made):
            return
        read = given[1:] if name in _WRITES_ONLY else given
        moved = sum(map(bytes_of, {id(x): x for x in read}.values())) + sum(map(bytes_of, made))
        dtype = max(tensors, key=lambda x: x.numel()).dtype
        counter = flop_registry.get(func.overloadpacket)
        flops = int(counter(*args, **kwargs, out_val=result)) if counter else 0
        if name == "convolution" and args[2] is not None:
            bias, y = args[2], made[0]
            self.kernels.append(Kernel(name, moved - bytes_of(bias), flops, dtype))
            self.kernels.append(Kernel("add_", bytes_of(bias) + 2 * bytes_of(y), 0, dtype))
        elif name == "constant_pad_nd":
            self.kernels.append(Kernel("fill_", bytes_of(made[0]), 0, dtype))
            self.kernels.append(Kernel("copy_", 2 * bytes_of(given[0]), 0, dtype))
        else:
            self.kernels.append(Kernel(name, moved, flops, dtype))


def _of_launch(launch: Launch) -> Kernel:
    tensors = [x for x in tree_leaves(dict(launch.arguments)) if isinstance(x, Tensor)]
    dtype = max(tensors, key=lambda x: x.numel()).dtype if tensors else torch.float32
    return Kernel(launch.kernel.__name__, launch.bytes, launch.flops, dtype, launch)
