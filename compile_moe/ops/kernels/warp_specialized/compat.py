"""What Gluon's versions call differently, and what type checkers don't follow."""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

#: Pointers to shared memory; a box of a tensor to shared memory; a barrier of the warps of a partition.
copy_rows: Any = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
copy_box: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
warps_barrier: Any = getattr(gl, "barrier", None) or gl.thread_barrier


@builtin
def view(smem: Any, shape: Any, layout: Any, dtype: Any = None, _semantic: Any = None) -> Any:
    """The buffer of another shape and layout, perhaps dtype, and as many bytes, that starts where smem does."""
    method = getattr(smem, "reinterpret", None) or smem._reinterpret
    return method(smem.dtype if dtype is None else dtype, shape, layout, _semantic=_semantic)


@gluon.jit
def appended(items, item):
    """A tuple with one more, of any type to type checkers."""
    return items + (item,)  # noqa: RUF005
