"""Passes that make one node of several: epilogues, padding, concatenations, dense blocks, what is done to x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fastgan import _native
from fastgan.infer import nodes
from fastgan.infer.capture import add_constant, constant_of, eliminate_dead
from fastgan.infer.lower import replace
from fastgan.infer.nodes import PLAIN, TENSORS, epilogue_of, is_a, shape_of
from fastgan.ops import _into


def fuse(module: fx.GraphModule) -> None:
    """Epilogues, padding and concatenations, until there is nothing more to find."""
    changed = True
    while changed:
        changed = False
        for node in list(module.graph.nodes):
            for rule in _RULES:
                if not node._erased and rule(module, node):
                    changed = True
        eliminate_dead(module.graph)


# ----------------------------------------------------------------------------------------------------------------------
# Epilogues


def _fuse_epilogue(module: fx.GraphModule, node: fx.Node) -> bool:
    """A pointwise node goes into the one that makes its image, where nobody else reads that."""
    if not is_a(node, nodes.pointwise):
        return False
    for producer, second in _sides(node):
        if not isinstance(producer, fx.Node) or len(producer.users) != 1 or producer in second.values():
            continue
        merged = _after_norm(producer, second) or _merged(module, producer, second, node)
        if merged is not None:
            new = replace(node, producer.target, merged, producer)
            new.meta["fused"].append(nodes.name_of(node))
            module.graph.erase_node(producer)
            return True
    return False


def _sides(node: fx.Node) -> list[tuple[Any, dict[str, Any]]]:
    """(image, epilogue behind it) of a pointwise node; of a plain sum either image may be the one that is added to, the
    later one first."""
    second = {**epilogue_of(node), "out_scale": node.kwargs.get("out_scale")}
    x, residual = node.kwargs["x"], second["residual"]
    sides = [(x, second)]
    plain = all(second[name] == value for name, value in PLAIN.items())
    if residual is not None and plain and not any(second[name] for name in ("out_scale", "noise", "bias")):
        sides.append((residual, {**second, "residual": x}))
        order = {n: i for i, n in enumerate(node.graph.nodes)}
        sides.sort(key=lambda side: order[side[0]], reverse=True)
    return sides


def _after_norm(producer: fx.Node, second: dict[str, Any]) -> dict[str, Any] | None:
    """A norm takes an activation and a gain, and behind them an image that is added."""
    if not is_a(producer, nodes.instance_norm) or producer.kwargs.get("residual") is not None:
        return None
    if any(second[name] is not None for name in ("clamp", "noise", "bias", "out_scale")):
        return None
    kwargs = {**producer.kwargs, "residual": second["residual"], "residual_gain": second["residual_gain"]}
    if second["act"] == "linear" and second["gain"] == 1.0:
        return kwargs
    if producer.kwargs.get("act", "linear") != "linear" or producer.kwargs.get("gain", 1.0) != 1.0:
        return None
    return {**kwargs, **{name: second[name] for name in ("act", "alpha", "gain")}}


def _merged(
    module: fx.GraphModule, producer: fx.Node, second: dict[str, Any], before: fx.Node
) -> dict[str, Any] | None:
    """The producer's arguments with the second epilogue behind its own, where one epilogue can say both:

    y₁ = clamp₁(g₁ · act₁(s₁ c + n₁ + b₁)) + r₁ R₁,    y = clamp(g · act(s y₁ + n + b)) + r R.
    """
    first = epilogue_of(producer)
    if first is None:
        return None
    affine = first["act"] == "linear" and first["clamp"] is None and first["residual"] is None
    if affine:
        merged = _into_affine(module, producer, first, second, before)
        if merged is not None:
            return merged
    # Only a gain and an image added: whatever the first epilogue does, they come behind it. A gain behind an image that
    # was added waits for the next image, as in a residual in a residual.
    simple = second["act"] == "linear" and all(second[name] is None for name in ("out_scale", "bias", "noise", "clamp"))
    if not simple or first["residual"] is not None or (second["gain"] != 1.0 and first["clamp"] is not None):
        return None
    changes = {"gain": first["gain"] * second["gain"]}
    if second["residual"] is not None:
        changes.update(residual=second["residual"], residual_gain=second["residual_gain"])
    return {**producer.kwargs, **changes}


def _into_affine(
    module: fx.GraphModule, producer: fx.Node, first: dict[str, Any], second: dict[str, Any], before: fx.Node
) -> dict[str, Any] | None:
    """y₁ = g₁ (s₁ c + n₁ + b₁): the second epilogue with s s₁ g₁ and s g₁ b₁ + b."""
    factor, bias = constant_of(second["out_scale"]), constant_of(first["bias"])
    has_scale = second["out_scale"] is not None
    if (has_scale and factor is None) or (first["bias"] is not None and bias is None):
        return None
    if factor is not None and factor.shape[0] != 1:
        return None
    channels = shape_of(producer)[1]
    total = torch.full((1, channels), first["gain"], dtype=torch.float64)
    if factor is not None:
        total = total * factor.double()
    scales = bool((total != 1).any())
    if first["noise"] is not None and (scales or second["noise"] is not None):
        return None
    kwargs = {**producer.kwargs, **{name: second[name] for name in PLAIN}, "residual": second["residual"]}
    if first["noise"] is None:
        kwargs.update(noise=second["noise"], noise_strength=second["noise_strength"])
    if scales:
        own = producer.kwargs.get("out_scale")
        own_value = constant_of(own)
        if is_a(producer, nodes.fir) or (own is not None and own_value is None):
            return None
        if own_value is not None:
            total = total * own_value.double()
        kwargs["out_scale"] = add_constant(module, total.float(), before)
    kwargs["bias"] = _sum_of_biases(module, bias, _gain_of_shifts(first, factor), second["bias"], before)
    if kwargs["bias"] is _IMPOSSIBLE:
        return None
    return {name: value for name, value in kwargs.items() if value is not None}


_IMPOSSIBLE = object()


def _gain_of_shifts(first: dict[str, Any], factor: torch.Tensor | None) -> torch.Tensor | float:
    """What the first epilogue's shifts are multiplied by."""
    return first["gain"] if factor is None else first["gain"] * factor[0].double()


