"""Which kernels inductor makes of a function with the layer, what is in each, and why something is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from compile_moe.lowering import fuse_epilogue, fuse_router
from compile_moe.lowering.inductor_compat import ScheduledKernel, scheduled_kernels
from compile_moe.ops.gather_gemm import gather_gemm

_REFUSALS = (fuse_router.refusals, fuse_epilogue.refusals)
# What makes no work of its own.
_SILENT = (
    "getitem",
    "view",
    "reshape",
    "_unsafe_view",
    "unsqueeze",
    "squeeze",
    "expand",
    "permute",
    "slice",
    "split",
)


class Kernel(NamedTuple):
    """One kernel, or the kernels of one op.

    generated: whether inductor generates it. name: the op's or library's name, or the operations that are fused.
    operations: what it computes, by the names of aten and compile_moe. epilogue: the program in GEMM 1's epilogue, "".
    """

    generated: bool
    name: str
    operations: tuple[str, ...]
    epilogue: str


class Explanation(NamedTuple):
    """Of one compile: its kernels in the order of execution, and why operations stayed outside of kernels."""

    kernels: tuple[Kernel, ...]
    refusals: tuple[str, ...]


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Compile ``function`` as one graph for these arguments, and say what became of it. It doesn't run.

    Args:
        function: a function or module that :func:`torch.compile` takes with ``fullgraph=True``.
        args, kwargs: its arguments. The kernels are those for their device.

    Raises:
        NotImplementedError: this torch has another inductor than this version knows.
    """
    for refusals in _REFUSALS:
        refusals.clear()
    torch._dynamo.reset()
    with torch.no_grad(), scheduled_kernels() as scheduled:
        torch.compile(function, fullgraph=True)(*args, **kwargs)
    refused = dict.fromkeys(refusal for refusals in _REFUSALS for refusal in refusals)
    return Explanation(tuple(map(_kernel, scheduled)), tuple(refused))


def _kernel(scheduled: ScheduledKernel) -> Kernel:
    nodes = sorted(scheduled.origins, key=_position)
    operations = tuple(dict.fromkeys(name for name in map(_name, nodes) if name not in _SILENT))
    epilogues = [_epilogue(node) for node in nodes if node.target is gather_gemm]
    return Kernel(
        scheduled.generated, scheduled.name or " + ".join(operations), operations, "".join(epilogues)
    )


def _epilogue(gemm: fx.Node) -> str:
    return str(gemm.kwargs.get("epilogue") or (gemm.args[6] if len(gemm.args) > 6 else ""))


def _position(node: fx.Node) -> int:
    return next((i for i, other in enumerate(node.graph.nodes) if other is node), -1)


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return name if namespace in ("aten", "prims") else f"{namespace}.{name}"
    return getattr(target, "__name__", str(target))
