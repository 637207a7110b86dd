"""The only importer of torch._inductor, whose whole interface is private.

Lowerings, passes and explain are written against the names of this file. What they take of inductor is probed once,
when the first of them is registered. What inductor lacks is not used: without lowerings the ops stay opaque in the
graph, without the slot for passes graphs stay as they are, and explain says that it can't. Whatever happens, results
are right; that something isn't fused is said once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import sympy
import torch

from compile_moe.lowering.fusion_warning import warn_once
from compile_moe.lowering.refusals import Refusals


def _module(name: str) -> Any:
    """A module of torch._inductor; one without any names if it can't be imported."""
    try:
        return importlib.import_module(f"torch._inductor.{name}")
    except ImportError:
        return SimpleNamespace()


config, custom_graph_pass, graph, ir = map(_module, ("config", "custom_graph_pass", "graph", "ir"))
inductor_lowering, scheduler, sizevars = map(_module, ("lowering", "scheduler", "sizevars"))
virtualized = _module("virtualized")
CustomGraphPass: Any = getattr(custom_graph_pass, "CustomGraphPass", object)
#: Inductor's own pointwise operations, for the elements of ``pointwise``.
ops: Any = getattr(virtualized, "ops", None)

#: What lowerings left opaque, newest last; for those who want to explain a graph.
refusals = Refusals()

_INTEGERS = ("guard_int", "evaluate_static_shape")


_LIKE = SimpleNamespace(get_device=lambda: torch.device("cpu"))


def _trial() -> None:
    """What ``pointwise`` does, on a constant."""
    pointwise(_LIKE, torch.float32, [sympy.Integer(2)], lambda _: ops.constant(0.0, torch.float32))


def _attributes(*paths: str) -> dict[str, Callable[[], Any]]:
    """Probes for names in this file's modules."""

    def probe(path: str) -> Any:
        module, _, name = path.partition(".")
        return operator.attrgetter(name)(globals()[module])

    return {path: functools.partial(probe, path) for path in paths}


_PROBES: Mapping[str, Mapping[str, Callable[[], Any]]] = {
    "lowerings": {
        "lowering.register_lowering(op, type_promotion_kind=None)": lambda: inspect.signature(
            inductor_lowering.register_lowering
        ).bind(None, type_promotion_kind=None),
        "lowering.fallback_handler(op, add_to_fallback_set=False)": lambda: inspect.signature(
            inductor_lowering.fallback_handler
        ).bind(None, add_to_fallback_set=False),
        "ir.Pointwise.create(device, dtype, inner_fn, ranges)": _trial,
        "ir.Reduction.create(device, dst_dtype, src_dtype, inner_fn, ranges, reduction_ranges, reduction_type)": (
            lambda: inspect.signature(ir.Reduction.create).bind(
                **_max_of(_LIKE, torch.float32, [], [], _max_of)
            )
        ),
        f"sizevars.SizeVarAllocator.{' or .'.join(_INTEGERS)}": lambda: _size_function(
            sizevars.SizeVarAllocator
        ),
        **_attributes("virtualized.V", "ir.TensorBox", "ir.View.create"),
    },
    "passes": _attributes("config.post_grad_custom_pre_pass", "custom_graph_pass.CustomGraphPass"),
    "explain": {
        "torch._functorch.config.enable_autograd_cache": lambda: (
            torch._functorch.config.enable_autograd_cache
        ),
        **_attributes(
            *("config.patch", "config._post_fusion_custom_pass", "config.compile_threads"),
            *("config.fx_graph_cache", "config.shape_padding", "graph.GraphLowering.compile_to_module"),
            *("graph.GraphLowering.codegen", "graph.GraphLowering.codegen_with_cpp_wrapper"),
            *("scheduler.BaseSchedulerNode.get_nodes", "scheduler.BaseSchedulerNode.is_extern"),
            *("scheduler.NopKernelSchedulerNode", "ir.Operation.get_origins", "ir.MultiOutput"),
        ),
    },
}
_WITHOUT = {
    "lowerings": "its ops stay opaque, and nothing is fused with them",
    "passes": "routers and activations that a model wrote itself stay as they are",
    "explain": "compile_moe.explain can't say what it does",
}


@functools.cache
def missing(what: str) -> str | None:
    """Why ``what`` ("lowerings", "passes" or "explain") can't be had from this torch; None if it can."""
    lacking = [name for name, probe in _PROBES[what].items() if not _succeeds(probe)]
    if not lacking:
        return None
    return unknown_inductor(what, f"without {', '.join(lacking)}")


