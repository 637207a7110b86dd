"""Experts that transformers quantizes to FP8 (its ``FP8Experts``): their weights and scales as a scheme's.

| Module | Scheme | Tokens |
|---|---|---|
| float8_e4m3fn, block_size (bn, bk) | fp8_w8a8_block | a scale each bk columns |
| float8_e4m3fn, no block_size: scales (E, 1, 1), or (E, 2, 1) of gate and up | fp8_w8a8_channel | a scale each |
| the same with scales (E, 1, 1), activation_scheme "static" | fp8_w8a8_tensor | the checkpoint's scales |
| int8, two e2m1 numbers a byte (DeepSeek-V4): scales (E, N, K / 32) e8m0 | mxfp4_w4a16 | as they are |

Elsewhere a checkpoint's scales for tokens are not read, since no scheme has them: a scale for each token loses less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compile_moe.integrations.experts_module import Operands, projections, run_experts
from compile_moe.quant_config import FusedMoEQuantConfig

_ADVICE = (
    "load the model with FineGrainedFP8Config(dequantize=True), or choose another experts_implementation "
    "('grouped_mm', 'eager')"
)


def fp8_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Forward of an ``FP8Experts`` module; transformers calls it in place of the module's own.

    Args:
        self: the module. Attributes read: has_gate, has_bias, block_size, activation_scheme, gate_up_proj or up_proj,
            down_proj, their ``_scale_inv`` (which multiply the weights) and, if static, ``_activation_scale``, and
            the activation ``_apply_gate`` or ``act_fn``.
        hidden_states: (M, K), floating point.
        top_k_index: (M, topk), int32 or int64. The id num_experts skips its slot.
        top_k_weights: (M, topk), floating point.

    Returns:
        (M, K) in hidden_states' dtype.

    Raises:
        TypeError: weights or scales of other dtypes.
        ValueError: shapes that don't fit together.
    """
    return run_experts(self, fp8_operands(self, hidden_states), hidden_states, top_k_index, top_k_weights)


def is_fp8(module: Any) -> bool:
    """Whether a module is an ``FP8Experts``."""
    return hasattr(module, f"{projections(module)[1]}_scale_inv")


def fp8_operands(module: Any, hidden_states: Tensor) -> Operands:
    """A module's weights, with its scales in a config."""
    (w1, w1_scale), (w2, w2_scale) = (_weight_and_scale(module, name) for name in projections(module))
    if w1.dtype is not w2.dtype:
        raise TypeError(
            f"{type(module).__name__} holds {w1.dtype} and {w2.dtype} weights, which no scheme mixes; {_ADVICE}"
        )
    if w1.dtype is torch.int8:
        scheme: dict[str, Any] = {"scheme": "mxfp4_w4a16"}
        w1, w2 = w1.view(torch.uint8), w2.view(torch.uint8)
    elif module.block_size is not None:
        scheme = {"scheme": "fp8_w8a8_block", "block_shape": module.block_size}
    elif module.activation_scheme == "static" and w1_scale.numel() == w1.size(0):
        # The names are gate_up_proj's whether there is a gate or not.
        a1_scale, a2_scale = module.gate_up_proj_activation_scale, module.down_proj_activation_scale
        scheme = {"scheme": "fp8_w8a8_tensor", "a1_scale": a1_scale, "a2_scale": a2_scale}
        w1_scale, w2_scale = w1_scale.flatten(), w2_scale.flatten()
    else:
        scheme = {"scheme": "fp8_w8a8_channel"}
        w1_scale, w2_scale = _scale_per_row(w1_scale, w1.size(1)), _scale_per_row(w2_scale, w2.size(1))
    config = FusedMoEQuantConfig(**scheme, w1_scale=w1_scale, w2_scale=w2_scale)
    return Operands(w1, w2, config, hidden_states.dtype)


def _weight_and_scale(module: Any, name: str) -> tuple[Tensor, Tensor]:
    weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
    where = f"{type(module).__name__}.{name}"
    if weight.dtype not in (torch.float8_e4m3fn, torch.int8):
        raise TypeError(
            f"{where} must be float8_e4m3fn, or int8 of e2m1 pairs, got {weight.dtype}; where transformers left "
            "experts unquantized since its blocks don't divide them, name them in modules_to_not_convert; otherwise "
            f"{_ADVICE}"
        )
    is_pairs = weight.dtype is torch.int8
    if scale.dtype is torch.float8_e8m0fnu:
        # A power of two: exact in float32.
        return weight, scale.view(torch.uint8) if is_pairs else scale.float()
    if is_pairs or scale.dtype is not torch.float32:
        expected = "float8_e8m0fnu" if is_pairs else "float32 or float8_e8m0fnu"
        raise TypeError(
            f"{where}_scale_inv must be {expected} for {weight.dtype} weights, got {scale.dtype}; {_ADVICE}"
        )
    return weight, scale


def _scale_per_row(scale: Tensor, num_rows: int) -> Tensor:
    """(E, N, 1) from one scale an expert, (E, 1, 1), or one for gate and one for up, (E, 2, 1)."""
    if scale.dim() != 3 or scale.size(2) != 1 or scale.size(1) not in (1, 2) or num_rows % scale.size(1):
        raise ValueError(
            f"scales of experts without a block_size must be (E, 1, 1) or (E, 2, 1), got {tuple(scale.shape)}; "
            f"{_ADVICE}"
        )
    return scale.repeat_interleave(num_rows // scale.size(1), 1)
