"""The CPU's ops once more, writing into memory that the caller has: what an inference engine's memory plan needs.

Everything is float32 in NCHW, dense within each sample; nothing is checked but by the kernels and nothing has a
gradient. Arguments are those of the ops of the same names, as their kernels take them (scales [N or 1, C or 1]).
``_scaled_conv2d_into`` is told its algorithm, one of ``_native.ALGORITHMS``, the tile m of Winograd's F(m x m, r x r)
and how weights are stored: of "bf16", Winograd's tiles, packed weights and those of few pixels are in bfloat16, rounded
once and kept with the weight; the other algorithms read the weight as it is. With ``rectify`` negative values of
in_scale * x count as 0. ``_convolution_candidates`` says which can serve a call, in lines "name<TAB>tile<TAB>predicted
ms", the one to choose first, which of a frozen weight (kept_weights.h) may be another one than ``scaled_conv2d``
chooses.

A grouped image has 16 channels of each pixel side by side, [N, C / 16, H, W, 16], in a tensor that tells only its
sizes, [N, C, H, W]: ``x_grouped`` and ``y_grouped`` say which is, x or ``out``. ``_grouped_images`` says which of a
call's two can be, without a residual, by that algorithm; ``_grouped_filter`` whether both of ``_upfirdn2d_into`` can.
Those of ``_norm_act_into``, its residual too, are all grouped or none.

``_quantized_conv2d_into`` convolves whole numbers, clamp(round(in_scale * x / step), low, high) with low <= 0 <= high
at most 255 apart, with a weight in int8, each of whose output channels stands for weight_scale [C_out] times its
values; sums are exact, everything behind them is float32. Of one sample it hands results on as the next such
convolution reads them: at ``byte_images``, uint8 [C, H, W] with channels side by side, each rounded with a step, a low
and a high, a byte being the whole number less its low. Nothing is written to ``out`` then. At ``x_bytes`` it finds x
so, [rows, columns, C] as ``_byte_layout`` has them: their numbers, and the row and the column of x's first pixel, or
zeros where x cannot be there; it fills what is around. ``_quantized_tiles`` says which tiles can serve a call, in
lines "tile<TAB>predicted ms", the one to choose first. These ops exist where the CPU library is loaded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan import _native
from fastgan.ops._library import LIBRARY

_GEOMETRY = (
    "int[2] stride, int[2] padding, int[2] output_padding, int[2] dilation, bool transposed, int groups, bool reflect"
)
_EPILOGUE = "str act, float alpha, float gain, float? clamp, float residual_gain"
_BYTES = "Tensor(b!)? x_bytes, Tensor(c!)[] byte_images, float[] steps, int[] lows, int[] highs"
_GROUPED = "bool x_grouped=False, bool y_grouped=False"
_SHIFTS = "Tensor? noise, Tensor? noise_strength, Tensor? bias, Tensor? residual"

for schema in (
    f"_scaled_conv2d_into(Tensor x, Tensor weight, Tensor? in_scale, Tensor? out_scale, {_SHIFTS}, {_GEOMETRY},"
    f" bool rectify, str algorithm, int tile, str storage, {_EPILOGUE}, Tensor(a!) out, {_GROUPED}) -> ()",
    f"_epilogue_into(Tensor x, Tensor? out_scale, {_SHIFTS}, {_EPILOGUE}, Tensor(a!) out) -> ()",
    "_norm_act_into(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str act, float alpha,"
    f" float gain, float residual_gain, Tensor(a!) out, {_GROUPED}) -> ()",
    f"_upfirdn2d_into(Tensor x, Tensor? f, {_SHIFTS}, int[2] up, int[2] down, int[4] padding, bool flip_filter,"
    f" float fir_gain, {_EPILOGUE}, Tensor(a!) out, {_GROUPED}) -> ()",
    "_dense_block_into(Tensor x, Tensor[] weights, Tensor[] biases, str act, float alpha, float gain,"
    " float residual_scale, str precision, Tensor(a!) out) -> ()",
    "_quantized_conv2d_into(Tensor x, Tensor weight, Tensor weight_scale, Tensor? in_scale, Tensor? out_scale,"
    " float step, int low, int high,"
    f" {_SHIFTS}, {_GEOMETRY}, int tile, {_EPILOGUE}, {_BYTES}, Tensor(a!) out) -> ()",
    f"_grouped_images(Tensor x, Tensor weight, {_GEOMETRY}, str algorithm, int tile) -> int[]",
    "_grouped_filter(Tensor f, int[2] up, int[2] down) -> bool",
    f"_byte_layout(Tensor x, Tensor weight, {_GEOMETRY}) -> int[]",
    f"_quantized_tiles(Tensor x, Tensor weight, {_GEOMETRY}) -> str",
    f"_convolution_candidates(Tensor x, Tensor weight, {_GEOMETRY}, str precision) -> str",
    "_run_recorded(Tensor memory, int recording, int first, int count, Tensor(a!)[] values, int[] places,"
    " int[] sizes) -> Tensor[]",
):
    LIBRARY.define(schema)

# Autograd's own kernel for ops without a gradient looks at every argument; a call costs a third more with it.
LIBRARY.impl("_run_recorded", torch.library.fallthrough_kernel, "Autograd")

_native.load()

scaled_conv2d_into = torch.ops.fastgan._scaled_conv2d_into.default
quantized_conv2d_into = torch.ops.fastgan._quantized_conv2d_into.default
epilogue_into = torch.ops.fastgan._epilogue_into.default
norm_act_into = torch.ops.fastgan._norm_act_into.default
upfirdn2d_into = torch.ops.fastgan._upfirdn2d_into.default
dense_block_into = torch.ops.fastgan._dense_block_into.default
grouped_filter = torch.ops.fastgan._grouped_filter.default
byte_layout = torch.ops.fastgan._byte_layout.default
_run_recorded = torch.ops.fastgan._run_recorded.default
# Those that only write into what they are given.
RECORDABLE = (
    *(scaled_conv2d_into, quantized_conv2d_into, epilogue_into, norm_act_into, upfirdn2d_into, dense_block_into),
)


class Recording:
    """Calls of RECORDABLE that run one behind the other, without Python in between. One thread at a time."""

    def __init__(self) -> None:
        self._library = _native.cpu_library()
        self._number = self._library.fastgan_new_recording()
        self._memory = torch.empty(0, device="cpu")
        self.count = 0
        weakref.finalize(self, self._library.fastgan_drop_recording, self._number)

    def add(self, kernel: Callable[..., None], args: Sequence[Any]) -> None:
        """A call that is not run now."""
        self._library.fastgan_record(self._number)
        try:
            kernel(*args)
        finally:
            self._library.fastgan_record(0)
        self.count += 1

    def run(
        self,
        first: int,
        count: int,
        values: Sequence[Tensor],
        places: Sequence[int],
        sizes: Sequence[int] = (),
    ) -> list[Tensor]:
        """Run calls [first, first + count).

        Args:
            values: tensors in place of some that were recorded, for this run.
            places: of each, three numbers: the call, the argument, the value; behind ``values`` come new ones.
            sizes: N, C, H and W of each new one, float32, contiguous.

        Returns:
            The new ones.
        """
        return _run_recorded(self._memory, self._number, first, count, values, places, sizes)


def grouped_images(*args) -> tuple[bool, bool]:
    """Whether x, and whether the result of a call of ``_scaled_conv2d_into`` without a residual may be grouped."""
    x, y = torch.ops.fastgan._grouped_images.default(*args)
    return bool(x), bool(y)


def convolution_candidates(*args) -> list[tuple[str, int, float]]:
    """(algorithm, tile, predicted ms or 0) of each algorithm that can serve a call, the one to choose first."""
    lines = torch.ops.fastgan._convolution_candidates.default(*args).splitlines()
    return [(name, int(tile), float(ms)) for name, tile, ms in (line.split("\t") for line in lines)]


def quantized_tiles(*args) -> list[tuple[int, float]]:
    """(tile, predicted ms) of each that ``_quantized_conv2d_into`` can serve a call with, the best first."""
    lines = torch.ops.fastgan._quantized_tiles.default(*args).splitlines()
    return [(int(tile), float(ms)) for tile, ms in (line.split("\t") for line in lines)]
