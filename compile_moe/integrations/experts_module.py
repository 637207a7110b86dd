"""An experts module of transformers, with weights of any format, through the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compile_moe.dtensor_weights import is_dtensor, shard_of_experts
from compile_moe.experts import TritonExperts
from compile_moe.fused_experts import fused_experts
from compile_moe.modular_kernel import FusedMoEModularKernel
from compile_moe.prepare_finalize import MoEPrepareAndFinalizeNoEP
from compile_moe.quant_config import FusedMoEQuantConfig

#: What to give as ``experts_implementation``.
NAME = "compile_moe"


class Operands(NamedTuple):
    """Weights (E, N, K) and (E, K, I) in their scheme's layout, and the dtype that the tokens are given."""

    w1: Tensor
    w2: Tensor
    quant_config: FusedMoEQuantConfig | None
    dtype: torch.dtype


def is_experts(module: object) -> bool:
    """Whether transformers dispatches a module by ``experts_implementation``."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def projections(module: Any) -> tuple[str, str]:
    """Names of w1 and w2."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def float_weight(module: Any, name: str) -> Tensor:
    """A weight or bias of a module that isn't quantized; of a DTensor, this rank's experts."""
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{type(module).__name__}.{name} must be a tensor, got {type(weight).__name__}; compile_moe runs experts "
            "with the stacked weights of transformers' use_experts_implementation; choose another "
            "experts_implementation for this model"
        )
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise TypeError(
            f"{type(module).__name__}.{name} must be bfloat16, float16, float32 or float64, got {weight.dtype}; "
            "this integration does not know how these experts are quantized: load the model dequantized, or choose "
            "another experts_implementation"
        )
    if not is_dtensor(weight):
        return weight
    local: Tensor = shard_of_experts(f"{type(module).__name__}.{name}", weight)
    # Transformers' expert-parallel plan says so where a rank's ids are those of its own experts.
    num_experts = getattr(module, "num_experts", None)
    if local.size(0) != num_experts:
        raise ValueError(
            f"{type(module).__name__}.{name} is sharded over ranks, {local.size(0)} of {num_experts} experts on "
            "this one, and nothing sends their tokens there: shard the model by transformers' expert-parallel plan "
            "(distributed_config), or give its weights as plain tensors to compile_moe.parallelize"
        )
    return local


def float_weights(module: Any) -> tuple[Tensor, Tensor]:
    """w1 (E, N, K) and w2 (E, K, I) of a module that isn't quantized, as views."""
    w1, w2 = (float_weight(module, name) for name in projections(module))
    if module.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    return w1, w2


def run_experts(
    module: Any, operands: Operands, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The layer with a module's activation, biases and norm, in hidden_states' dtype."""
    w1_bias, w2_bias = (
        float_weight(module, f"{name}_bias") if module.has_bias else None for name in projections(module)
    )
    activation = module._apply_gate if module.has_gate else module.act_fn
    # A norm that keeps float32 hands over more precision than the weights have.
    given = hidden_states.to(operands.dtype), operands.w1, operands.w2, top_k_weights, top_k_index
    config = operands.quant_config
    if getattr(module, "has_post_expert_norm", False):
        parts = _PostExpertNorm(module.post_expert_norm, config), TritonExperts(w1_bias, w2_bias, config)
        result = FusedMoEModularKernel(*parts)(*given, activation=activation)
    else:
        result = fused_experts(
            *given, activation=activation, quant_config=config, w1_bias=w1_bias, w2_bias=w2_bias
        )
    return result.to(hidden_states.dtype)


class _PostExpertNorm(MoEPrepareAndFinalizeNoEP):
    """Normalises each expert's output before the weighted sum (transformers newer than 5.17)."""

    def __init__(
        self, norm: Callable[[Tensor], Tensor], quant_config: FusedMoEQuantConfig | None = None
    ) -> None:
        super().__init__(quant_config)
        self.norm = norm

    def finalize(self, output: Tensor, fused_expert_output: Tensor, *args: Any, **kwargs: Any) -> None:
        super().finalize(output, self.norm(fused_expert_output), *args, **kwargs)
