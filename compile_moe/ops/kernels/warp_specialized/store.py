"""From accumulators to rows of the result: bias, epilogue, transposition through shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.epilogue import epilogue
from compile_moe.ops.kernels.warp_specialized.compat import view


@gluon.jit
def halves(acc, COLUMNS: gl.constexpr, HALF: gl.constexpr):
    """Left and right half of (64, 2 * HALF) accumulators: no data moves between threads."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    left, right = gl.split(gl.permute(gl.reshape(acc, [COLUMNS, 2, HALF]), (0, 2, 1)))
    return (
        gl.convert_layout(left, layout, assert_trivial=True),
        gl.convert_layout(right, layout, assert_trivial=True),
    )


@gluon.jit
def exchange_pairs(low, high):
    """Gate and up of each pair of rows in one thread, from rows 0..7 and 8..15 of each 16, which are gates and ups in
    turn. Row 2 j has pair j then, and row 2 j + 1 pair 4 + j, as :func:`in_order` undoes.
    """
    # A row is four threads'. The even one keeps its low gate and gives the high one for the low up.
    return gl.inline_asm_elementwise(
        """{
        .reg .pred odd;
        .reg .b32 lane, other;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 4;
        setp.ne.u32 odd, lane, 0;
        selp.b32 other, $2, $3, odd;
        shfl.sync.bfly.b32 other, other, 4, 31, -1;
        selp.b32 $0, other, $2, odd;
        selp.b32 $1, $3, other, odd;
        }""",
        # The first output is written while the inputs are still read; and no thread may skip what all take part in.
        "=&r,=r,r,r",
        [low, high],
        dtype=(gl.float32, gl.float32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def in_order(y):
    """Rows of (T, WIDTH) results in the order of their columns, of which a thread has 8: see :func:`exchange_pairs`."""
    T: gl.constexpr = y.shape[0]
    WIDTH: gl.constexpr = y.shape[1]
    y = gl.permute(gl.reshape(y, [T, WIDTH // 8, 4, 2]), (0, 1, 3, 2))
    return gl.reshape(y, [T, WIDTH])


@gluon.jit
def finish(acc, bias, EPILOGUE: gl.constexpr, T: gl.constexpr, HAS_BIAS: gl.constexpr, dtype: gl.constexpr):
    """(64, T) accumulators to the (columns, T) result: bias and activation."""
    if HAS_BIAS:
        layout: gl.constexpr = acc.type.layout
        acc = acc + gl.expand_dims(gl.convert_layout(bias, gl.SliceLayout(1, layout)), 1)
    if EPILOGUE == "gated" or EPILOGUE == "pairs":
        # Rows r and r + 8 of each 16 are in the same thread: gate and up, or both of either, whose rows alternate.
        gate, up = gl.split(gl.permute(gl.reshape(acc, [4, 2, 8, T]), (0, 2, 3, 1)))
        if EPILOGUE == "pairs":
            gate, up = exchange_pairs(gate, up)
        y = gl.reshape(epilogue(gate, up).to(dtype), [32, T])
    elif EPILOGUE == "ungated":
        y = epilogue(acc, acc).to(dtype)
    else:
        y = acc.to(dtype)
    return y


@gluon.constexpr_function
def result_columns(EPILOGUE: gl.constexpr):
    """Of 64 weight rows."""
    return 32 if EPILOGUE == "gated" or EPILOGUE == "pairs" else 64


@gluon.jit
def row_slots(slots_ptr, first, rows, num_slots, T: gl.constexpr, EPILOGUE: gl.constexpr):
    """Where rows first.. of a chunk are stored; -1 where they are not."""
    WIDTH: gl.constexpr = result_columns(EPILOGUE)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    row = gl.arange(0, T, layout=gl.SliceLayout(1, layout))
    if EPILOGUE == "none":
        slot = gl.load(slots_ptr + first + row, mask=row < rows, other=-1)
        slots = gl.where(slot < num_slots, slot, -1)
    else:
        slots = gl.where(row < rows, first + row, -1)
    return slots


@gluon.jit
def store_rows(
    y,
    result_smem,
    out_ptr,
    slot,
    column8,
    columns8,
    T: gl.constexpr,
    WIDTH: gl.constexpr,
    IN_PAIRS: gl.constexpr,
):
    """Rows of transposed (WIDTH, T) y to their slots' rows of out, 16 bytes a thread."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    # All of the buffer, as Triton 3.8 wants it.
    rows_layout: gl.constexpr = gl.NVMMASharedLayout(WIDTH * 2, 16, 2)
    rows_smem = view(result_smem, [result_smem.shape[0] * 64 // (T * WIDTH), T, WIDTH], rows_layout).index(0)
    rows_smem.permute((1, 0)).store(y)
    y = rows_smem.load(layout)
    if IN_PAIRS:
        y = gl.convert_layout(in_order(y), layout, assert_trivial=True)
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    num_columns = columns8.to(gl.int64) * 8
    out_ptr += column8 * 8
    ptrs = out_ptr + gl.expand_dims(slot.to(gl.int64) * num_columns, 1) + gl.expand_dims(c, 0)
    gl.store(ptrs, y, mask=gl.expand_dims(slot >= 0, 1) & gl.expand_dims(column8 + c // 8 < columns8, 0))


@gluon.jit
def store_chunk(
    acc,
    bias,
    result_smem,
    out_ptr,
    slot,
    rows,
    column8,
    columns8,
    EPILOGUE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    T: gl.constexpr,
):
    if rows > 0:
        WIDTH: gl.constexpr = result_columns(EPILOGUE)
        y = finish(acc, bias, EPILOGUE, T, HAS_BIAS, out_ptr.dtype.element_ty)
        store_rows(y, result_smem, out_ptr, slot, column8, columns8, T, WIDTH, EPILOGUE == "pairs")


@gluon.jit
def times_rows(acc, scale):
    """Sums times the scales of their weight rows, if these have some."""
    if scale is not None:
        acc = acc * gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, acc.type.layout)), 1)
    return acc


@gluon.jit
def store_tile(
    sums,
    bias,
    scale,  # of each row of weights, or None
    result_smem,
    out_ptr,
    slots,  # of each chunk
    rows,
    column8,
    columns8,
    EPILOGUE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Results of 64 rows of weights, in chunks of 64 tokens and, if there is one slots more than these, of a tail."""
    acc, tail = sums
    MAIN: gl.constexpr = acc.shape[1]
    if MAIN == 256:
        left, right = halves(acc, 64, 128)
        chunks = halves(left, 64, 64) + halves(right, 64, 64)
    elif MAIN == 128:
        chunks = halves(acc, 64, 64)
    else:
        chunks = (acc,)
    for i in gl.static_range(MAIN // 64):
        chunk = times_rows(chunks[i], scale)
        store_chunk(
            chunk, bias, result_smem, out_ptr, slots[i], rows - 64 * i, column8, columns8, EPILOGUE, HAS_BIAS, 64
        )  # fmt: skip
    if len(slots) > MAIN // 64:
        tail = times_rows(tail, scale)
        store_chunk(
            tail, bias, result_smem, out_ptr, slots[MAIN // 64], rows - MAIN, column8, columns8,
            EPILOGUE, HAS_BIAS, 32,
        )  # fmt: skip
