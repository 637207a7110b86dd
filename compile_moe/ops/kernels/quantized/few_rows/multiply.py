"""The product of one tile: a ring of stages in shared memory, from which each warp takes its own rows of weights."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from compile_moe.ops.kernels.quantized.arithmetic import difference, times
from compile_moe.ops.kernels.quantized.few_rows.layouts import (
    PART_BYTES,
    STEP_BYTES,
    as_left_operand,
    as_right_operand,
    parts,
    products,
    row_at,
    scales_by_row,
    scales_of_rows,
    stored_tokens,
    stored_weights,
)
from compile_moe.ops.kernels.quantized.few_rows.loads import (
    copy_tokens,
    copy_weights,
    load_scales,
    unpacked,
    weight_row,
)
from compile_moe.ops.kernels.quantized.weight_format import (
    decode,
    decode_scale_16_bits,
    decode_words,
)
from compile_moe.ops.kernels.warp_specialized.compat import view

COLUMNS_OF_SCALES = gl.constexpr(512)  # whose scales are in shared memory at a time


@gluon.constexpr_function
def fewest_tokens(BLOCK_M: int) -> int:
    """Products have at least 8; a tile is multiplied with half of its tokens where it has no more rows."""
    return max(BLOCK_M // 2, 8)


@gluon.jit
def takes(num_rows, TOKENS: gl.constexpr, BLOCK_M: gl.constexpr):
    """Whether so many rows are multiplied with TOKENS tokens, :func:`fewest_tokens` or all of the tile's."""
    FEWEST: gl.constexpr = fewest_tokens(BLOCK_M)
    if FEWEST == BLOCK_M:
        return True
    elif TOKENS == FEWEST:
        return num_rows <= FEWEST
    else:
        return num_rows > FEWEST


