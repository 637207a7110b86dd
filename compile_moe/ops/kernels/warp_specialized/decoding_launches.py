"""Where the kernels of ``decoding_gemms`` serve, and their launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.experimental.gluon._runtime import jit

from compile_moe.ops.kernels.epilogue import with_globals
from compile_moe.ops.kernels.launch import Launch
from compile_moe.ops.kernels.quantized import operands
from compile_moe.ops.kernels.quantized.weight_format import WeightFormat, decode_scale_16_bits
from compile_moe.ops.kernels.tiles import Tile, row_stride
from compile_moe.ops.kernels.warp_specialized import consumer as consumers
from compile_moe.ops.kernels.warp_specialized import decode_weights, decoding_producers, row_tiles
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
from compile_moe.ops.kernels.warp_specialized.stored_weights import COLUMNS


class Ring(NamedTuple):
    """By rows of tokens in a stage.

    stages: of the ring; slots: of a decoder's ring of stored weights, by how many share a byte: what shared memory has
    room for.
    decoders: warpgroups that decode, which take the steps in turn.
    gather, scatter: registers of a thread of the consumers and of those, by GEMM.
    """

    stages: int
    slots: dict[int, int]
    decoders: int
    gather: tuple[int, int]
    scatter: tuple[int, int]


#: With two decoders the assembler has 128 registers for a thread, which products of 256 tokens exceed.
RINGS = {
    256: Ring(3, {1: 6, 2: 8}, 1, (192, 128), (208, 96)),
    128: Ring(4, {1: 3, 2: 4}, 2, (128, 128), (128, 128)),
    64: Ring(5, {1: 3, 2: 4}, 2, (128, 128), (128, 128)),
}
_SMALLEST_GROUP = 32


def serve(weight_format: WeightFormat, x: Tensor, w: Tensor, w_scale: Tensor, out: Tensor) -> bool:
    """Whether x (rows, depth) and weights (E, rows of weights, ...) can be multiplied by them, on a device that can run
    them: decoded to the tokens' dtype, with one scale for a row, or groups of which a step has some or that have some
    steps.
    """
    group, columns = weight_format.group, COLUMNS.value
    if not operands.decodes_rows(weight_format, x, w, w_scale):
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
def with_format(kernel: Callable[..., None], weight_format: WeightFormat) -> Callable[..., None]:
    """``kernel``, undecorated, whose producer has the functions of a scheme."""
    replaced: dict[str, Any] = {
        "decode": weight_format.decode,
        "decode_16_bits": weight_format.decode_16_bits,
        "decode_scale_16_bits": weight_format.decode_scale_16_bits or decode_scale_16_bits,
    }
    for module, name in ((decode_weights, "decode_step"), (decoding_producers, "decoding_producer")):
        replaced[name] = jit(with_globals(getattr(module, name).fn, replaced))
    return with_globals(kernel, replaced)


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
        **_constants(tile, weight_format, bias, w1_zp, RINGS[tile.block_m].gather),
    }
    functions = (consumers, "consume_tile"), (consumers, "consumer")
    kernel = with_format(decoding_gather_gemm_kernel, weight_format)
    kernel = with_epilogue(kernel, functions, epilogue_body)
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
    options = _constants(tile, weight_format, bias, w2_zp, RINGS[tile.block_m].scatter)
    kernel = with_format(decoding_scatter_gemm_kernel, weight_format)
    return (
        row_tiles.launch_for(tile.block_m, tiles, expert_offsets, num_slots, w2.size(0)),
        Launch(with_epilogue(kernel, (), ""), (num_programs(out.device.index),), args, options),
    )


def _constants(
    tile: Tile,
    weight_format: WeightFormat,
    bias: Tensor | None,
    zero_points: Tensor | None,
    registers: tuple[int, int],
) -> dict[str, Any]:
    ring = RINGS[tile.block_m]
    return {
        "HAS_BIAS": bias is not None,
        "HAS_ZERO": zero_points is not None,
        "GROUP": weight_format.group,
        "PACKED": weight_format.packed,
        "PACKED_ZEROS": weight_format.packed_zeros,
        "ROWS": tile.block_m,
        "STAGES": ring.stages,
        "SLOTS": ring.slots[weight_format.packed],
        "DECODERS": ring.decoders,
        "REGISTERS": registers[0],
        "PRODUCER_REGISTERS": registers[1],
        "num_warps": 4,
    }
