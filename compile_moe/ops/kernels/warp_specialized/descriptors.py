"""What TMA reads: weights and rows as tensors that it knows the shape of."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from compile_moe.ops.kernels.tiles import device_limits, row_stride
from compile_moe.ops.kernels.warp_specialized.ring import STEP_BYTES


def step(t: Tensor) -> int:
    """Elements of a row of x or of the weights in a stage of the ring."""
    return STEP_BYTES.value // t.element_size()


@functools.cache
def _layout(itemsize: int, rank: int, step_bytes: int = STEP_BYTES.value) -> Any:
    return gl.NVMMASharedLayout(step_bytes, 8 * itemsize, rank)


def gated_weights(w1: Tensor, layout: str, step_bytes: int = STEP_BYTES.value) -> TensorDescriptor:
    """w1 (E, 2I, K) as (E, I / 8, gate or up, 8, K): 8 rows of the gate, then the 8 of up that belong to them.

    Args:
        step_bytes: of each row, at a time.
    """
    e, n, k = w1.shape
    stride_e, stride_n, _ = w1.stride()
    half = n // 2
    if layout == "interleaved":
        strides = [stride_e, 16 * stride_n, stride_n, 2 * stride_n, 1]
    else:
        strides = [stride_e, 8 * stride_n, half * stride_n, stride_n, 1]
    block = [1, 8, 2, 8, step_bytes // w1.element_size()]
    return TensorDescriptor(
        w1, [e, half // 8, 2, 8, k], strides, block, _layout(w1.element_size(), 5, step_bytes)
    )


def plain_weights(w: Tensor, step_bytes: int = STEP_BYTES.value) -> TensorDescriptor:
    """w (E, rows, depth), 128 rows and ``step_bytes`` of each at a time."""
    block = [1, 128, step_bytes // w.element_size()]
    return TensorDescriptor(
        w, list(w.shape), list(w.stride()), block, _layout(w.element_size(), 3, step_bytes)
    )


def transposed_weights(w: Tensor) -> TensorDescriptor:
    """w (E, rows, depth) whose rows lie side by side, as (E, depth, rows): 64 of each."""
    # Over w itself, which the launcher knows.
    (e, n, k), (stride_e, stride_n, stride_k) = w.shape, w.stride()
    return TensorDescriptor(
        w, [e, k, n], [stride_e, stride_k, stride_n], [1, 64, 64], _layout(w.element_size(), 3)
    )


def rows(x: Tensor, num_rows: int) -> TensorDescriptor:
    """x (S, depth), ``num_rows`` at a time. Without any rows it is made, for the kernel to compile, but not read."""
    return TensorDescriptor(
        x,
        [max(1, x.size(0)), x.size(1)],
        [row_stride(x), 1],
        [num_rows, step(x)],
        _layout(x.element_size(), 2),
    )


def num_programs(device_index: int | None) -> int:
    """One program a multiprocessor; as many as an H100 has where there is no device (None)."""
    return device_limits(device_index).multiprocessors
