"""Which kernels inductor makes of a graph, known when it has scheduled them and before anything runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from compile_moe.lowering import inductor_compat as inductor
from compile_moe.lowering.graph_edits import name_of
from compile_moe.ops.act_and_mul import act_and_mul
from compile_moe.ops.reduce_batch import reduce_batch
from compile_moe.ops.weight_and_reduce import weight_and_reduce

# What makes no work of its own in a generated kernel.
_SILENT = {
    *("_unsafe_view", "alias", "expand", "permute", "reshape", "squeeze", "transpose", "unsqueeze", "view"),
    *("getitem", "select", "slice", "split", "split_with_sizes", "unbind", "clone", "full"),
}


class ScheduledKernel(NamedTuple):
    """What inductor decided to run as one: a kernel that it generates, or one call of an op or a library."""

    generated: bool
    name: str  # of the op or library function; "" where generated
    origins: tuple[torch.fx.Node, ...]  # operations of the graph that it comes from, in the graph's order

    @property
    def own(self) -> tuple[torch.fx.Node, ...]:
        """Those that it computes: what a call asks of its arguments makes it their origin, too."""
        if self.generated:
            return tuple(node for node in self.origins if _is_lowered(node))
        name = self.name.removesuffix(".out")
        return tuple(node for node in self.origins if name in (name_of(node), f"aten.{name_of(node)}"))

    @property
    def operations(self) -> tuple[str, ...]:
        """Their names, without those that are no work in a generated kernel."""
        names = dict.fromkeys(map(name_of, self.own))
        return tuple(name for name in names if not (self.generated and name in _SILENT))


def _is_lowered(node: torch.fx.Node) -> bool:
    namespace = getattr(node.target, "namespace", "aten")
    return namespace in ("aten", "prims") or node.target in (act_and_mul, weight_and_reduce, reduce_batch)


class _Scheduled(Exception):
    """Stops the compilation: the kernels are known."""


# Patches of one thread must not be taken back in between another's.
_lock = threading.RLock()


@contextmanager
def scheduled_kernels() -> Iterator[list[ScheduledKernel]]:
    """The kernels of the graph that the body compiles, in the order of their execution.

    The body ends where inductor would load the generated code, and nothing runs: tensors may be fake. What other
    threads compile meanwhile is not touched.

    Raises:
        NotImplementedError: this torch has another inductor than this version knows.
    """
    lacking = inductor.missing("explain")
    if lacking is not None:
        raise NotImplementedError(lacking)
    kernels: list[ScheduledKernel] = []
    finished = False
    failure: Exception | None = None
    thread = threading.get_ident()

    def collect(nodes: list[Any]) -> list[Any]:
        nonlocal failure
        if threading.get_ident() == thread:
            try:
                kernels.extend(filter(None, map(_scheduled_kernel, nodes)))
            except Exception as error:  # names that only objects have can't be probed
                failure = error
                raise
        return nodes

    def stop(graph: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal finished
        if threading.get_ident() != thread:
            return original(graph, *args, **kwargs)
        graph.codegen_with_cpp_wrapper() if graph.cpp_wrapper else graph.codegen()
        finished = True
        raise _Scheduled

    patches: dict[str, Any] = {
        "_post_fusion_custom_pass": collect,
        "compile_threads": 1,
        "fx_graph_cache": False,
        "shape_padding": False,  # padding is chosen by benchmarks, which fake tensors can't run
    }
    with _lock:
        original = inductor.graph.GraphLowering.compile_to_module
        with (
            inductor.config.patch(patches),
            torch._functorch.config.patch({"enable_autograd_cache": False}),
            mock.patch.object(inductor.graph.GraphLowering, "compile_to_module", stop),
        ):
            try:
                yield kernels
            except Exception:
                # Dynamo wraps the exception that stops it.
                if failure is None and not finished:
                    raise
    if failure is not None:
        difference = f"whose scheduler raised {type(failure).__name__}: {failure}"
        raise NotImplementedError(inductor.unknown_inductor("explain", difference)) from failure
    if kernels and not finished:
        difference = "which loads generated code elsewhere"
        raise NotImplementedError(inductor.unknown_inductor("explain", difference))


def _scheduled_kernel(node: Any) -> ScheduledKernel | None:
    found = {origin for part in node.get_nodes() if part.node for origin in part.node.get_origins()}
    origins = tuple(sorted(found))
    if not node.is_extern():
        is_nothing = isinstance(node, inductor.scheduler.NopKernelSchedulerNode)
        return None if is_nothing else ScheduledKernel(True, "", origins)
    if isinstance(node.node, inductor.ir.MultiOutput):  # one result of a call
        return None
    overload = getattr(node.node, "op_overload", None)
    name = str(overload or node.node.python_kernel_name or type(node.node).__name__)
    return ScheduledKernel(False, name.removesuffix(".default"), origins)
