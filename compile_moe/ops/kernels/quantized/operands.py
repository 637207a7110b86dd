"""Quantized operands as the kernels take them: strides, and constants of the scheme."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from compile_moe.ops.kernels.precision import Precision
from compile_moe.ops.kernels.quantized.weight_format import WeightFormat
from compile_moe.ops.kernels.tiles import Tile, row_stride


def strides(
    x: Tensor, x_scale: Tensor | None, w: Tensor, w_scale: Tensor, w_zp: Tensor | None
) -> tuple[int, ...]:
    """Of x, its scales, the weights, their scales and zero points; 0 along what is shared or absent."""
    return (
        row_stride(x),
        x.stride(1),
        *_token_scale_strides(x_scale),
        *w.stride(),
        *group_strides(w_scale, w_zp),
    )


def scale_strides(x_scale: Tensor, w_scale: Tensor) -> tuple[int, ...]:
    """Of the weights' scales, by experts, rows and groups, and of the tokens', by rows and groups."""
    return *_weight_scale_strides(w_scale), *_token_scale_strides(x_scale)


def group_strides(w_scale: Tensor, w_zp: Tensor | None) -> tuple[int, ...]:
    """Of the weights' scales and zero points, by experts, rows and groups."""
    return *_weight_scale_strides(w_scale), *_weight_scale_strides(w_zp)


def _token_scale_strides(scale: Tensor | None) -> tuple[int, int]:
    """Of scales (rows, groups); (1,) is one scale for all."""
    if scale is None or scale.dim() == 1:
        return 0, 0
    return row_stride(scale), scale.stride(1) if scale.size(1) > 1 else 0


def _weight_scale_strides(scale: Tensor | None) -> tuple[int, ...]:
    """Of scales or zero points (experts, rows, groups), or what there is of these."""
    if scale is None:
        return 0, 0, 0
    found = [stride if size > 1 else 0 for size, stride in zip(scale.shape, scale.stride(), strict=True)]
    return *found, *[0] * (3 - len(found))


def decodes_rows(weight_format: WeightFormat, x: Tensor, w: Tensor, w_scale: Tensor) -> bool:
    """Whether weights are stored as bytes or pairs of nibbles, decoded to the tokens' dtype, and rows of them have
    scales of their own; of whole rows such as can multiply sums.
    """
    return (
        dequantizes_in_16_bits(weight_format, x, w_scale)
        and w.dtype is torch.uint8
        and weight_format.rows == 1
        and weight_format.packed in (1, 2)
        and (weight_format.group > 0 or w_scale.is_floating_point())
    )


def dequantizes_in_16_bits(weight_format: WeightFormat, x: Tensor, w_scale: Tensor) -> bool:
    """Whether weights are decoded to the tokens' dtype and multiplied with their scales in it: with the results that
    float32, rounded once, gives. Not under the interpreter, which has no PTX.
    """
    if weight_format.decode_16_bits is None or x.element_size() != 2 or triton.knobs.runtime.interpret:
        return False
    if weight_format.powers_of_two:
        return x.dtype is torch.bfloat16  # whose exponents are those of float32
    return weight_format.group == 0 or w_scale.dtype is x.dtype


def constants(
    weight_format: WeightFormat,
    has_zero: bool,
    tile: Tile,
    depth: int,
    precision: Precision,
    in_16_bits: bool,
) -> dict[str, Any]:
    """Compile-time arguments of ``multiply``."""
    block_k, aligned = steps_of(tile.block_k, weight_format)
    return {
        "SCALES_SUMS": weight_format.scales_sums,
        "IN_16_BITS": in_16_bits,
        "HAS_ZERO": has_zero,
        "PACKED": weight_format.packed,
        "PACKED_ZEROS": weight_format.packed_zeros,
        "ROWS": weight_format.rows,
        "GROUP": weight_format.group,
        "ALIGNED": aligned,
        "PRECISION": precision,
        "BLOCK_K": block_k,
        "EVEN_K": aligned and depth % block_k == 0,
    }


_SMALLEST_STEP = (
    32  # what a tensor core multiplies at once of 8-bit numbers, and of both halves of packed ones
)


def steps_of(block_k: int, weight_format: WeightFormat) -> tuple[int, bool]:
    """The depth of a step of at most ``block_k``, and whether steps and groups are multiples of one another."""
    group = weight_format.group
    if not group:
        return block_k, True
    divisor = group & -group
    if divisor >= _SMALLEST_STEP:
        fitting = min(block_k, divisor)
        # Several groups a step, where scales multiply weights and not sums.
        return (block_k if divisor == group and not weight_format.scales_sums else fitting), True
    if divisor == group and not weight_format.scales_sums:
        return block_k, True
    while block_k > _SMALLEST_STEP and block_k // 2 >= group:
        block_k //= 2
    return block_k, False
