"""A quantized layer as one op, which expands into its stages when compiled: dynamo, which would go through thousands of
instructions of the modular kernel's Python for each layer, sees a call.

Args:
    hidden_states: (M, K), before quantization. w1, w2, scales, zero points: in the scheme's layouts.
    scheme: text of a scheme with its sizes, as of the quantized GEMMs. activation: name of an activation.
    The others as of :func:`compile_moe.fused_experts`.

Returns:
    (M, K) in hidden_states' dtype (in the autocast dtype under autocast).
"""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor

from compile_moe.experts import TritonExperts
from compile_moe.modular_kernel import FusedMoEModularKernel
from compile_moe.ops.registry import define_composite
from compile_moe.prepare_finalize import MoEPrepareAndFinalizeNoEP
from compile_moe.quant_config import FusedMoEQuantConfig
from compile_moe.quantization import parse_scheme


def _quantized_layer(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    scheme: str,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    w1_zp: Tensor | None = None,
    w2_zp: Tensor | None = None,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    activation: str = "silu",
    global_num_experts: int = -1,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> Tensor:
    made = parse_scheme(scheme)
    sizes = {field.name: getattr(made, field.name) for field in fields(made)}
    config = FusedMoEQuantConfig(
        made.name,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        w1_zp=w1_zp,
        w2_zp=w2_zp,
        a1_scale=a1_scale,
        a2_scale=a2_scale,
        **sizes,
    )
    kernel = FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(config), TritonExperts(w1_bias, w2_bias, config))
    result: Tensor = kernel(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation=activation,
        global_num_experts=global_num_experts,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )
    return result


quantized_fused_moe = define_composite(
    "quantized_fused_moe",
    "Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids, str scheme, "
    "Tensor? w1_scale=None, Tensor? w2_scale=None, "
    "Tensor? w1_zp=None, Tensor? w2_zp=None, Tensor? a1_scale=None, Tensor? a2_scale=None, "
    'str activation="silu", SymInt global_num_experts=-1, Tensor? expert_map=None, '
    "bool apply_router_weight_on_input=False, Tensor? w1_bias=None, Tensor? w2_bias=None",
    "Tensor",
    _quantized_layer,
)
