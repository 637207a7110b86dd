"""Quantize tokens: before GEMM 1, and between the GEMMs.

Args:
    tokens: (M, K) floating point, any strides.
    scaling: text of a :class:`compile_moe.quantization.TokenScaling`, which has the formula.
    scale: static scales, (1,) or (M, 1) float32, per tensor only; None computes them.

Returns:
    quantized (M, K) in scaling's dtype and scales float32, both contiguous and fresh: (1,) per tensor (or the shape of
    ``scale``), (M, 1) per token, (M, ceil(K / group)) per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.problem_size import check_float_dtype, require, shape
from compile_moe.ops.quantized_operands import check_token_scale, no_cuda_kernel
from compile_moe.ops.registry import OutputSpec, define_op
from compile_moe.quantization import parse_scaling


def _check(tokens: Tensor, scaling: str, scale: Tensor | None = None) -> None:
    parsed = parse_scaling(scaling)
    check_float_dtype("tokens", tokens)
    require(tokens.dim() == 2, lambda: f"tokens must be (M, K), got {shape(tokens)}")
    if scale is not None:
        require(
            parsed.per == "tensor",
            lambda: f"scales {scaling} are computed from the tokens: scale must be None, got {shape(scale)}",
        )
        check_token_scale("scale", scale, parsed, tokens)


def _outputs(tokens: Tensor, scaling: str, scale: Tensor | None = None) -> tuple[OutputSpec, ...]:
    parsed = parse_scaling(scaling)
    m, k = tokens.shape
    scale_shape = parsed.scale_shape(m, k) if scale is None else tuple(scale.shape)
    return ((m, k), parsed.dtype), (scale_shape, torch.float32)


def _torch(tokens: Tensor, scaling: str, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    quantized, scales = parse_scaling(scaling).quantize(tokens, scale)
    # Functional: a given scale is copied, never returned.
    return quantized.contiguous(), scales.clone(memory_format=torch.contiguous_format)


quantize_tokens = define_op(
    "quantize_tokens",
    "Tensor tokens, str scaling, Tensor? scale=None",
    ("quantized", "scales"),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=no_cuda_kernel("quantize_tokens"),
)
