"""The arguments of a call against those of the example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastgan.infer.capture import Captured
from fastgan.infer.nodes import shape_of


class Arguments:
    """What calls of a captured model take, and how they become its graph's inputs."""

    def __init__(self, captured: Captured, device: torch.device) -> None:
        self._captured, self._device = captured, device
        arguments = captured.in_spec.child(0)
        plain = captured.in_spec.num_leaves == arguments.num_children and all(c.is_leaf() for c in arguments.children())
        self._only_tensors = arguments.num_children if plain and all(leaf is None for leaf in captured.leaves) else None
        placeholders = [node for node in captured.module.graph.nodes if node.op == "placeholder"]
        self._expected = [(shape_of(node), node.meta["val"].dtype) for node in placeholders]

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors among the arguments, without gradients, contiguous.

        Raises:
            ValueError: arguments that are not like the example's.
        """
        spec_of_example = self._captured.in_spec
        # What pytree would find as well, and takes as long for as a small layer.
        if not kwargs and len(args) == self._only_tensors and all([isinstance(leaf, Tensor) for leaf in args]):
            leaves, spec = args, spec_of_example
        else:
            # By name they may come in any order; a graph knows one.
            names = spec_of_example.child(1).context or []
            kwargs = {name: kwargs[name] for name in names} if set(names) == set(kwargs) else dict(kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec is not spec_of_example and spec != spec_of_example:
            raise ValueError(
                f"infer: arguments must be those of the example, {_signature(spec_of_example)}, got {_signature(spec)}"
            )
        inputs, expected = [], iter(self._expected)
        for number, (leaf, fixed) in enumerate(zip(leaves, self._captured.leaves, strict=True)):
            if fixed is not None:
                if type(leaf) is not type(fixed[0]) or leaf != fixed[0]:
                    raise ValueError(
                        f"infer: argument {number} must be {fixed[0]!r} as in the example, got {_told(leaf)}"
                    )
                continue
            if not isinstance(leaf, Tensor):
                raise ValueError(f"infer: argument {number} must be a tensor as in the example, got {leaf!r}")
            shape, dtype = next(expected)
            if leaf.shape != shape or leaf.dtype != dtype or not self._is_there(leaf):
                raise ValueError(
                    f"infer: argument {number} must be {list(shape)} of {dtype} on {self._device.type} as in the "
                    f"example, got {list(leaf.shape)} of {leaf.dtype} on {leaf.device}; optimize once for each size"
                )
            # Asked first: cheaper than a copy of what is fine already, between two calls of a small generator.
            plain = leaf.detach() if leaf.requires_grad else leaf
            inputs.append(plain if plain.is_contiguous() else plain.contiguous())
        return inputs

    def _is_there(self, tensor: Tensor) -> bool:
        return tensor.is_cpu if self._device.type == "cpu" else tensor.is_cuda


def _signature(spec: pytree.TreeSpec) -> str:
    args, kwargs = spec.child(0), spec.child(1)
    flat = all(child.is_leaf() for child in (*args.children(), *kwargs.children()))
    return f"{args.num_children} positional and {sorted(kwargs.context or [])} by name" + ("" if flat else f": {spec}")


def _told(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
