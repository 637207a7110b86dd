"""An experts module of transformers, with weights of any format, through the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compile_moe.dtensor_weights import is_dtensor, shard_of_experts
from compile_moe.experts import BatchedTritonExperts, TritonExperts
from compile_moe.fused_experts import fused_experts
from compile_moe.modular_kernel import FusedMoEModularKernel
from compile_moe.prepare_finalize import MoEPrepareAndFinalizeNoEP
from compile_moe.quant_config import FusedMoEQuantConfig

#: What to give as ``experts_implementation``.
NAME = "compile_moe"
#: The attribute of :func:`parts_of`.
PARTS = "compile_moe_prepare_finalize"


class Operands(NamedTuple):
    """Weights (E, N, K) and (E, K, I) in their scheme's layout, and the dtype that the tokens are given."""

    w1: Tensor
    w2: Tensor
    quant_config: FusedMoEQuantConfig | None
    dtype: torch.dtype


def is_experts(module: object) -> bool:
    """Whether transformers dispatches a module by ``experts_implementation``."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def parts_of(module: Any) -> Any:
    """How tokens of this rank reach the experts of all, where a module holds one rank's; else None."""
    return getattr(module, PARTS, None)


def refuse_save_pretrained(model: Any, instead: Callable[..., None]) -> None:
    """Replace save_pretrained of a model, and of the models in it that have experts, by a function that raises."""
    for module in model.modules():
        if hasattr(module, "save_pretrained") and any(map(is_experts, module.modules())):
            # A function of a module: the model can still be copied and pickled.
            module.save_pretrained = instead


def projections(module: Any) -> tuple[str, str]:
    """Names of w1 and w2."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def float_weight(module: Any, name: str, any_layout: bool = False) -> Tensor:
    """A weight or bias of a module that isn't quantized; of a DTensor, this rank's experts, unless it may have any
    layout.
    """
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
    if any_layout or not is_dtensor(weight):
        return weight
    local: Tensor = shard_of_experts(f"{type(module).__name__}.{name}", weight)
    # Transformers' expert-parallel plan says so where a rank's ids are those of its own experts.
    num_experts = getattr(module, "num_experts", None)
    if local.size(0) != num_experts:
        raise ValueError(
            f"{type(module).__name__}.{name} is sharded over ranks, {local.size(0)} of {num_experts} experts on "
            "this one, and nothing sends their tokens there: shard the model by transformers' expert-parallel plan "
            "(distributed_config), or let compile_moe.parallelize spread its experts"
        )
    return local


def float_weights(module: Any, any_layout: bool = False) -> tuple[Tensor, Tensor]:
    """w1 (E, N, K) and w2 (E, K, I) of a module that isn't quantized, as views."""
    w1, w2 = (float_weight(module, name, any_layout) for name in projections(module))
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
    config, parts = operands.quant_config, parts_of(module)
    has_norm = getattr(module, "has_post_expert_norm", False)
    if parts is None and not has_norm:
        result = fused_experts(
            *given, activation=activation, quant_config=config, w1_bias=w1_bias, w2_bias=w2_bias
        )
    else:
        if has_norm:
            experts: Any = _NormedExperts(module.post_expert_norm, w1_bias, w2_bias, config)
        elif parts.reduces_batches:
            experts = BatchedTritonExperts(parts.max_num_tokens, w1_bias, w2_bias, config)
        else:
            experts = TritonExperts(w1_bias, w2_bias, config)
        expert_map = None if parts is None else parts.expert_map
        if expert_map is not None and expert_map.device != hidden_states.device:
            raise ValueError(
                f"tokens are on {hidden_states.device}, but compile_moe.parallelize put these experts on "
                f"{expert_map.device}; parallelize a model when it is on its device, or on the meta device"
            )
        kernel = FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(config) if parts is None else parts, experts)
        result = kernel(*given, activation=activation, expert_map=expert_map)
    return result.to(hidden_states.dtype)


class _NormedExperts(TritonExperts):
    """Normalises each expert's output before the weighted sum (transformers newer than 5.17)."""

    def __init__(self, norm: Callable[[Tensor], Tensor], *args: Any) -> None:
        super().__init__(*args)
        self.norm = norm

    def workspace_shapes(self, *args: Any, **options: Any) -> tuple[int, int, torch.dtype]:
        return 0, 0, args[0].dtype

    def apply(self, *args: Any, **options: Any) -> Tensor:
        result = self.norm(super().apply(*args, **options))
        # Of skipped slots, which hold zeros, a norm may make something.
        topk_ids, expert_map = args[3], options["expert_map"]
        ids = topk_ids.clamp(0, options["global_num_experts"] - 1)
        is_computed = ids == topk_ids
        if expert_map is not None:
            is_computed = is_computed & (expert_map[ids] >= 0)
        return torch.where(is_computed.unsqueeze(-1), result, 0)