@gluon.jit
def grouped(weights, scales, WARPS: gl.constexpr):
    """Weights (ROWS, PART_BYTES) as (ROWS, GROUPS, columns), and what belongs to them of (GROUPS, positions)."""
    ROWS: gl.constexpr = weights.shape[0]
    GROUPS: gl.constexpr = scales.shape[0]
    weights = gl.reshape(weights, [ROWS, GROUPS, PART_BYTES // GROUPS])
    layout: gl.constexpr = gl.SliceLayout(2, weights.type.layout)
    scales = gl.convert_layout(scales_by_row(scales, WARPS), layout, assert_trivial=True)
    return weights, gl.expand_dims(scales, 2)


@gluon.jit
def scaled(weights, scales, zeros, WARPS: gl.constexpr):
    """Decoded (ROWS, PART_BYTES) less zeros, times scales, both (GROUPS, positions) or None."""
    ROWS: gl.constexpr = weights.shape[0]
    if zeros is not None:
        weights, by = grouped(weights, zeros, WARPS)
        weights = gl.reshape(difference(weights, by), [ROWS, PART_BYTES])
    if scales is not None:
        weights, by = grouped(weights, scales, WARPS)
        weights = gl.reshape(times(weights, by), [ROWS, PART_BYTES])
    return weights


@gluon.jit
def multiply_part(weights, tokens, acc, scale, zero, WARPS: gl.constexpr, PACKED: gl.constexpr):
    """acc + stored weights (ROWS, PART_BYTES), less zeros, times scales, times tokens (TOKENS, PART_BYTES * PACKED)."""
    dtype: gl.constexpr = tokens.dtype
    if PACKED == 1:
        w = as_left_operand(scaled(decode_words(weights, dtype), scale, zero, WARPS), WARPS)
        acc = mma_v2(w, as_right_operand(tokens, WARPS), acc)
    else:
        low, high = decode_words(weights, dtype)
        even, odd = gl.split(gl.reshape(tokens, [tokens.shape[0], PART_BYTES, 2]))
        w = as_left_operand(scaled(low, scale, zero, WARPS), WARPS)
        acc = mma_v2(w, as_right_operand(even, WARPS), acc)
        w = as_left_operand(scaled(high, scale, zero, WARPS), WARPS)
        acc = mma_v2(w, as_right_operand(odd, WARPS), acc)
    return acc


@gluon.jit
def multiply_step(
    acc,
    w_smem,  # (ROWS, STEP_BYTES)
    x_smem,  # (TOKENS, STEP)
    s_smem,  # (groups, GROUPS, positions), or None
    z_smem,
    first_part,  # that of the step, of those whose scales are there
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
    PACKED: gl.constexpr,
):
    """acc + a step's product."""
    ROWS: gl.constexpr = w_smem.shape[0]
    TOKENS: gl.constexpr = x_smem.shape[0]
    PART: gl.constexpr = PART_BYTES * PACKED
    # So few tokens that it is less work to scale the sums.
    SCALES_SUMS: gl.constexpr = GROUP >= PART and 4 * TOKENS < PART
    weight_parts = parts(w_smem.load(stored_weights(ROWS, WARPS)))
    token_parts = parts(x_smem.load(stored_tokens(TOKENS, WARPS, PACKED)))
    row_layout: gl.constexpr = gl.SliceLayout(1, products(WARPS))
    for i in gl.static_range(4):
        scale = None
        zero = None
        if s_smem is not None:
            index = (first_part + i) * PART // (GROUP * s_smem.shape[1])
            scale = s_smem.index(index).load(scales_of_rows(s_smem.shape[1], ROWS, WARPS))
            if z_smem is not None:
                zero = z_smem.index(index).load(scales_of_rows(s_smem.shape[1], ROWS, WARPS))
        if SCALES_SUMS:
            part = multiply_part(
                weight_parts[i], token_parts[i], gl.zeros_like(acc), None, zero, WARPS, PACKED
            )
            scale = gl.convert_layout(gl.reshape(scales_by_row(scale, WARPS), [ROWS]), row_layout)
            acc += part * gl.expand_dims(scale.to(gl.float32), 1)
        else:
            acc = multiply_part(weight_parts[i], token_parts[i], acc, scale, zero, WARPS, PACKED)
    return acc


@gluon.jit
def multiply(
    x_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    expert,
    tile_n,
    token,  # (TOKENS,), each inside x
    row_mask,
    num_columns,
    depth,
    stride_xm,
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
    ROWS: gl.constexpr,
    EVEN_N: gl.constexpr,
    EVEN_K: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    PACKED: gl.constexpr,
    PACKED_ZEROS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    """ROWS rows of one expert's weights times tokens, and the bias: (ROWS, TOKENS), float32.

    Args:
        GROUP: columns that share a scale; 0 where a row has one, which multiplies sums.
    """
    TOKENS: gl.constexpr = token.shape[0]
    STEP: gl.constexpr = STEP_BYTES * PACKED
    PART: gl.constexpr = PART_BYTES * PACKED
    STEPS: gl.constexpr = COLUMNS_OF_SCALES // STEP
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    acc_layout: gl.constexpr = products(WARPS)
    w_layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    x_layout: gl.constexpr = token.type.layout.parent
    expert = expert.to(gl.int64)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, w_layout))
    w_row = weight_row(row, tile_n, num_columns, LAYOUT, ROWS, EVEN_N)
    w_bytes = gl.arange(0, STEP_BYTES, layout=gl.SliceLayout(0, w_layout))
    w_ptrs = w_ptr + expert * stride_we + gl.expand_dims(w_row * stride_wn, 1) + gl.expand_dims(w_bytes, 0)
    x_k = gl.arange(0, STEP, layout=gl.SliceLayout(0, x_layout))
    x_ptrs = x_ptr + gl.expand_dims(token.to(gl.int64) * stride_xm, 1) + gl.expand_dims(x_k, 0)
    # A thread's reads are 8 bytes of weights in each of 8 rows, 16 bytes of tokens in each of 2: no bank twice.
    w_smem = gl.allocate_shared_memory(
        gl.uint8, [STAGES, ROWS, STEP_BYTES], gl.SwizzledSharedLayout(32, 1, 4, [1, 0])
    )
    x_smem = gl.allocate_shared_memory(
        dtype,
        [STAGES, TOKENS, STEP],
        gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
        if PACKED == 2
        else gl.SwizzledSharedLayout(32, 1, 2, [1, 0]),
    )
    s_smem = None
    z_smem = None
    if GROUP > 0:
        # Groups of a part, at least 1, and those whose scales are in shared memory.
        GROUPS: gl.constexpr = PART // GROUP if PART > GROUP else 1
        SCALES: gl.constexpr = COLUMNS_OF_SCALES // GROUP
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        s_layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [1, WARPS], [0, 1])
        position = gl.arange(0, ROWS, layout=gl.SliceLayout(0, s_layout))
        s_row = weight_row(row_at(position, ROWS, WARPS), tile_n, num_columns, LAYOUT, ROWS, EVEN_N)
        s_ptrs = scale_ptr + expert * stride_se + s_row.to(gl.int64) * stride_sn
        num_groups = gl.cdiv(depth, GROUP)
        s_smem = gl.allocate_shared_memory(dtype, [SCALES // GROUPS, GROUPS, ROWS], plain)
        codes = load_scales(s_ptrs, 0, num_groups, stride_sk, SCALES)
        if HAS_ZERO:
            z_ptrs = zero_ptr + expert * stride_ze + (s_row // PACKED_ZEROS).to(gl.int64) * stride_zn
            z_smem = gl.allocate_shared_memory(dtype, [SCALES // GROUPS, GROUPS, ROWS], plain)
            zero_codes = load_scales(z_ptrs, 0, num_groups, stride_zk, SCALES)

    num_steps = gl.cdiv(depth, STEP)
    for i in gl.static_range(STAGES - 1):
        if i < num_steps:
            copy_weights(w_smem.index(i), w_ptrs, i, depth, PACKED, EVEN_K)
    # Whose slots have arrived meanwhile.
    for i in gl.static_range(STAGES - 1):
        if i < num_steps:
            copy_tokens(x_smem.index(i), x_ptrs, row_mask, i, depth, EVEN_K)
        async_copy.commit_group()

    acc = gl.zeros([ROWS, TOKENS], gl.float32, acc_layout)
    for step in range(num_steps):
        if GROUP > 0:
            if step % STEPS == 0:
                # Of this step and some behind it; those of the following ones are under way from here.
                following = (step // STEPS + 1) * SCALES
                view(s_smem, [1, SCALES, ROWS], plain).index(0).store(decode_scale_16_bits(codes, dtype))
                codes = load_scales(s_ptrs, following, num_groups, stride_sk, SCALES)
                if HAS_ZERO:
                    zeros = decode(unpacked(zero_codes, s_row, PACKED_ZEROS, 0)).to(dtype)
                    view(z_smem, [1, SCALES, ROWS], plain).index(0).store(zeros)
                    zero_codes = load_scales(z_ptrs, following, num_groups, stride_zk, SCALES)
        # Into the stage that every thread read in the step before; then this step's has arrived.
        ahead = step + STAGES - 1
        if ahead < num_steps:
            free = ahead % STAGES
            copy_weights(w_smem.index(free), w_ptrs, ahead, depth, PACKED, EVEN_K)
            copy_tokens(x_smem.index(free), x_ptrs, row_mask, ahead, depth, EVEN_K)
        async_copy.commit_group()
        async_copy.wait_group(STAGES - 1)
        stage = step % STAGES
        first_part = step % STEPS * 4
        w, x = w_smem.index(stage), x_smem.index(stage)
        acc = multiply_step(acc, w, x, s_smem, z_smem, first_part, GROUP, WARPS, PACKED)
    async_copy.wait_group(0)
    acc_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, acc_layout))
    acc_row = weight_row(acc_row, tile_n, num_columns, LAYOUT, ROWS, EVEN_N)
    if GROUP == 0:
        row_scale = gl.load(scale_ptr + expert * stride_se + acc_row.to(gl.int64) * stride_sn)
        acc = acc * gl.expand_dims(row_scale.to(gl.float32), 1)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + expert * stride_be + acc_row.to(gl.int64) * stride_bn)
        acc = acc + gl.expand_dims(bias.to(gl.float32), 1)
    return acc