def _sum_of_biases(
    module: fx.GraphModule, bias: torch.Tensor | None, factor: Any, other: fx.Node | None, before: fx.Node
) -> Any:
    """factor · bias + other as a node, None for neither."""
    if bias is None:
        return other
    total = bias.double() * factor
    if other is not None:
        value = constant_of(other)
        if value is None:
            return _IMPOSSIBLE
        total = total + value.double()
    return add_constant(module, total.float(), before)


# ----------------------------------------------------------------------------------------------------------------------
# Padding and concatenations


def _fuse_padding(module: fx.GraphModule, node: fx.Node) -> bool:
    """Zeros around the input of a convolution are the convolution's own padding."""
    if not is_a(node, nodes.convolution) or node.kwargs["transposed"] or not is_a(node.kwargs["x"], nodes.pad):
        return False
    pad = node.kwargs["x"]
    left, right, top, bottom = pad.kwargs["padding"]
    if pad.kwargs["mode"] != "zeros" or left != right or top != bottom:
        return False
    own = node.kwargs["padding"]
    new = replace(
        node, nodes.convolution, {**node.kwargs, "x": pad.kwargs["x"], "padding": (own[0] + top, own[1] + left)}
    )
    new.meta["fused"].append(nodes.name_of(pad))
    return True


def _push_into_concatenation(module: fx.GraphModule, node: fx.Node) -> bool:
    """What is done to every channel alike behind a concatenation is done where its parts are made."""
    if not is_a(node, nodes.pointwise) or not is_a(node.kwargs["x"], nodes.concatenate):
        return False
    joined, second = node.kwargs["x"], epilogue_of(node)
    if len(joined.users) > 1 or any(node.kwargs.get(name) for name in (*TENSORS, "out_scale")):
        return False
    settings = {name: second[name] for name in PLAIN}
    parts = []
    for part in joined.kwargs["tensors"]:
        with module.graph.inserting_before(node):
            new = module.graph.call_function(nodes.pointwise, kwargs={"x": part, **settings})
        new.meta.update(val=part.meta["val"], origin=nodes.name_of(node))
        parts.append(new)
    replace(node, nodes.concatenate, {"tensors": parts}, joined)
    module.graph.erase_node(joined)
    return True


