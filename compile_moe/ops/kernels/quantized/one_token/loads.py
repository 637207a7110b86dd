"""What a step loads: words of weights, columns of tokens, scales and zero points."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.quantized.one_token.layouts import STEP_BYTES


@gluon.jit
def in_words(ptr):
    """A pointer to bytes as one to words of four, where it must lie."""
    return ptr.to(gl.pointer_type(gl.uint32), bitcast=True)


@gluon.jit
def load_step(ptrs, first, valid, left, STEP: gl.constexpr):
    """(rows, STEP) from ``first`` on at pointers (rows,), of which ``left`` (rows,) are there; zeros behind these, and
    in rows that are not valid. The masks stay apart: Triton sees that each is the same for all of 16 bytes, and loads
    these at once.
    """
    layout: gl.constexpr = ptrs.type.layout.parent
    k = first + gl.arange(0, STEP, layout=gl.SliceLayout(0, layout))
    mask = (gl.expand_dims(k, 0) < gl.expand_dims(left, 1)) & gl.expand_dims(valid, 1)
    other: gl.constexpr = 0.0 if ptrs.dtype.element_ty.is_floating() else 0
    return gl.load(gl.expand_dims(ptrs, 1) + gl.expand_dims(k, 0), mask=mask, other=other)


@gluon.jit
def load_groups(
    ptrs,
    first,
    byte,
    valid,
    left,
    stride,
    PIECES: gl.constexpr,
    GROUP_BYTES: gl.constexpr,
):
    """(rows, PIECES) of the groups that a step's pieces belong to, at pointers (rows,) to rows' first group.

    Args:
        first: (rows,), the byte of the row where the pointers of :func:`load_step` point.
        byte: of the step, counted from there. valid, left: as there, in bytes.
    """
    layout: gl.constexpr = ptrs.type.layout.parent
    BYTES: gl.constexpr = STEP_BYTES // PIECES
    b = byte + gl.arange(0, PIECES, layout=gl.SliceLayout(0, layout)) * BYTES
    mask = (gl.expand_dims(b, 0) < gl.expand_dims(left, 1)) & gl.expand_dims(valid, 1)
    group = (gl.expand_dims(first, 1) + gl.expand_dims(b, 0)) // GROUP_BYTES
    return gl.load(gl.expand_dims(ptrs, 1) + group.to(gl.int64) * stride, mask=mask, other=0)
