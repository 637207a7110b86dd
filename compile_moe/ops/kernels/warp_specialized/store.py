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
def finish(acc, bias, EPILOGUE: gl.constexpr, T: gl.constexpr, HAS_BIAS: gl.constexpr, dtype: gl.constexpr):
    """(64, T) accumulators to the (columns, T) result: bias and activation."""
    if HAS_BIAS:
        layout: gl.constexpr = acc.type.layout
        acc = acc + gl.expand_dims(gl.convert_layout(bias, gl.SliceLayout(1, layout)), 1)
    if EPILOGUE == "gated":
        # Rows 0..7 of each 16 are the gate's, rows 8..15 the up projection's: both in the same thread.
        gate, up = gl.split(gl.permute(gl.reshape(acc, [4, 2, 8, T]), (0, 2, 3, 1)))
        y = gl.reshape(epilogue(gate, up).to(dtype), [32, T])
    elif EPILOGUE == "ungated":
        y = epilogue(acc, acc).to(dtype)
    else:
        y = acc.to(dtype)
    return y


@gluon.jit
def row_slots(slots_ptr, first, rows, num_slots, T: gl.constexpr, EPILOGUE: gl.constexpr):
    """Where rows first.. of a chunk are stored; -1 where they are not."""
    if EPILOGUE == "pairs":
        # Rows of the result are those of the tile.
        slots = first, rows
    else:
        WIDTH: gl.constexpr = 32 if EPILOGUE == "gated" else 64
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
):
    """Rows of transposed (WIDTH, T) y to their slots' rows of out, 16 bytes a thread."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    # All of the buffer, as Triton 3.8 wants it.
    rows_layout: gl.constexpr = gl.NVMMASharedLayout(WIDTH * 2, 16, 2)
    rows_smem = view(result_smem, [result_smem.shape[0] * 64 // (T * WIDTH), T, WIDTH], rows_layout).index(0)
    rows_smem.permute((1, 0)).store(y)
    y = rows_smem.load(layout)
    c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    num_columns = columns8.to(gl.int64) * 8
    out_ptr += column8 * 8
    ptrs = out_ptr + gl.expand_dims(slot.to(gl.int64) * num_columns, 1) + gl.expand_dims(c, 0)
    gl.store(ptrs, y, mask=gl.expand_dims(slot >= 0, 1) & gl.expand_dims(column8 + c // 8 < columns8, 0))


@gluon.jit
def store_pairs(acc, result_smem, out_ptr, rows_of, first, column8, columns8):
    """(64, 32) accumulators, whose rows are gates and ups in turn, to 32 columns of rows of the result."""
    smem_layout: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    smem = view(result_smem, [1, 32, 64], smem_layout, gl.float32).index(0)
    smem.permute((1, 0)).store(acc)
    # A thread has four pairs.
    pairs = smem.load(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
    gate, up = gl.split(gl.reshape(pairs, [32, 32, 2]))
    y = epilogue(gate, up).to(out_ptr.dtype.element_ty)
    layout: gl.constexpr = y.type.layout
    # Rows of the result: those of this tile, in expert order.
    t = gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
    first_row, rows = rows_of
    c = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    num_columns = columns8.to(gl.int64) * 8
    row = (first_row + first + t).to(gl.int64)
    ptrs = out_ptr + column8 * 8 + gl.expand_dims(row * num_columns, 1) + gl.expand_dims(c, 0)
    mask = gl.expand_dims(first + t < rows, 1) & gl.expand_dims(column8 + c // 8 < columns8, 0)
    gl.store(ptrs, y, mask=mask)


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
    if rows <= 0:
        pass
    elif EPILOGUE == "pairs":
        if HAS_BIAS:
            acc = acc + gl.expand_dims(gl.convert_layout(bias, gl.SliceLayout(1, acc.type.layout)), 1)
        if T == 64:
            left, right = halves(acc, 64, 32)
            store_pairs(left, result_smem, out_ptr, slot, 0, column8, columns8)
            store_pairs(right, result_smem, out_ptr, slot, 32, column8, columns8)
        else:
            store_pairs(acc, result_smem, out_ptr, slot, 0, column8, columns8)
    else:
        WIDTH: gl.constexpr = 32 if EPILOGUE == "gated" else 64
        y = finish(acc, bias, EPILOGUE, T, HAS_BIAS, out_ptr.dtype.element_ty)
        store_rows(y, result_smem, out_ptr, slot, column8, columns8, T, WIDTH)
