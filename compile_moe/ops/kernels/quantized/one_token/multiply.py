"""The products of one program: each row of weights with the token of its segment, decoded in registers.

A warp has 16 rows, of one segment or two, whose tokens are columns of its right operand: the tensor cores multiply all
of its rows with both, of which that of a row's own segment counts.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from compile_moe.ops.kernels.early_launch import await_earlier_kernels
from compile_moe.ops.kernels.quantized.arithmetic import difference, times
from compile_moe.ops.kernels.quantized.few_rows.layouts import halves
from compile_moe.ops.kernels.quantized.few_rows.loads import unpacked
from compile_moe.ops.kernels.quantized.one_token.layouts import (
    CHUNK_BYTES,
    CHUNKS,
    STEP_BYTES,
    as_left_operand,
    as_right_operand,
    eights,
    products,
)
from compile_moe.ops.kernels.quantized.one_token.loads import load_groups, load_step
from compile_moe.ops.kernels.quantized.one_token.tokens import (
    quantized,
    scale_of,
    scales_of_rows,
    spread,
    spread_scales,
)
from compile_moe.ops.kernels.quantized.weight_format import (
    decode,
    decode_registers,
    decode_scale,
    decode_scale_16_bits,
)
from compile_moe.ops.kernels.token_rounding import bits_of_magnitude


@gluon.jit
def scaled(numbers, scale, zero):
    """Decoded (ROWS, 8, 2) less zeros, times scales, both (ROWS, 1 or 4) or None."""
    ROWS: gl.constexpr = numbers.shape[0]
    if zero is not None:
        by = gl.reshape(numbers, [ROWS, zero.shape[1], 16 // zero.shape[1]])
        zero = gl.convert_layout(zero, gl.SliceLayout(2, by.type.layout), assert_trivial=True)
        numbers = gl.reshape(difference(by, gl.expand_dims(zero, 2)), [ROWS, 8, 2])
    if scale is not None:
        by = gl.reshape(numbers, [ROWS, scale.shape[1], 16 // scale.shape[1]])
        scale = gl.convert_layout(scale, gl.SliceLayout(2, by.type.layout), assert_trivial=True)
        numbers = gl.reshape(times(by, gl.expand_dims(scale, 2)), [ROWS, 8, 2])
    return numbers


@gluon.jit
def in_turn(first, second):
    """(rows, 32): of every word's bytes 0 and 2, and 1 and 3, numbers (rows, 8, 2)."""
    ROWS: gl.constexpr = first.shape[0]
    return gl.reshape(gl.permute(gl.join(first, second), (0, 1, 3, 2)), [ROWS, 32])


@gluon.jit
def operand(first, second, scale, zero, WARPS: gl.constexpr):
    """The left operand: of every word's bytes 0 and 2, and 1 and 3, numbers (ROWS, 8, 2), less zeros, times scales."""
    return as_left_operand(in_turn(scaled(first, scale, zero), scaled(second, scale, zero)), WARPS)


@gluon.jit
def multiply_eights(
    words,
    tokens,
    acc,
    scale,
    zero,
    WARPS: gl.constexpr,
    PACKED: gl.constexpr,
    STORED: gl.constexpr,
    DTYPE: gl.constexpr,
):
    """acc + stored weights, eight words a row, less zeros, times scales, times tokens, 32 * PACKED columns.

    Args:
        STORED: tokens are words as the weights'.
        DTYPE: of the operands.
    """
    # Two of each word, since two numbers share a register.
    numbers = decode_registers(gl.join(words, words), DTYPE)
    w = operand(numbers[0], numbers[1], scale, zero, WARPS)
    if STORED:
        first, second = decode_registers(gl.join(tokens, tokens), DTYPE)
        return mma_v2(w, as_right_operand(in_turn(first, second), WARPS, True), acc)
    elif PACKED == 1:
        return mma_v2(w, as_right_operand(tokens, WARPS, False), acc)
    else:
        even, odd = gl.split(gl.reshape(tokens, [tokens.shape[0], 32, 2]))
        acc = mma_v2(w, as_right_operand(even, WARPS, False), acc)
        w = operand(numbers[2], numbers[3], scale, zero, WARPS)
        return mma_v2(w, as_right_operand(odd, WARPS, False), acc)


