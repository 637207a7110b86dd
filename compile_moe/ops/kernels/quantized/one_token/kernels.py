"""The kernels: the first GEMM with the activation, a slot a program; the second with finalize, all slots a program.

Rows of a program belong to segments, a part of the depth of a slot each, which has a token of its own.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.early_launch import await_earlier_kernels
from compile_moe.ops.kernels.epilogue import epilogue
from compile_moe.ops.kernels.one_token.kernels import expert_of, router_weight
from compile_moe.ops.kernels.quantized.few_rows.loads import weight_row
from compile_moe.ops.kernels.quantized.one_token.layouts import (
    ROWS_OF_WARP,
    STEP_BYTES,
    stored_scales,
    stored_segments,
    stored_token_words,
    stored_tokens,
    stored_weights,
)
from compile_moe.ops.kernels.quantized.one_token.loads import in_words
from compile_moe.ops.kernels.quantized.one_token.multiply import multiply


def up_kernel(
    out_ptr,  # (topk, num_columns), contiguous
    x_ptr,  # (1, depth)
    x_scale_ptr,
    w_ptr,  # (E, N, depth / packed)
    scale_ptr,
    zero_ptr,
    bias_ptr,  # (E, N)
    topk_ids_ptr,  # (1, topk)
    expert_map_ptr,  # (num_global,)
    topk,
    num_global,
    num_experts,
    num_columns,  # I, or N without a gate; a multiple of COLUMNS
    depth,  # K
    stride_xsk,
    stride_ij,
    stride_we,
    stride_wn,
    stride_se,
    stride_sn,
    stride_sk,
    stride_ze,
    stride_zn,
    stride_zk,
    stride_be,
    stride_bn,
    LAYOUT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_MAP: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    PACKED: gl.constexpr,
    PACKED_ZEROS: gl.constexpr,
    GROUP: gl.constexpr,
    SCALE_ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    LARGEST: gl.constexpr,
    PARTS: gl.constexpr,
    EARLY: gl.constexpr,
):
    """16 rows of an expert's weights times the token, and the activation. Each warp has a segment of all of them."""
    await_earlier_kernels(EARLY)
    slot = gl.program_id(1)
    expert = expert_of(topk_ids_ptr, expert_map_ptr, slot, topk, stride_ij, num_global, num_experts, HAS_MAP)
    if expert == num_experts:
        return
    expert = expert.to(gl.int64)
    tile_n = gl.program_id(0)
    ROWS: gl.constexpr = ROWS_OF_WARP * PARTS
    COLUMNS: gl.constexpr = ROWS_OF_WARP if LAYOUT == "ungated" else ROWS_OF_WARP // 2
    w_layout: gl.constexpr = gl.SliceLayout(1, stored_weights(PARTS))
    s_layout: gl.constexpr = gl.SliceLayout(1, stored_scales(PARTS, PACKED, GROUP))
    row_bytes = depth // (16 * PACKED) * 16  # a multiple of 16, as Triton can see

    row = gl.arange(0, ROWS, layout=w_layout)
    first = row // ROWS_OF_WARP * STEP_BYTES
    row = weight_row(row % ROWS_OF_WARP, tile_n, num_columns, LAYOUT, ROWS_OF_WARP, True)
    w_ptrs = in_words(w_ptr) + expert * (stride_we // 4) + row.to(gl.int64) * (stride_wn // 4) + first // 4
    STORED: gl.constexpr = TOKENS == "stored"
    X_OF_WORD: gl.constexpr = 1 if STORED else 4 * PACKED  # elements of the token a word of weights
    x_columns: gl.constexpr = stored_token_words(PARTS) if STORED else stored_tokens(PARTS, PACKED)
    x_layout: gl.constexpr = gl.SliceLayout(1, x_columns)
    if STORED:
        x_ptr = in_words(x_ptr)
    token = gl.arange(0, 8 * PARTS, layout=x_layout)
    first_x = token // 8 * (STEP_BYTES // 4 * X_OF_WORD)
    s_row = gl.arange(0, ROWS, layout=s_layout)
    s_first = s_row // ROWS_OF_WARP * STEP_BYTES
    s_row = weight_row(s_row % ROWS_OF_WARP, tile_n, num_columns, LAYOUT, ROWS_OF_WARP, True)
    y = multiply(
        w_ptrs, row >= 0, (row_bytes - first) // 4,
        x_ptr + first_x, token % 8 == 0, row_bytes // 4 * X_OF_WORD - first_x, x_ptr + first_x, depth, x_scale_ptr,
        scale_ptr + expert * stride_se + (s_row // SCALE_ROWS).to(gl.int64) * stride_sn,
        zero_ptr + expert * stride_ze + (s_row // PACKED_ZEROS).to(gl.int64) * stride_zn,
        s_first, s_row >= 0, row_bytes - s_first, s_row, stride_sk, stride_zk, stride_xsk,
        gl.cdiv(row_bytes, STEP_BYTES * PARTS),
        HAS_ZERO, PACKED, PACKED_ZEROS, GROUP, TOKENS, LARGEST, PARTS, PARTS, ROWS_OF_WARP, False,
    )  # fmt: skip
    y = gl.sum(gl.reshape(y, [PARTS, ROWS_OF_WARP]), 0)
    y_row = gl.arange(0, ROWS_OF_WARP, layout=y.type.layout)
    y_row = weight_row(y_row, tile_n, num_columns, LAYOUT, ROWS_OF_WARP, True).to(gl.int64)
    if GROUP == 0:
        y *= gl.load(scale_ptr + expert * stride_se + y_row * stride_sn).to(gl.float32)
        if STORED:
            y *= gl.load(x_scale_ptr)
    if HAS_BIAS:
        y += gl.load(bias_ptr + expert * stride_be + y_row * stride_bn).to(gl.float32)
    if LAYOUT == "ungated":
        y = epilogue(y, y)
    else:
        gate, up = gl.split(gl.permute(gl.reshape(y, [2, COLUMNS]), (1, 0)))
        y = epilogue(gate, up)
    column = tile_n * COLUMNS + gl.arange(0, COLUMNS, layout=y.type.layout)
    out_ptrs = out_ptr + slot.to(gl.int64) * num_columns + column
    gl.store(out_ptrs, y.to(out_ptr.dtype.element_ty))


def down_kernel(
    out_ptr,  # (1, K), contiguous; K is a multiple of COLUMNS
    x_ptr,  # (topk, depth), contiguous
    w_ptr,  # (E, K, depth / packed)
    scale_ptr,
    zero_ptr,
    bias_ptr,  # (E, K)
    topk_weights_ptr,  # (1, topk)
    topk_ids_ptr,  # (1, topk)
    expert_map_ptr,  # (num_global,)
    topk,
    num_global,
    num_experts,
    depth,  # I
    stride_tj,
    stride_ij,
    stride_we,
    stride_wn,
    stride_se,
    stride_sn,
    stride_sk,
    stride_ze,
    stride_zn,
    stride_zk,
    stride_be,
    stride_bn,
    APPLY_WEIGHTS: gl.constexpr,
    ROUND_WEIGHTS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_MAP: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    PACKED: gl.constexpr,
    PACKED_ZEROS: gl.constexpr,
    GROUP: gl.constexpr,
    SCALE_ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    LARGEST: gl.constexpr,
    PARTS: gl.constexpr,
    SEGMENTS: gl.constexpr,
    EARLY: gl.constexpr,
):
    """The weighted sum of 8 columns of all experts' results. A warp has two segments; PARTS of them are a slot's."""
    COLUMNS: gl.constexpr = ROWS_OF_WARP // 2
    ROWS: gl.constexpr = COLUMNS * SEGMENTS
    WARPS: gl.constexpr = SEGMENTS // 2
    w_layout: gl.constexpr = gl.SliceLayout(1, stored_weights(WARPS))
    s_layout: gl.constexpr = gl.SliceLayout(1, stored_scales(WARPS, PACKED, GROUP))
    row_bytes = depth // (16 * PACKED) * 16  # a multiple of 16, as Triton can see
    first_column = gl.program_id(0) * COLUMNS

    # Ahead of the wait: up_kernel, which is always what was launched before, waited for all that wrote these.
    row = gl.arange(0, ROWS, layout=w_layout)
    slot = row // COLUMNS // PARTS
    expert = expert_of(topk_ids_ptr, expert_map_ptr, slot, topk, stride_ij, num_global, num_experts, HAS_MAP)
    w_valid = expert < num_experts
    expert = gl.where(w_valid, expert, 0).to(gl.int64)
    first = row // COLUMNS % PARTS * STEP_BYTES
    row = (first_column + row % COLUMNS).to(gl.int64)
    w_ptrs = in_words(w_ptr) + expert * (stride_we // 4) + row * (stride_wn // 4) + first // 4

    s_row = gl.arange(0, ROWS, layout=s_layout)
    s_slot = s_row // COLUMNS // PARTS
    s_expert = expert_of(
        topk_ids_ptr, expert_map_ptr, s_slot, topk, stride_ij, num_global, num_experts, HAS_MAP
    )
    s_valid = s_expert < num_experts
    s_expert = gl.where(s_valid, s_expert, 0).to(gl.int64)
    s_first = s_row // COLUMNS % PARTS * STEP_BYTES
    s_row = (first_column + s_row % COLUMNS).to(gl.int64)

    if TOKENS == "16 bits":
        token = gl.arange(0, 8 * WARPS, layout=gl.SliceLayout(1, stored_tokens(WARPS, PACKED)))
        x_segment = token // 8 * 2 + token % 8
        has_segment = token % 8 < 2
    else:
        x_segment = gl.arange(0, SEGMENTS, layout=gl.SliceLayout(1, stored_segments(WARPS)))
        has_segment = x_segment < SEGMENTS
    x_slot = x_segment // PARTS
    x_expert = expert_of(
        topk_ids_ptr, expert_map_ptr, x_slot, topk, stride_ij, num_global, num_experts, HAS_MAP
    )
    x_rows = x_ptr + x_slot.to(gl.int64) * depth
    x_valid = has_segment & (x_expert < num_experts)
    first_x = x_segment % PARTS * STEP_BYTES * PACKED
    y = multiply(
        w_ptrs, w_valid, (row_bytes - first) // 4,
        x_rows + first_x, x_valid, row_bytes * PACKED - first_x, x_rows, depth, x_ptr,
        scale_ptr + s_expert * stride_se + s_row // SCALE_ROWS * stride_sn,
        zero_ptr + s_expert * stride_ze + s_row // PACKED_ZEROS * stride_zn,
        s_first, s_valid, row_bytes - s_first, s_row, stride_sk, stride_zk, 0,
        gl.cdiv(row_bytes, STEP_BYTES * PARTS),
        HAS_ZERO, PACKED, PACKED_ZEROS, GROUP, TOKENS, LARGEST, PARTS, WARPS, COLUMNS, EARLY,
    )  # fmt: skip
    y_row = gl.arange(0, ROWS, layout=y.type.layout)
    y_slot = y_row // COLUMNS // PARTS
    y_expert = expert_of(
        topk_ids_ptr, expert_map_ptr, y_slot, topk, stride_ij, num_global, num_experts, HAS_MAP
    )
    valid = y_expert < num_experts
    y_expert = gl.where(valid, y_expert, 0).to(gl.int64)
    column = (first_column + y_row % COLUMNS).to(gl.int64)
    if GROUP == 0:
        y *= gl.load(scale_ptr + y_expert * stride_se + column * stride_sn).to(gl.float32)
    if HAS_BIAS:
        is_first = valid & (y_row // COLUMNS % PARTS == 0)
        bias = gl.load(bias_ptr + y_expert * stride_be + column * stride_bn, mask=is_first, other=0.0)
        y += bias.to(gl.float32)
    if APPLY_WEIGHTS:
        y *= router_weight(
            topk_weights_ptr + y_slot * stride_tj, valid, out_ptr.dtype.element_ty, ROUND_WEIGHTS
        )
    y = gl.sum(gl.reshape(gl.where(valid, y, 0.0), [SEGMENTS, COLUMNS]), 0)
    column = first_column + gl.arange(0, COLUMNS, layout=y.type.layout)
    gl.store(out_ptr + column, y.to(out_ptr.dtype.element_ty))
