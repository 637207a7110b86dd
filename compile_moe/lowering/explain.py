"""Which kernels inductor makes of a function with the layer, what is in each, and why something is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from compile_moe.lowering import fuse_epilogue, fuse_router, graph_passes, inductor_compat
from compile_moe.lowering.graph_edits import arguments_of
from compile_moe.lowering.scheduled_kernels import ScheduledKernel, scheduled_kernels
from compile_moe.lowering.separate_kernels import separate_from_finalize
from compile_moe.ops.gather_gemm import gather_gemm
from compile_moe.ops.one_token_experts import one_token_experts
from compile_moe.ops.quantized_one_token_experts import quantized_one_token_experts
from compile_moe.ops.registry import NAMESPACE
from compile_moe.ops.route_and_sort_tokens import route_and_sort_tokens
from compile_moe.ops.route_tokens import route_tokens

_REFUSALS = tuple(module.refusals for module in (graph_passes, fuse_router, fuse_epilogue, inductor_compat))
_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default}
_WITH_EPILOGUE = {gather_gemm, one_token_experts, quantized_one_token_experts}
_CHOICES = {_ATEN.topk.default, route_tokens, route_and_sort_tokens}


class Kernel(NamedTuple):
    """One step of a compiled graph.

    kind: "generated" (one kernel that inductor generates), "op" (one of ours, which launches its own kernels) or "call"
    (of a library or of another op). name: of what is called; "" where generated. operations: what it computes, in the
    names of aten and of our ops. epilogue: the program that runs in GEMM 1's epilogue, or "". is_router_gemm: is it
    the product by which tokens choose their experts.
    """

    kind: str
    name: str
    operations: tuple[str, ...]
    epilogue: str = ""
    is_router_gemm: bool = False


class Explanation(NamedTuple):
    """Of one compile: its kernels in the order of execution, and why operations stayed outside of kernels."""

    kernels: tuple[Kernel, ...]
    refusals: tuple[str, ...]


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Compile ``function`` as one graph for these arguments, and say what became of it. It doesn't run.

    Whatever torch.compile compiled before is compiled again at its next call.

    Args:
        function: a function or module that :func:`torch.compile` takes with ``fullgraph=True``.
        args, kwargs: its arguments, which may be fake tensors. The kernels are those for their device.

    Raises:
        NotImplementedError: this torch has another inductor than this version knows.
    """
    for refusals in _REFUSALS:
        refusals.clear()
    torch._dynamo.reset()
    with torch.no_grad(), scheduled_kernels() as scheduled:
        torch.compile(function, fullgraph=True)(*args, **kwargs)
    refused = [refusal for refusals in _REFUSALS for refusal in refusals]
    reasons = dict.fromkeys(
        (*inductor_compat.missing_for_fusion(), *refused, *separate_from_finalize(scheduled))
    )
    return Explanation(tuple(map(_kernel, scheduled)), tuple(reasons))


def _kernel(scheduled: ScheduledKernel) -> Kernel:
    if scheduled.generated:
        return Kernel("generated", "", scheduled.operations)
    name = scheduled.name.removesuffix(".out")
    kind = "op" if name.startswith(f"{NAMESPACE}.") else "call"
    epilogue = next((_epilogue(node) for node in scheduled.own if node.target in _WITH_EPILOGUE), "")
    is_router_gemm = any(map(_is_router_gemm, scheduled.own))
    return Kernel(kind, name, scheduled.operations, epilogue, is_router_gemm)


def _is_router_gemm(node: fx.Node) -> bool:
    """Whether ``node`` is a product from which experts are chosen, with no other product in between."""
    if node.target not in _PRODUCTS:
        return False
    reached = [node]
    for source in reached:
        for user in source.users:
            if user.target in _CHOICES:
                return True
            if user.target not in _PRODUCTS and user not in reached:
                reached.append(user)
    return False


def _epilogue(gemm: fx.Node) -> str:
    op: Any = gemm.target
    arguments = arguments_of(gemm, op)
    assert arguments is not None, "a call of its own target"
    return str(arguments["epilogue"])