def unknown_inductor(what: str, difference: str) -> str:
    return f"torch {torch.__version__} has another inductor than this version knows, {difference}; {_WITHOUT[what]}"


def _succeeds(probe: Callable[[], Any]) -> bool:
    try:
        probe()
    except Exception:  # whatever a changed interface does
        return False
    return True


def missing_for_fusion() -> tuple[str, ...]:
    """Why ops stay opaque and graphs as they are, where they do."""
    return tuple(filter(None, (missing("lowerings"), missing("passes"))))


def _size_function(allocator: Any) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] = getattr(allocator, _INTEGERS[0], None) or getattr(
        allocator, _INTEGERS[1]
    )
    return function


_registered: set[torch._ops.OpOverload] = set()
_lock = threading.RLock()


def lower(op: torch._ops.OpOverload, lowering: Callable[..., Any]) -> None:
    """Register ``lowering`` for ``op``, once."""
    with _lock:
        if op in _registered:
            return
        if missing("lowerings") is None:
            register = inductor_lowering.register_lowering(op, type_promotion_kind=None)
            register(_or_opaque(op, lowering))
        _registered.add(op)


def _or_opaque(op: torch._ops.OpOverload, lowering: Callable[..., Any]) -> Callable[..., Any]:
    """``lowering``; where it raises, a call of the op, as if there were none."""
    call = inductor_lowering.fallback_handler(op, add_to_fallback_set=False)

    @functools.wraps(lowering)
    def lowered(*args: Any, **kwargs: Any) -> Any:
        try:
            return lowering(*args, **kwargs)
        except Exception as error:  # of ours, or of a changed inductor
            reason = f"the lowering of {op} raised {type(error).__name__}: {error}"
            refusals.refuse(reason)
            warn_once(
                f"lowering {op}", f"{reason}; calls of the op stay opaque, and nothing is fused with them"
            )
            return call(*args, **kwargs)

    return lowered


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
    if missing("passes") is not None:
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
    box = ir.Pointwise.create(device=like.get_device(), dtype=dtype, inner_fn=element, ranges=list(sizes))
    # Inductor evaluates elements when it is too late to do without them, so here is a first time.
    box.data.data.inner_fn_opcount()
    return box


def row_maxima(
    like: Any,
    dtype: torch.dtype,
    sizes: Sequence[Any],
    reduced: Sequence[Any],
    element: Callable[[Sequence[Any], Sequence[Any]], Any],
) -> Any:
    """Tensor of ``sizes``, realized: the largest ``element(index, reduced_index)``; NaN is larger than all."""
    # Evaluates an element, before anything of the reduction is in the graph.
    n = len(sizes)
    pointwise(like, dtype, [*sizes, *reduced], lambda index: element(index[:n], index[n:]))
    box = ir.Reduction.create(**_max_of(like, dtype, sizes, reduced, element))
    box.realize()
    return box


def _max_of(
    like: Any, dtype: torch.dtype, sizes: Sequence[Any], reduced: Sequence[Any], element: Callable[..., Any]
) -> dict[str, Any]:
    return {
        "device": like.get_device(),
        "dst_dtype": dtype,
        "src_dtype": dtype,
        "inner_fn": element,
        "ranges": list(sizes),
        "reduction_ranges": list(reduced),
        "reduction_type": "max",
    }


def flattened(box: Any, sizes: Sequence[Any]) -> Any:
    """A tensor, which is realized, as a view of these sizes."""
    box.realize()
    return ir.TensorBox(ir.View.create(box.data, list(sizes)))


def call(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """A call of the op, as if it had no lowering."""
    return inductor_lowering.fallback_handler(op, add_to_fallback_set=False)(*arguments)


def node_being_lowered() -> torch.fx.Node | None:
    node: torch.fx.Node | None = getattr(virtualized.V.graph, "current_node", None)
    return node


def is_lowered(op: Any) -> bool:
    """Whether it is an op with a lowering of ours."""
    return op in _registered


def static_int(size: Any) -> int:
    """The value of a size that must be static."""
    return int(_size_function(virtualized.V.graph.sizevars)(size))


__all__ = [
    "GraphFunction",
    "call",
    "config",
    "flattened",
    "graph",
    "install_passes",
    "ir",
    "is_lowered",
    "lower",
    "missing",
    "missing_for_fusion",
    "node_being_lowered",
    "ops",
    "pointwise",
    "refusals",
    "row_maxima",
    "scheduler",
    "static_int",
    "unknown_inductor",
]
