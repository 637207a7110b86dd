"""Bounds checks for Triton's interpreter, which otherwise reads and writes wherever a pointer leads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def check_bounds(shipped: Any) -> None:
    """Raise where a kernel touches memory outside the storages of its arguments."""
    builder, executor = shipped.InterpreterBuilder, shipped.GridExecutor
    shipped_load, shipped_store = builder.create_masked_load, builder.create_masked_store
    shipped_atomic, shipped_call = builder.create_atomic_rmw, executor.__call__
    shipped_init = executor._init_args_hst
    nothing = np.empty(0, np.uint64), np.empty(0, np.uint64)
    allowed: list[tuple[np.ndarray, np.ndarray]] = []  # starts and ends for each launch under way

    def check(pointers: Any, mask: Any, action: str) -> None:
        if not allowed:
            return
        starts, ends = allowed[-1]
        active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[active]
        if addresses.size == 0:
            return
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if starts.size:
            nearest = np.searchsorted(starts, addresses, side="right")
            outside = (nearest == 0) | (addresses > ends[nearest - 1] - np.uint64(width))
        else:
            outside = np.ones(addresses.shape, dtype=bool)
        if outside.any():
            raise IndexError(
                f"{action} outside every argument: {int(outside.sum())} of {addresses.size} active addresses, "
                f"the first in lane {tuple(int(i) for i in np.argwhere(active)[outside.argmax()])}"
            )

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(pointers, mask, "load")
        return shipped_load(self, pointers, mask, *rest, **named)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "store")
        return shipped_store(self, pointers, value, mask, *rest)

    def atomic(self: Any, op: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointer, mask, "atomic")
        return shipped_atomic(self, op, pointer, value, mask, *rest)

    def init_arguments(self: Any, arguments: Any, named: Any) -> Any:
        host = shipped_init(self, arguments, named)
        storages = (tensor.untyped_storage() for tensor in _tensors_in(host))
        spans = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.nbytes() > 0})
        edges = np.array(spans, dtype=np.uint64).reshape(-1, 2)
        allowed[-1] = edges[:, 0], edges[:, 1]
        return host

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        allowed.append(nothing)
        try:
            # Lanes that a mask discards may overflow or divide by zero, as they may on a GPU.
            with np.errstate(all="ignore"):
                return shipped_call(self, *arguments, **named)
        finally:
            allowed.pop()

    builder.create_masked_load = load
    builder.create_masked_store = store
    builder.create_atomic_rmw = atomic
    executor._init_args_hst = init_arguments
    executor.__call__ = call


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
    elif hasattr(value, "base"):  # a tensor descriptor or a reinterpreted tensor
        yield from _tensors_in(value.base)