def _flatten_concatenation(module: fx.GraphModule, node: fx.Node) -> bool:
    """A concatenation within another is part of it."""
    if not is_a(node, nodes.concatenate):
        return False
    parts: list[fx.Node] = []
    for part in node.kwargs["tensors"]:
        inner = is_a(part, nodes.concatenate) and len(part.users) == 1
        parts.extend(part.kwargs["tensors"] if inner else [part])
    if len(parts) == len(node.kwargs["tensors"]):
        return False
    replace(node, nodes.concatenate, {"tensors": parts})
    return True


def _drop_identity(module: fx.GraphModule, node: fx.Node) -> bool:
    """relu(lrelu(z)) = relu(z) is nothing to fuse, but a pointwise node that does nothing goes."""
    if not is_a(node, nodes.pointwise) or any(node.kwargs.get(name) for name in (*TENSORS, "out_scale")):
        return False
    settings = epilogue_of(node)
    if settings["act"] != "linear" or settings["gain"] != 1.0 or settings["clamp"] is not None:
        return False
    node.replace_all_uses_with(node.kwargs["x"])
    module.graph.erase_node(node)
    return True


_RULES: tuple[Callable[[fx.GraphModule, fx.Node], bool], ...] = (
    *(_drop_identity, _fuse_epilogue, _fuse_padding, _push_into_concatenation, _flatten_concatenation),
)


# ----------------------------------------------------------------------------------------------------------------------
# Dense blocks


def fuse_dense_blocks(module: fx.GraphModule, precision: str) -> None:
    """Convolutions each of which reads the image and the results of all before it, and the image added at the end."""
    for node in list(module.graph.nodes):
        layers = _dense_layers(node)
        if layers is None or not _shares_tiles(node.kwargs["residual"], layers, precision):
            continue
        x, last = node.kwargs["residual"], layers[-1].kwargs
        biases = [layer.kwargs.get("bias") for layer in layers]
        settings = epilogue_of(layers[0])
        kwargs = {
            "x": x,
            "weights": [layer.kwargs["weight"] for layer in layers],
            "biases": [] if biases[0] is None else biases,
            **{name: settings[name] for name in ("act", "alpha", "gain")},
            "residual_scale": last.get("gain", 1.0),
        }
        replace(node, nodes.dense_block, kwargs).meta["fused"] += [nodes.name_of(layer) for layer in layers[:-1]]
    eliminate_dead(module.graph)


def _shares_tiles(x: fx.Node, layers: list[fx.Node], precision: str) -> bool:
    """Whether the CPU's kernels are faster at the block than at its layers."""
    if x.meta["val"].device.type == "cuda" or _native.cpu_library() is None:
        return False
    weights = [constant_of(layer.kwargs["weight"]) for layer in layers]
    return bool(torch.ops.fastgan._dense_block_tile(torch.empty(shape_of(x), dtype=torch.float32), weights, precision))


def _dense_layers(node: fx.Node) -> list[fx.Node] | None:
    """The block's convolutions, the given node being the last; None if it ends no dense block."""
    if not _is_dense_convolution(node) or not is_a(node.kwargs["x"], nodes.concatenate):
        return None
    x, *inner = node.kwargs["x"].kwargs["tensors"]
    settings = epilogue_of(node)
    if settings["residual"] is not x or settings["residual_gain"] != 1.0 or settings["act"] != "linear":
        return None
    for i, layer in enumerate(inner):
        if not _is_dense_convolution(layer) or epilogue_of(layer)["residual"] is not None:
            return None
        read = layer.kwargs["x"]
        expected = [x, *inner[:i]]
        if (list(read.kwargs["tensors"]) if is_a(read, nodes.concatenate) else [read]) != expected:
            return None
        if any(not is_a(user, nodes.concatenate, nodes.convolution) for user in layer.users):
            return None
        same = ("act", "alpha", "gain", "clamp")
        if [epilogue_of(layer)[name] for name in same] != [epilogue_of(inner[0])[name] for name in same]:
            return None
        if len(layer.users) != len(inner) - i:
            return None
    layers = [*inner, node]
    has_bias = {layer.kwargs.get("bias") is not None for layer in layers}
    return layers if len(inner) >= 2 and len(has_bias) == 1 else None


