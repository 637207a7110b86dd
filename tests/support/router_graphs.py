"""Graphs with routers, as inductor has them before its post-grad passes, and what the library's passes make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from compile_moe.lowering import fuse_router as passes
from compile_moe.lowering.fuse_router import fuse_router, fuse_router_and_sort
from tests.support.fake_cuda import GeneratedKernels, cuda_empty, generated_kernels

#: From one or more tensors to the weights and ids, or to anything else.
Router = Callable[..., Any]


class _Passes(CustomGraphPass):
    """As the library installs them, whatever else is installed."""

    def __call__(self, graph: fx.Graph) -> None:
        fuse_router(graph)
        fuse_router_and_sort(graph)

    def uuid(self) -> None:
        return None


def kernels_on_a_gpu(
    function: Router, make_args: Callable[[], tuple[Any, ...]], **options: Any
) -> GeneratedKernels:
    """The code that inductor generates behind the passes; ``refusals`` are those of this graph."""
    passes.refusals.clear()
    # Folding constants would compute on the device.
    with inductor_config.patch(post_grad_custom_pre_pass=_Passes(), joint_graph_constant_folding=False):
        return generated_kernels(function, make_args, **options)


def on_a_gpu(
    function: Router, *shape: int, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> GeneratedKernels:
    """The code for logits of ``shape``."""
    return kernels_on_a_gpu(function, lambda: (cuda_empty(*shape, dtype=dtype),), **options)


def reads_topk(kernels: GeneratedKernels) -> bool:
    return any("topk" in call for call in kernels.extern_calls if "compile_moe" not in call)


def traced(function: Router, *inputs: Any) -> fx.GraphModule:
    """The graph on the CPU, without mutations, and behind inductor's passes over joint graphs."""
    tables = select_decomp_table()
    graph = make_fx(
        functionalize(lambda *args: function(*args)), decomposition_table=tables, tracing_mode="fake"
    )
    module = graph(*inputs)
    module.graph.eliminate_dead_code()
    fake_mode = next(iter(module.graph.nodes)).meta["val"].fake_mode
    with V.set_fake_mode(fake_mode), fake_mode:
        return joint_graph_passes(module)


def our_calls(module: fx.GraphModule) -> list[Any]:
    """The calls of our ops."""
    return [node.target for node in module.graph.nodes if "compile_moe" in str(node.target)]


def assert_nothing_left_over(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta["val"], Tensor):
            assert node.users, f"{node} is left over"
