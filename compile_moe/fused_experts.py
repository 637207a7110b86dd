"""The layer as one function."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from compile_moe.activations import Activation, ActivationLike, resolve_activation
from compile_moe.dtensor_weights import local_tensors
from compile_moe.experts import TritonExperts
from compile_moe.modular_kernel import FusedMoEModularKernel
from compile_moe.ops.fused_moe import fused_moe, fused_moe_, fused_moe_of_stages
from compile_moe.ops.problem_size import (
    require,
    require_int,
    require_optional_tensors,
    require_tensors,
    shape,
)
from compile_moe.ops.registry import remembering, runs_directly
from compile_moe.prepare_finalize import MoEPrepareAndFinalizeNoEP
from compile_moe.quant_config import FusedMoEQuantConfig, require_quant_config
from compile_moe.quantized_layer import quantized_fused_moe


def fused_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: ActivationLike = "silu",
    inplace: bool = False,
    global_num_experts: int = -1,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    quant_config: FusedMoEQuantConfig | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> Tensor:
    """Mixture-of-experts layer: route tokens to experts, run both GEMMs, weight and sum.

    Args:
        hidden_states: (M, K), bf16, fp16 or fp32 (on CPU also float64).
        w1: (E, N, K), N = 2I where the activation is gated, else I; gate rows first, then up rows, unless the
            activation says interleaved, as "swigluoai" does by its name. w2: (E, K, I). Any strides: transposed storage
            goes in as a view. They and the biases may be replicated DTensors.
        topk_weights: (M, topk), floating point, applied in float32.
        topk_ids: (M, topk), int32 or int64. Negative ids, ids that expert_map sends to -1, and the id that equals
            the number of experts skip their slot.
        activation: a name ("silu", "gelu", "gelu_tanh", "relu2", "swigluoai", or an ungated "..._no_mul"), a
            :class:`compile_moe.Activation`, or a callable gate_up (..., N) -> (..., I) in PyTorch.
        inplace: write the result into hidden_states and return it.
        global_num_experts: size of the id space; -1 for E, or for the length of expert_map.
        expert_map: (global_num_experts,) int32 or int64, global to local ids, -1 where not local.
        apply_router_weight_on_input: weight the input instead of the outputs; topk must be 1.
        quant_config: a :class:`compile_moe.FusedMoEQuantConfig` with the scales of w1 and w2, which then have the
            scheme's layouts. None for an unquantized layer.
        w1_bias: (E, N), w2_bias: (E, K), or None.

    Returns:
        (M, K) in hidden_states' dtype (under autocast in the autocast dtype, as torch's GEMMs, unless inplace).

    Raises:
        ValueError, TypeError: arguments that don't fit together; the message says what is accepted.
        NotImplementedError: backward through the layer (this version runs the forward only).
        RuntimeError: inplace, and hidden_states is a leaf that requires grad.

    Example:
        >>> import compile_moe, torch
        >>> M, E, topk, K, I = 5, 4, 2, 16, 32
        >>> x, w1, w2 = torch.randn(M, K), torch.randn(E, 2 * I, K), torch.randn(E, K, I)
        >>> topk_weights, topk_ids = torch.randn(M, E).softmax(-1).topk(topk)
        >>> compile_moe.fused_experts(x, w1, w2, topk_weights, topk_ids).shape
        torch.Size([5, 16])
    """
    arguments = (
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        global_num_experts,
        expert_map,
        apply_router_weight_on_input,
        w1_bias,
        w2_bias,
    )
    tensors = hidden_states, w1, w2, topk_weights, topk_ids, expert_map, w1_bias, w2_bias
    if (
        not torch.compiler.is_compiling()
        and not inplace
        and quant_config is None
        and isinstance(hidden_states, Tensor)
        and isinstance(activation, (str, Activation))
        and type(global_num_experts) is int
        and type(apply_router_weight_on_input) is bool
        and runs_directly(*tensors)
    ):
        result: Tensor = _layer_remembered(*arguments)
        return result
    require_quant_config(quant_config)
    return _layer(*arguments, inplace=inplace, quant_config=quant_config)


def _layer(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: ActivationLike,
    global_num_experts: int,
    expert_map: Tensor | None,
    apply_router_weight_on_input: bool,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    inplace: bool = False,
    quant_config: FusedMoEQuantConfig | None = None,
    run: Callable[..., Tensor] = fused_moe,
) -> Tensor:
    require_tensors(hidden_states=hidden_states, w1=w1, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids)
    require_optional_tensors(expert_map=expert_map, w1_bias=w1_bias, w2_bias=w2_bias)
    require_int("global_num_experts", global_num_experts)
    w1, w2, w1_bias, w2_bias = local_tensors(
        None, ("w1", w1), ("w2", w2), ("w1_bias", w1_bias), ("w2_bias", w2_bias)
    )
    require(w1.dim() == 3, lambda: f"w1 must be (E, N, K), got {shape(w1)}")
    resolved = resolve_activation(activation, w1.size(1), hidden_states)
    layer = hidden_states, w1, w2, topk_weights, topk_ids
    options = global_num_experts, expert_map, apply_router_weight_on_input, w1_bias, w2_bias
    is_named = isinstance(activation, str)
    if quant_config is not None and is_named and not inplace and torch.compiler.is_compiling():
        c = quant_config
        scales = c.w1_scale, c.w2_scale, c.w1_zp, c.w2_zp, c.a1_scale, c.a2_scale
        compiled: Tensor = quantized_fused_moe(*layer, c.facts.text, *scales, activation, *options)
        return compiled
    if resolved.function is not None or quant_config is not None:
        kernel = FusedMoEModularKernel(
            MoEPrepareAndFinalizeNoEP(quant_config), TritonExperts(w1_bias, w2_bias, quant_config)
        )
        return kernel(
            *layer,
            inplace=inplace,
            activation=activation,
            global_num_experts=global_num_experts,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
        )
    arguments = *layer, activation if is_named else resolved.epilogue, *options
    if inplace:
        fused_moe_(*arguments)
        return hidden_states
    return run(*arguments)


# The op's parts, not the op: a call that is recorded shows all that it does.
_layer_remembered = remembering(functools.partial(_layer, run=fused_moe_of_stages))