def _is_dense_convolution(node: Any) -> bool:
    if not is_a(node, nodes.convolution) or node.kwargs["transposed"] or node.kwargs["groups"] != 1:
        return False
    if any(node.kwargs.get(name) is not None for name in ("in_scale", "out_scale", "noise", "clamp")):
        return False
    weight = constant_of(node.kwargs["weight"])
    same = all(node.kwargs[name] == (1, 1) for name in ("stride", "padding", "dilation"))
    return same and tuple(weight.shape[2:]) == (3, 3) and shape_of(node)[1] == weight.shape[0]


# ----------------------------------------------------------------------------------------------------------------------
# What the CPU's kernels do as they read x


def fuse_rectifiers(module: fx.GraphModule) -> None:
    """ReLUs that nothing reads but a convolution: one right in front of it, or those of a concatenation's parts. What
    they read has other readers, else they would be in its epilogue; it is not copied then."""
    if _native.cpu_library() is None:
        return
    for node in list(module.graph.nodes):
        if not is_a(node, nodes.convolution) or node.kwargs.get("in_scale") is not None:
            continue
        x = node.kwargs["x"]
        if len(x.users) > 1 or x.meta["val"].device.type == "cuda":
            continue
        parts = x.kwargs["tensors"] if is_a(x, nodes.concatenate) else [x]
        relus = [part for part in parts if _is_relu(part) and len(part.users) == 1]
        if not relus or not all(part in relus or _is_rectified(part) for part in parts):
            continue
        exact = [part.kwargs["x"] if part in relus else part for part in parts]
        if is_a(x, nodes.concatenate):
            with module.graph.inserting_before(node):
                joined = module.graph.call_function(nodes.concatenate, kwargs={"tensors": exact})
            joined.meta.update(x.meta)
            exact = [joined]
        new = replace(node, nodes.convolution, {**node.kwargs, "x": exact[0], "rectify": True})
        new.meta["fused"][:0] = [nodes.name_of(relu) for relu in relus]
    eliminate_dead(module.graph)


def _is_relu(node: Any) -> bool:
    """Whether a node is a ReLU and nothing else."""
    settings = epilogue_of(node) if is_a(node, nodes.pointwise) else None
    if settings is None or node.kwargs.get("out_scale") is not None:
        return False
    return {**settings, "alpha": 0.0} == {**PLAIN, "act": "relu"} | dict.fromkeys(TENSORS)


def _is_rectified(node: Any) -> bool:
    """Whether a node's epilogue ends in a ReLU: another one changes nothing."""
    settings = epilogue_of(node)
    return settings is not None and settings["act"] == "relu" and settings["gain"] > 0 and settings["residual"] is None


def fuse_reflections(module: fx.GraphModule, precision: str) -> None:
    """Mirror images around the input of a convolution, where the kernel that the CPU takes for it can read x so. The
    last pass: others count padding as zeros."""
    if _native.cpu_library() is None:
        return
    for node in list(module.graph.nodes):
        if not is_a(node, nodes.convolution) or not is_a(node.kwargs["x"], nodes.pad):
            continue
        pad = node.kwargs["x"]
        x, (left, right, top, bottom) = pad.kwargs["x"], pad.kwargs["padding"]
        symmetric = left == right and top == bottom and node.kwargs["padding"] == (0, 0)
        if pad.kwargs["mode"] != "reflect" or not symmetric or x.meta["val"].device.type == "cuda":
            continue
        kwargs = {**node.kwargs, "x": x, "padding": (top, left), "reflect": True}
        if _algorithms(node.kwargs, precision)[0] in _algorithms(kwargs, precision):
            replace(node, nodes.convolution, kwargs).meta["fused"].insert(0, nodes.name_of(pad))
    eliminate_dead(module.graph)


def _algorithms(kwargs: dict[str, Any], precision: str) -> list[str]:
    """The CPU's algorithms for a convolution, the one to choose first."""
    x, weight = torch.empty(shape_of(kwargs["x"]), dtype=torch.float32), constant_of(kwargs["weight"])
    geometry = (kwargs[name] for name in nodes.GEOMETRY)
    return [name for name, *_ in _into.convolution_candidates(x, weight, *geometry, precision)]
