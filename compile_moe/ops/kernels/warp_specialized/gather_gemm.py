"""GEMM 1 for many rows an expert on Hopper: tokens gathered by pointers, activation in the consumers."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import jit

from compile_moe.ops.kernels.epilogue import build_epilogue, with_globals
from compile_moe.ops.kernels.launch import Launch
from compile_moe.ops.kernels.tiles import Tile
from compile_moe.ops.kernels.warp_specialized import consumer as consumers
from compile_moe.ops.kernels.warp_specialized import row_tiles, store
from compile_moe.ops.kernels.warp_specialized.consumer import consumer
from compile_moe.ops.kernels.warp_specialized.descriptors import (
    gated_weights,
    num_programs,
    plain_weights,
    transposed_weights,
)
from compile_moe.ops.kernels.warp_specialized.gather_producer import producer_gather
from compile_moe.ops.kernels.warp_specialized.ring import allocate

DO_NOT_SPECIALIZE = (
    "num_slots",
    "num_n",
    "num_k",
    "columns8",
    "depth16",
    "row_stride16",
    "topk",
    "num_groups",
)
REGISTERS, PRODUCER_REGISTERS = 208, 88


def gather_gemm_kernel(
    out_ptr,  # (S, columns), expert order
    x_ptr,  # (M, K)
    w_desc,
    bias_ptr,
    slots_ptr,
    tiles_ptr,
    num_slots,
    num_n,
    num_k,
    columns8,
    depth16,
    row_stride16,
    topk,
    stride_be,
    stride_bn,
    EPILOGUE: gl.constexpr,  # "gated", "ungated"
    INTERLEAVED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    EVEN_K: gl.constexpr,
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty = allocate(
        x_ptr.dtype.element_ty, out_ptr.dtype.element_ty, STAGES, 129, ROWS=ROWS, PARTS=PARTS
    )
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty,
                    out_ptr, bias_ptr, slots_ptr, num_slots, num_k, columns8, stride_be, stride_bn,
                    (), (), 0, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED, True, TRANSPOSED, False,
                ),
            ),
            (
                consumer,
                (
                    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty,
                    out_ptr, bias_ptr, slots_ptr, num_slots, num_k, columns8, stride_be, stride_bn,
                    (), (), 1, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED, True, TRANSPOSED, False,
                ),
            ),
            (
                producer_gather,
                (
                    w_desc, x_ptr, slots_ptr, w_smem, x_smem, tail_smem, tile_smem, full, empty, tiles_ptr,
                    num_slots, num_n, num_k, row_stride16, depth16, topk, (), STAGES, EPILOGUE, EVEN_K, INTERLEAVED, 0,
                ),
            ),
        ],
        [4, 4],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@functools.cache
def with_epilogue(
    kernel: Any,
    functions: tuple[tuple[ModuleType, str], ...],
    body: str,
    others: tuple[tuple[str, Any], ...] = (),
) -> Any:
    """A kernel, of which every function from ``store.finish`` up calls the epilogue with ``body``.

    An empty body leaves the placeholder: the gate passes through.

    Args:
        functions: those behind the ones of ``store``, as modules and names, callees first.
        others: what else they call, by name.
    """
    replaced: dict[str, Any] = dict(others)
    if body:
        replaced["epilogue"] = build_epilogue(body)
    stores = tuple((store, name) for name in ("finish", "store_chunk", "store_tile"))
    for module, name in (*stores, *functions):
        replaced[name] = jit(with_globals(getattr(module, name).fn, replaced))
    return jit(with_globals(kernel, replaced), do_not_specialize=list(DO_NOT_SPECIALIZE))


def launches_for(
    tile: Tile,
    tiles: Tensor,
    out: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    bias: Tensor | None,
    epilogue_body: str,
    layout: str,
) -> tuple[Launch, Launch]:
    """Row tiles, then the GEMM."""
    num_slots, num_columns = out.shape
    gated = layout != "ungated"
    depth = hidden_states.size(1)
    transposed = w1.stride(2) != 1
    if transposed:
        weights = transposed_weights(w1)
    else:
        weights = gated_weights(w1, layout) if gated else plain_weights(w1)
    args = (
        out,
        hidden_states,
        weights,
        out if bias is None else bias,
        sorted_slots,
        tiles,
        num_slots,
        triton.cdiv(num_columns, tile.block_n // 2 if gated else tile.block_n),
        triton.cdiv(depth, 64),
        num_columns // 8,
        depth // 8,
        hidden_states.stride(0) // 8,
        topk,
        *((0, 0) if bias is None else bias.stride()),
    )
    options = {
        "EPILOGUE": ("pairs" if transposed else "gated") if gated else "ungated",
        "TRANSPOSED": transposed,
        "INTERLEAVED": layout == "interleaved",
        "HAS_BIAS": bias is not None,
        "ROWS": tile.block_m,
        "STAGES": tile.num_stages,
        "PARTS": tile.block_n // 128,
        "EVEN_K": depth % 64 == 0,
        "REGISTERS": REGISTERS,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
        "num_warps": 4,
    }
    functions = (consumers, "consume_tile"), (consumers, "consumer")
    kernel = with_epilogue(gather_gemm_kernel, functions, epilogue_body)
    return (
        row_tiles.launch_for(tile.block_m, tiles, expert_offsets, num_slots, w1.size(0)),
        Launch(kernel, (num_programs(out.device.index),), args, options),
    )
