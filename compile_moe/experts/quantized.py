"""The experts of a quantized layer: quantized GEMMs, with the tokens between them quantized anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compile_moe.activations import ActivationLike, call_activation, resolve_activation
from compile_moe.experts.ordered_rows import OrderedRows
from compile_moe.modular_parts import FusedMoEPermuteExpertsUnpermute
from compile_moe.ops.layer_checks import check_intermediate
from compile_moe.ops.quantize_tokens import quantize_tokens
from compile_moe.quant_config import SchemeFacts


class QuantizedLayer(NamedTuple):
    """Operands of both GEMMs; results are in ``out_dtype``."""

    facts: SchemeFacts
    out_dtype: torch.dtype
    hidden_states: Tensor
    a1q_scale: Tensor | None
    w1: Tensor
    w1_scale: Tensor
    w1_zp: Tensor | None
    w1_bias: Tensor | None
    w2: Tensor
    w2_scale: Tensor
    w2_zp: Tensor | None
    w2_bias: Tensor | None
    a2_scale: Tensor | None


class Stages(NamedTuple):
    """Both GEMMs, with the parameters of the ops."""

    gather: Callable[..., Tensor]
    scatter: Callable[..., Tensor]


def run_quantized(
    experts: FusedMoEPermuteExpertsUnpermute,
    stages: Stages,
    layer: QuantizedLayer,
    order: OrderedRows,
    activation: ActivationLike,
    zero_skipped: bool,
) -> Tensor:
    """Expert outputs (num_tokens, topk, K) in the activations' dtype."""
    facts, w1, w2, out_dtype = layer.facts, layer.w1, layer.w2, layer.out_dtype
    slots, offsets, m, topk, is_batch = order
    epilogue, function = "", None
    if not experts.overrides_activation:
        like = layer.hidden_states.new_empty((0,), dtype=out_dtype)
        epilogue, function, _ = resolve_activation(activation, w1.size(1), like)
        if function is None:
            check_intermediate(w1, w2, activation, not epilogue.startswith("ungated"), facts.packed)
    is_fused = epilogue != ""
    # A scale over all rows must not see what skipped slots hold, nor should the caller's code.
    shares_scale = facts.per_tensor and layer.a2_scale is None and not is_batch
    intermediate = stages.gather(
        layer.hidden_states,
        layer.a1q_scale,
        w1,
        layer.w1_scale,
        layer.w1_zp,
        slots,
        offsets,
        topk,
        facts.text,
        out_dtype,
        layer.w1_bias,
        epilogue,
        shares_scale or not is_fused,
    )
    if not is_fused:
        num_columns = w2.size(2) * facts.packed
        gate_up = intermediate
        if function is None:
            intermediate = gate_up.new_zeros((gate_up.size(0), num_columns))
            experts.activation(activation, intermediate, gate_up)
        else:
            intermediate = call_activation(function, gate_up, num_columns)
        if shares_scale:
            intermediate = without_skipped(intermediate, offsets)
    scale = None
    if facts.scaling:
        static = _row_scale(layer.a2_scale, offsets, intermediate.size(0))
        # Inductor fuses what looks at all rows; of a batch they are better left alone.
        bound = offsets if is_batch else None
        intermediate, scale = quantize_tokens(intermediate, facts.scaling, static, None, bound)
        if static is not None and static.dim() == 1:
            # Not copied, as the op has to.
            scale = static
    return stages.scatter(
        intermediate,
        scale,
        w2,
        layer.w2_scale,
        layer.w2_zp,
        slots,
        offsets,
        m,
        topk,
        facts.text,
        out_dtype,
        layer.w2_bias,
        zero_skipped,
    )


def without_skipped(rows: Tensor, offsets: Tensor) -> Tensor:
    """Rows in expert order, those of skipped slots zeros."""
    is_computed = torch.arange(rows.size(0), device=rows.device) < offsets[-1]
    return torch.where(is_computed.unsqueeze(1), rows, 0)


def _row_scale(scale: Tensor | None, offsets: Tensor, num_rows: int) -> Tensor | None:
    """A static scale for all rows as (1,), or those of the rows' experts as (S, 1)."""
    if scale is None:
        return None
    if scale.numel() == 1:
        return scale.reshape(1)
    rows = torch.arange(num_rows, device=scale.device, dtype=offsets.dtype)
    # Whole, as inductor searches only what is in memory. Rows of skipped slots are behind the last expert's.
    experts = torch.searchsorted(offsets, rows, right=True) - 1
    return scale[experts.clamp(max=scale.size(0) - 1)].unsqueeze(1)
