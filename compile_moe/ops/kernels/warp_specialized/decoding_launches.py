"""Where the kernels of ``decoding_gemms`` serve, and their launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor
from triton.experimental.gluon._runtime import jit

from compile_moe.ops.kernels.epilogue import with_globals
from compile_moe.ops.kernels.launch import Launch
from compile_moe.ops.kernels.quantized import operands
from compile_moe.ops.kernels.quantized.weight_format import WeightFormat, decode_scale_16_bits
from compile_moe.ops.kernels.tiles import Tile, row_stride
from compile_moe.ops.kernels.warp_specialized import consumer as consumers
from compile_moe.ops.kernels.warp_specialized import decode_weights, decoding_products, row_tiles
from compile_moe.ops.kernels.warp_specialized.decode_weights import COLUMNS
from compile_moe.ops.kernels.warp_specialized.decoding_gemms import (
    decoding_gather_gemm_kernel,
    decoding_scatter_gemm_kernel,
)
from compile_moe.ops.kernels.warp_specialized.descriptors import (
    gated_weights,
    num_programs,
    plain_weights,
    rows,
)
from compile_moe.ops.kernels.warp_specialized.gather_gemm import with_epilogue

#: By rows of tokens in a stage: what shared memory has room for, with weights of a byte.
STAGES = {256: 4, 128: 7, 64: 9}
#: Of a thread of the consumers and of the producer.
GATHER_REGISTERS, SCATTER_REGISTERS = (208, 88), (216, 72)
_SMALLEST_GROUP = 32


def serve(weight_format: WeightFormat, x: Tensor, w: Tensor, w_scale: Tensor, out: Tensor) -> bool:
    """Whether x (rows, depth) and weights (E, rows of weights, ...) can be multiplied by them, on a device that can run
    them: decoded to the tokens' dtype, with one scale for a row, or groups of which a step has some or that have some
    steps.
    """
    group, columns = weight_format.group, COLUMNS.value
    if weight_format.decode_pairs is None or not operands.decodes_rows(weight_format, x, w, w_scale):
        return False
    if group and (group < _SMALLEST_GROUP or (columns % group and group % columns)):
        return False
    sizes = (2 * row_stride(x), 2 * x.size(1), 2 * out.size(1), *w.stride()[:2])
    return (
        x.stride(1) == w.stride(2) == 1
        and all(size % 16 == 0 and size > 0 for size in sizes)
        and all(t.data_ptr() % 16 == 0 for t in (x, w, out))
    )


@functools.cache
def with_format(kernel: Callable[..., None], weight_format: WeightFormat, epilogue_body: str) -> Any:
    """``kernel``, undecorated, whose consumers have the functions of a scheme and an epilogue."""
    formulas = {
        "decode": weight_format.decode,
        "decode_pairs": weight_format.decode_pairs,
        "decode_scale_16_bits": weight_format.decode_scale_16_bits or decode_scale_16_bits,
    }
    decoded = {"decoded": jit(with_globals(decode_weights.decoded.fn, formulas))}
    others = (("multiply_decoded", jit(with_globals(decoding_products.multiply_decoded.fn, decoded))),)
    return with_epilogue(
        kernel, ((consumers, "consume_tile"), (consumers, "consumer")), epilogue_body, others
    )


def gather_launches_for(
    tile: Tile,
    tiles: Tensor,
    out: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w1_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    weight_format: WeightFormat,
    bias: Tensor | None,
    epilogue_body: str,
    layout: str,
) -> tuple[Launch, Launch]:
    """Row tiles, then GEMM 1."""
    num_slots, num_columns = out.shape
    gated = layout != "ungated"
    depth = hidden_states.size(1)
    step_bytes = COLUMNS.value // weight_format.packed
    args = (
        out,
        hidden_states,
        gated_weights(w1, layout, step_bytes) if gated else plain_weights(w1, step_bytes),
        out if bias is None else bias,
        w1_scale,
        out if w1_zp is None else w1_zp,
        sorted_slots,
        tiles,
        num_slots,
        triton.cdiv(num_columns, 64 if gated else 128),
        triton.cdiv(depth, COLUMNS.value),
        num_columns // 8,
        depth // (weight_format.group or depth),
        depth // 8,
        hidden_states.stride(0) // 8,
        topk,
        *((0, 0) if bias is None else bias.stride()),
        *operands.group_strides(w1_scale, w1_zp),
    )
    options = {
        "EPILOGUE": "gated" if gated else "ungated",
        "INTERLEAVED": layout == "interleaved",
        "EVEN_K": depth % COLUMNS.value == 0,
        **_constants(tile, weight_format, bias, w1_zp, GATHER_REGISTERS),
    }
    kernel = with_format(decoding_gather_gemm_kernel, weight_format, epilogue_body)
    return (
        row_tiles.launch_for(tile.block_m, tiles, expert_offsets, num_slots, w1.size(0)),
        Launch(kernel, (num_programs(out.device.index),), args, options),
    )


def scatter_launches_for(
    tile: Tile,
    tiles: Tensor,
    out: Tensor,
    intermediate: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    w2_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    weight_format: WeightFormat,
    bias: Tensor | None,
) -> tuple[Launch, Launch]:
    """Row tiles, then GEMM 2."""
    num_slots, num_columns = out.shape
    depth = intermediate.size(1)
    args = (
        out,
        rows(intermediate, 32),
        rows(intermediate, 256),
        plain_weights(w2, COLUMNS.value // weight_format.packed),
        out if bias is None else bias,
        w2_scale,
        out if w2_zp is None else w2_zp,
        sorted_slots,
        tiles,
        num_slots,
        triton.cdiv(num_columns, 128),
        triton.cdiv(depth, COLUMNS.value),
        num_columns // 8,
        depth // (weight_format.group or depth),
        *((0, 0) if bias is None else bias.stride()),
        *operands.group_strides(w2_scale, w2_zp),
    )
    options = _constants(tile, weight_format, bias, w2_zp, SCATTER_REGISTERS)
    kernel = with_format(decoding_scatter_gemm_kernel, weight_format, "")
    return (
        row_tiles.launch_for(tile.block_m, tiles, expert_offsets, num_slots, w2.size(0)),
        Launch(kernel, (num_programs(out.device.index),), args, options),
    )


def _constants(
    tile: Tile,
    weight_format: WeightFormat,
    bias: Tensor | None,
    zero_points: Tensor | None,
    registers: tuple[int, int],
) -> dict[str, Any]:
    return {
        "HAS_BIAS": bias is not None,
        "HAS_ZERO": zero_points is not None,
        "GROUP": weight_format.group,
        "PACKED": weight_format.packed,
        "PACKED_ZEROS": weight_format.packed_zeros,
        "ROWS": tile.block_m,
        "STAGES": STAGES[tile.block_m],
        "REGISTERS": registers[0],
        "PRODUCER_REGISTERS": registers[1],
        "num_warps": 4,
    }
