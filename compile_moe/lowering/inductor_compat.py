"""The only importer of torch._inductor, whose whole interface is private.

Lowerings are written against the names of this file. If inductor lacks one of them, registration says so once and the
ops stay opaque in the graph: correct, but nothing fuses with them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

try:
    from torch._inductor import config, custom_graph_pass
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import Pointwise, TensorBox
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V, ops

    missing: str | None = None
except ImportError as error:  # pragma: no cover - depends on the torch version
    missing = str(error)
    CustomGraphPass: Any = object  # type: ignore[no-redef]
    GraphLowering = Pointwise = TensorBox = V = ops = register_lowering = None  # type: ignore[assignment,misc]

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


class ScheduledKernel(NamedTuple):
    """What inductor decided to run as one: a kernel that it generates, or one call of an op or a library."""

    generated: bool
    name: str  # of the op or library function; "" where generated
    origins: tuple[torch.fx.Node, ...]  # operations of the graph that are computed in it, in no order


class _Scheduled(Exception):
    """Stops the compilation: the kernels are known."""


@contextmanager
def scheduled_kernels() -> Iterator[list[ScheduledKernel]]:
    """The kernels of the graph that the body compiles, in the order of their execution.

    The body ends where inductor would load the generated code, and nothing runs: tensors may be fake.

    Raises:
        NotImplementedError: this torch has another inductor than this version knows.
    """
    if missing is not None:
        raise NotImplementedError(_MISSING.format(torch=torch.__version__, missing=missing))
    kernels: list[ScheduledKernel] = []
    finished = False

    def collect(nodes: list[Any]) -> list[Any]:
        kernels.extend(filter(None, map(_scheduled_kernel, nodes)))
        return nodes

    def stop(graph: Any) -> None:
        nonlocal finished
        graph.codegen_with_cpp_wrapper() if graph.cpp_wrapper else graph.codegen()
        finished = True
        raise _Scheduled

    patches: dict[str, Any] = {
        "_post_fusion_custom_pass": collect,
        "compile_threads": 1,
        "fx_graph_cache": False,
        "shape_padding": False,  # padding is chosen by benchmarks, which fake tensors can't run
    }
    with (
        config.patch(patches),
        torch._functorch.config.patch({"enable_autograd_cache": False}),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
    ):
        try:
            yield kernels
        except Exception:
            # Dynamo wraps the exception that stops it.
            if not finished:
                raise


def _scheduled_kernel(node: Any) -> ScheduledKernel | None:
    origins = {origin for part in node.get_nodes() if part.node for origin in part.node.get_origins()}
    if not node.is_extern():
        is_nothing = type(node).__name__ == "NopKernelSchedulerNode"
        return None if is_nothing else ScheduledKernel(True, "", tuple(origins))
    if type(node.node).__name__ == "MultiOutput":  # one result of a call
        return None
    overload = getattr(node.node, "op_overload", None)
    name = str(overload or node.node.python_kernel_name or type(node.node).__name__)
    return ScheduledKernel(False, name.removesuffix(".default"), tuple(origins))


__all__ = [
    "ScheduledKernel",
    "TensorBox",
    "install_passes",
    "lower",
    "missing",
    "ops",
    "pointwise",
    "scheduled_kernels",
    "static_int",
]
