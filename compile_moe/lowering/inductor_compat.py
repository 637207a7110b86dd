"""The only importer of torch._inductor, whose whole interface is private.

Lowerings are written against the names of this file. If inductor lacks one of them, registration says so once and the
ops stay opaque in the graph: correct, but nothing fuses with them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

try:
    from torch._inductor import config, custom_graph_pass
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.ir import Pointwise, TensorBox
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V, ops

    missing: str | None = None
except ImportError as error:  # pragma: no cover - depends on the torch version
    missing = str(error)
    CustomGraphPass: Any = object  # type: ignore[no-redef]
    Pointwise = TensorBox = V = ops = register_lowering = None  # type: ignore[assignment,misc]

_MISSING = (
    "compile_moe: torch {torch} has another inductor than this version knows ({missing}); its ops stay opaque and "
    "nothing is fused with them"
)
_registered: set[torch._ops.OpOverload] = set()
_lock = threading.RLock()


def lower(op: torch._ops.OpOverload, lowering: Callable[..., Any]) -> None:
    """Register ``lowering`` for ``op``, once."""
    with _lock:
        if op in _registered:
            return
        if missing is None:
            register_lowering(op, type_promotion_kind=None)(lowering)
        elif not _registered:
            warnings.warn(_MISSING.format(torch=torch.__version__, missing=missing), stacklevel=2)
        _registered.add(op)


GraphFunction = Callable[[torch.fx.Graph], None]


class _Passes(CustomGraphPass):
    """Functions that rewrite a graph, after ``others``, and what they are to inductor's caches."""

    def __init__(self, functions: Sequence[GraphFunction], identity: str, others: Sequence[Any]) -> None:
        self.functions = functions
        self.identity = identity
        self.others = others

    def __call__(self, graph: torch.fx.Graph) -> None:
        for function in (*self.others, *self.functions):
            function(graph)

    def uuid(self) -> Any:
        identities = [other.uuid() if hasattr(other, "uuid") else None for other in self.others]
        # None keeps graphs out of the caches, as others ask for by having none.
        return None if None in identities else (self.identity, *identities)


def install_passes(functions: Sequence[GraphFunction], identity: str) -> None:
    """Let inductor call ``functions`` on each graph after decomposition, behind whatever else it has to call there.

    Args:
        functions: rewrite a graph in place.
        identity: part of the key of inductor's caches for everything compiled from now on.
    """
    if missing is not None:
        return
    slot: Any = config.post_grad_custom_pre_pass
    others = tuple(slot) if isinstance(slot, (list, tuple)) else () if slot is None else (slot,)
    if any(isinstance(other, _Passes) for other in others):
        return
    # Before torch 2.13 the slot takes one pass.
    takes_several = hasattr(custom_graph_pass, "get_custom_graph_passes")
    config.post_grad_custom_pre_pass = (
        (*others, _Passes(functions, identity, ())) if takes_several else _Passes(functions, identity, others)
    )


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


__all__ = ["TensorBox", "install_passes", "lower", "missing", "ops", "pointwise", "static_int"]
