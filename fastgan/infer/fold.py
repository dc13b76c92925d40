"""What is known before any image comes: constants, factors that go into weights, convolutions that are smaller ones."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, fx
from torch._prims_common import is_non_overlapping_and_dense_or_false

from fastgan.infer import nodes
from fastgan.infer.capture import add_constant, aten, constant_of, eliminate_dead
from fastgan.infer.lower import replace
from fastgan.infer.nodes import is_a, is_image, is_random, shape_of


def fold_constants(module: fx.GraphModule) -> None:
    """Compute every node that depends on constants alone: spectral norms, equalised learning rates, what a fixed style
    makes of the weights."""
    graph = module.graph
    folded: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or is_random(node):
            continue
        inputs = node.all_input_nodes
        if not all(constant_of(i) is not None or i in folded for i in inputs):
            continue

        def value(of: fx.Node) -> Any:
            return folded[of] if of in folded else constant_of(of)

        with torch.no_grad():
            folded[node] = node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
    for node, result in folded.items():
        # Operators of several results are read through their items only.
        if isinstance(result, Tensor) and any(user not in folded for user in node.users):
            # A transposed matrix stays one: torch multiplies by it as it lies.
            dense = is_non_overlapping_and_dense_or_false(result)
            constant = add_constant(module, result.detach() if dense else result.detach().contiguous(), node)
            constant.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(constant)
    for node in reversed(list(folded)):
        if not node.users:
            graph.erase_node(node)
    eliminate_dead(graph)


def fold_factors(module: fx.GraphModule) -> None:
    """Multiply constant out_scales into the weights, in float64: batch norm, 1/σ, equalised learning rate."""
    for node in list(module.graph.nodes):
        if not is_a(node, nodes.convolution):
            continue
        kwargs = dict(node.kwargs)
        factor = constant_of(kwargs.get("out_scale"))
        weight = constant_of(kwargs["weight"])
        if factor is None or factor.shape[0] != 1:
            continue
        channels = weight.shape[1] * kwargs["groups"] if kwargs["transposed"] else weight.shape[0]
        factors = factor.double().expand(1, channels)[0]
        if kwargs["transposed"]:
            # Group g's weights [C_in of g, C_out / groups, ...] meet channels g · C_out / groups and on.
            per_input = factors.reshape(kwargs["groups"], 1, -1).expand(-1, weight.shape[0] // kwargs["groups"], -1)
            scaled = weight.double() * per_input.reshape(weight.shape[0], -1, 1, 1)
        else:
            scaled = weight.double() * factors[:, None, None, None]
        kwargs["weight"] = add_constant(module, scaled.float(), node)
        del kwargs["out_scale"]
        replace(node, nodes.convolution, kwargs)
    eliminate_dead(module.graph)


# ----------------------------------------------------------------------------------------------------------------------
# Nearest up-sampling in front of a convolution


def fold_upsampling(module: fx.GraphModule) -> None:
    """A convolution behind nearest up-sampling by 2 is a transposed convolution of stride 2 over the small image, of
    taps that add up where they would read the same pixel: 4×4 of them, 4 for each result, in the place of 3×3."""
    for node in list(module.graph.nodes):
        if not is_a(node, nodes.convolution) or not _doubles(node.kwargs["x"]):
            continue
        kwargs, up = dict(node.kwargs), node.kwargs["x"]
        weight = constant_of(kwargs["weight"])
        plain = kwargs["stride"] == kwargs["dilation"] == (1, 1) and kwargs["groups"] == 1 and not kwargs["transposed"]
        centred = tuple(2 * p + 1 for p in kwargs["padding"]) == tuple(weight.shape[2:])
        if not plain or not centred or len(up.users) > 1 or weight.shape[2:] == (1, 1) or kwargs.get("in_scale"):
            continue
        merged, padding = _merged_taps(weight, kwargs["padding"])
        kwargs.update(x=up.args[0], weight=add_constant(module, merged, node), stride=(2, 2), padding=padding)
        kwargs.update(transposed=True, output_padding=(0, 0))
        new = replace(node, nodes.convolution, kwargs)
        new.meta["fused"].insert(0, nodes.name_of(up))
    eliminate_dead(module.graph)


def _doubles(x: fx.Node) -> bool:
    if not is_a(x, aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default) or not is_image(x.args[0]):
        return False
    return shape_of(x)[2:] == tuple(2 * side for side in shape_of(x.args[0])[2:])


def _merged_taps(weight: Tensor, padding: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The transposed kernel [I, O, k', k'] and its padding.

    Result Y = 2r + a reads, with tap i, row Y + i − p of the doubled image, row q + r of the small one with
    q = ⌊(a + i − p) / 2⌋. A transposed convolution of stride 2 and padding P brings row q + r to Y by its tap
    Y + P − 2(q + r) = a + P − 2q.
    """
    merged, paddings = weight.double().transpose(0, 1), []
    for axis, p in zip((2, 3), padding, strict=True):
        taps = [(a, i, (a + i - p) // 2) for a, i in itertools.product(range(2), range(merged.shape[axis]))]
        first = min(a - 2 * q for a, _, q in taps)
        size = max(a - 2 * q for a, _, q in taps) - first + 1
        shape = list(merged.shape)
        shape[axis] = size
        result = merged.new_zeros(shape)
        for a, i, q in taps:
            result.select(axis, a - 2 * q - first).add_(merged.select(axis, i))
        merged = result
        paddings.append(-first)
    return merged.float().contiguous(), (paddings[0], paddings[1])


# ----------------------------------------------------------------------------------------------------------------------
# Taps that only ever meet padding


def crop_kernels(module: fx.GraphModule) -> None:
    """Cut the rows and columns of a kernel that read nothing but padding: at a U-Net's bottleneck three quarters of the
    weights."""
    for node in list(module.graph.nodes):
        if not is_a(node, nodes.convolution):
            continue
        kwargs = dict(node.kwargs)
        weight = constant_of(kwargs["weight"])
        size_in, size_out = shape_of(kwargs["x"])[2:], shape_of(node)[2:]
        ranges = [_used_taps(kwargs, axis, weight.shape[2 + axis], size_in[axis], size_out[axis]) for axis in (0, 1)]
        if any(used is None for used in ranges):
            continue
        (top, bottom), (left, right) = ranges
        if (bottom - top, right - left) == tuple(weight.shape[2:]):
            continue
        padding = tuple(
            p - d * first for p, d, first in zip(kwargs["padding"], kwargs["dilation"], (top, left), strict=True)
        )
        cropped = weight[:, :, top:bottom, left:right].contiguous()
        kwargs.update(weight=add_constant(module, cropped, node), padding=padding)
        if min(padding) < 0 or not _fits(kwargs, cropped, size_in, size_out):
            continue
        replace(node, nodes.convolution, kwargs)
    eliminate_dead(module.graph)


def _used_taps(kwargs: dict[str, Any], axis: int, taps: int, size_in: int, size_out: int) -> tuple[int, int] | None:
    """[first, last + 1) of the taps along an axis that meet a pixel; None for a kernel none of whose taps does."""
    stride, padding, dilation = (kwargs[name][axis] for name in ("stride", "padding", "dilation"))
    small, large = (size_in, size_out) if kwargs["transposed"] else (size_out, size_in)
    used = [tap for tap in range(taps) if any(0 <= i * stride - padding + tap * dilation < large for i in range(small))]
    return (used[0], used[-1] + 1) if used else None


def _fits(kwargs: dict[str, Any], weight: Tensor, size_in: tuple[int, ...], size_out: tuple[int, ...]) -> bool:
    """Whether the convolution gives the size that it has to; a transposed one gets the output_padding for it."""
    extra = []
    for axis in (0, 1):
        stride, padding, dilation = (kwargs[name][axis] for name in ("stride", "padding", "dilation"))
        span = dilation * (weight.shape[2 + axis] - 1) + 1
        if kwargs["transposed"]:
            extra.append(size_out[axis] - ((size_in[axis] - 1) * stride - 2 * padding + span))
        elif (size_in[axis] + 2 * padding - span) // stride + 1 != size_out[axis]:
            return False
    if not kwargs["transposed"]:
        return True
    kwargs["output_padding"] = tuple(extra)
    return all(0 <= e < s for e, s in zip(extra, kwargs["stride"], strict=True))