@gluon.jit
def multiply(
    w_ptrs,  # (ROWS,), to the first word of each row's part of the depth
    w_valid,  # (ROWS,), those that aren't skipped
    w_left,  # (ROWS,), words that are there from the first one on
    x_ptrs,  # (8 * WARPS,), likewise, of each warp's tokens; those behind its segments' aren't valid. Of tokens that
    # are to be quantized, (2 * WARPS,): those of the segments
    x_valid,
    x_left,
    x_rows,  # of tokens to be quantized: to the start of each one's row
    depth,
    xs_ptr,  # of stored tokens: to their first group's scale
    s_ptrs,  # (ROWS,), to each row's first group
    z_ptrs,
    s_first,  # (ROWS,), the byte where the part starts
    s_valid,
    s_left,  # (ROWS,), bytes
    s_row,  # (ROWS,), of the weights
    stride_sk,
    stride_zk,
    stride_xsk,
    num_steps,
    HAS_ZERO: gl.constexpr,
    PACKED: gl.constexpr,
    PACKED_ZEROS: gl.constexpr,
    GROUP: gl.constexpr,
    TOKENS: gl.constexpr,
    LARGEST: gl.constexpr,
    PARTS: gl.constexpr,
    WARPS: gl.constexpr,
    ROWS_OF_SEGMENT: gl.constexpr,
    AWAIT: gl.constexpr,
):
    """(ROWS,) float32: rows of weights times the tokens of their segments.

    Args:
        GROUP: columns that share a scale; 0 where a row has one, by which sums are still to be multiplied.
        TOKENS: "16 bits"; "stored", in words, whose one scale, if they have no groups, sums are still to be multiplied
            by; or to be quantized, with a scale for a "token", a "tensor" or a "group".
        LARGEST: magnitude of quantized tokens: 448 of float8, 127 of int8.
        PARTS: of the depth, which take its steps in turn.
        AWAIT: the first weights are loaded ahead of the wait for the earlier kernels, which wrote the tokens.
    """
    TO_QUANTIZE: gl.constexpr = TOKENS == "token" or TOKENS == "tensor" or TOKENS == "group"
    STORED: gl.constexpr = TOKENS == "stored"
    STORED_GROUPS: gl.constexpr = STORED and GROUP > 0
    X_OF_WORD: gl.constexpr = 1 if STORED else 4 * PACKED  # elements of tokens a word of weights
    dtype: gl.constexpr = x_ptrs.dtype.element_ty if TOKENS == "16 bits" else gl.float16
    WORDS: gl.constexpr = STEP_BYTES // 4
    AHEAD: gl.constexpr = STEP_BYTES * PARTS  # bytes to a part's next step
    # Of a chunk whose columns share a scale, it is less work to scale the sums.
    SCALES_SUMS: gl.constexpr = GROUP >= CHUNK_BYTES * PACKED
    PIECES: gl.constexpr = CHUNKS if SCALES_SUMS else 4 * CHUNKS  # of a step, each of which has one scale
    GROUP_BYTES: gl.constexpr = GROUP // PACKED
    w = load_step(w_ptrs, 0, w_valid, w_left, WORDS)
    if GROUP > 0:
        s = load_groups(s_ptrs, s_first, 0, s_valid, s_left, stride_sk, PIECES, GROUP_BYTES)
        if HAS_ZERO:
            z = load_groups(z_ptrs, s_first, 0, s_valid, s_left, stride_zk, PIECES, GROUP_BYTES)
    await_earlier_kernels(AWAIT)
    if STORED_GROUPS:
        xs_ptrs = xs_ptr + s_first * 0
        xs = load_groups(xs_ptrs, s_first, 0, s_valid, s_left, stride_xsk, PIECES, GROUP_BYTES)
    if TO_QUANTIZE and GROUP == 0:
        x_scale = scales_of_rows(x_rows, x_valid, depth, TOKENS, LARGEST)
    # Two sums, which the tensor cores add to in turn.
    acc = gl.zeros([WARPS, 16, 8], gl.float32, products(WARPS))
    other = acc
    for step in range(num_steps):
        byte = (step + 1) * AHEAD
        words = halves(w)
        w = load_step(w_ptrs, byte // 4, w_valid, w_left, WORDS)
        if GROUP > 0:
            scales = halves(s)
            s = load_groups(s_ptrs, s_first, byte, s_valid, s_left, stride_sk, PIECES, GROUP_BYTES)
            if HAS_ZERO:
                zeros = halves(decode(unpacked(z, s_row, PACKED_ZEROS, 1)).to(dtype))
                z = load_groups(z_ptrs, s_first, byte, s_valid, s_left, stride_zk, PIECES, GROUP_BYTES)
        if STORED_GROUPS:
            x_scales = halves(xs)
            xs = load_groups(xs_ptrs, s_first, byte, s_valid, s_left, stride_xsk, PIECES, GROUP_BYTES)
        if TO_QUANTIZE:
            tokens = load_step(x_ptrs, step * AHEAD, x_valid, x_left, STEP_BYTES)
            if GROUP > 0:
                group_scale = scale_of(gl.max(bits_of_magnitude(tokens), 1), LARGEST)
                tokens = quantized(tokens, group_scale, LARGEST)
                column_scale = spread_scales(group_scale)
            else:
                tokens = quantized(tokens, x_scale, LARGEST)
            tokens = halves(spread(tokens))
        for i in gl.static_range(CHUNKS):
            if TO_QUANTIZE:
                x = tokens[i]
            else:
                first = (step * AHEAD + i * CHUNK_BYTES) // 4 * X_OF_WORD
                x = load_step(x_ptrs, first, x_valid, x_left, CHUNK_BYTES // 4 * X_OF_WORD)
            w0, w1 = eights(words[i])
            x0, x1 = eights(x)
            zero = zeros[i] if HAS_ZERO else None
            if SCALES_SUMS:
                part = multiply_eights(w0, x0, gl.zeros_like(acc), None, zero, WARPS, PACKED, STORED, dtype)
                part = multiply_eights(w1, x1, part, None, zero, WARPS, PACKED, STORED, dtype)
                scale = decode_scale(scales[i]).to(gl.float32)
                if STORED_GROUPS:
                    scale *= x_scales[i]
                scale = gl.reshape(scale, [WARPS, 16])
                scale = gl.convert_layout(scale, gl.SliceLayout(2, acc.type.layout), assert_trivial=True)
                if TO_QUANTIZE:
                    part *= column_scale
                acc += part * gl.expand_dims(scale, 2)
            else:
                scale = decode_scale_16_bits(scales[i], dtype) if GROUP > 0 else None
                acc = multiply_eights(w0, x0, acc, scale, zero, WARPS, PACKED, STORED, dtype)
                other = multiply_eights(w1, x1, other, scale, zero, WARPS, PACKED, STORED, dtype)
    acc += other
    if TO_QUANTIZE and GROUP == 0:
        acc *= spread_scales(x_scale)
    return sums_of_own(acc, ROWS_OF_SEGMENT)


@gluon.jit
def sums_of_own(acc, ROWS_OF_SEGMENT: gl.constexpr):
    """(ROWS,): of each row's sums with its warp's tokens (WARPS, 16, 8) that with its segment's."""
    WARPS: gl.constexpr = acc.shape[0]
    sums_layout: gl.constexpr = gl.SliceLayout(2, acc.type.layout)
    row = gl.arange(0, 16, layout=gl.SliceLayout(0, sums_layout))
    token = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, acc.type.layout)))
    own = gl.expand_dims(gl.expand_dims(row // ROWS_OF_SEGMENT, 0), 2)
    is_own = own == gl.expand_dims(gl.expand_dims(token, 0), 1)
    return gl.reshape(gl.sum(gl.where(is_own, acc, 0.0), 2), [16 * WARPS])
