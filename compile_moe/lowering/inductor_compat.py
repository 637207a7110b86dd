"""The only importer of torch._inductor, whose whole interface is private.

Lowerings are written against the names of this file. If inductor lacks one of them, registration says so once and the
ops stay opaque in the graph: correct, but nothing fuses with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

try:
    from torch._inductor.ir import Pointwise, TensorBox
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V, ops

    missing: str | None = None
except ImportError as error:  # pragma: no cover - depends on the torch version
    missing = str(error)

_registered: set[torch._ops.OpOverload] = set()


def lower(op: torch._ops.OpOverload, lowering: Callable[..., Any]) -> None:
    """Register ``lowering`` for ``op``, once."""
    if op in _registered:
        return
    _registered.add(op)
    if missing is not None:
        warnings.warn(
            f"compile_moe: torch {torch.__version__} has another inductor than this version knows ({missing}); "
            f"{op} stays opaque and nothing is fused with it",
            stacklevel=2,
        )
        return
    register_lowering(op, type_promotion_kind=None)(lowering)


def pointwise(
    like: Any, dtype: torch.dtype, sizes: Sequence[Any], element: Callable[[Sequence[Any]], Any]
) -> Any:
    """Tensor of ``sizes`` on the device of ``like`` whose element at an index is ``element(index)``."""
    return Pointwise.create(device=like.get_device(), dtype=dtype, inner_fn=element, ranges=list(sizes))


def static_int(size: Any) -> int:
    """The value of a size that must be static."""
    sizevars: Any = V.graph.sizevars
    guard = getattr(sizevars, "guard_int", None) or sizevars.evaluate_static_shape
    return int(guard(size))


__all__ = ["TensorBox", "lower", "missing", "ops", "pointwise", "static_int"]
