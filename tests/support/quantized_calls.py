"""Ways to call a quantized layer, and activations that are no names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import compile_moe
from compile_moe import FusedMoEModularKernel, MoEPrepareAndFinalizeNoEP, TorchExperts, TritonExperts
from tests.support.quantized import Quantized

EXPERTS: dict[str, type[Any]] = {"TritonExperts": TritonExperts, "TorchExperts": TorchExperts}
#: Kinds of static scales, which fp8_w8a8_tensor has.
STATIC = ("one", "each")

CALLABLES: dict[str, Any] = {
    "pointwise": lambda x: F.silu(x[..., ::2].clamp(max=1.5)) * (x[..., 1::2] + 1),
    "row-wise": lambda x: F.softmax(x.chunk(2, -1)[0], -1) * x.chunk(2, -1)[1],
    # What is no zero for zeros must not reach a scale over all rows from skipped slots.
    "pointwise-of-zero": lambda x: torch.where(x.chunk(2, -1)[0] == 0, 1e5, F.silu(x.chunk(2, -1)[0])),
    "row-wise-of-zero": lambda x: x.chunk(2, -1)[1] + 1e5 * (x.abs().sum(-1, keepdim=True) == 0),
}


def kernel_of(q: Quantized, experts: str, **changes: Any) -> Callable[..., Tensor]:
    config = q.config(**changes)
    made = EXPERTS[experts](q.layer.w1_bias, q.layer.w2_bias, config)
    return FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(config), made)


def run(q: Quantized, experts: str = "fused_experts", backend: str | None = None) -> Tensor:
    options = q.layer.options
    function: Callable[..., Tensor]
    if experts == "fused_experts":
        function, options = compile_moe.fused_experts, options | {"quant_config": q.config()}
    else:
        function = kernel_of(q, experts)
        options = {k: v for k, v in options.items() if not k.endswith("_bias")}
    if backend is not None:
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend=backend)
    return function(*q.args, **options)
