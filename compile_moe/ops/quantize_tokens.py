"""Quantize tokens: before GEMM 1, and between the GEMMs.

Args:
    tokens: (M, K) floating point, any strides.
    scaling: text of a :class:`compile_moe.quantization.TokenScaling`, which has the formula.
    scale: static scales, (1,) or (M, 1) float32, per tensor only; None computes them.
    maxima: (any number,) float32, the largest of which is the largest magnitude of tokens, where somebody knows it
        already; per tensor without ``scale`` only. None finds it.
    expert_offsets: (E + 1,) int32, where tokens are rows in expert order: rows behind the last expert's are neither
        read nor written. None: all count. Not with maxima.

Returns:
    quantized (M, K) in scaling's dtype and scales float32, both contiguous and fresh: (1,) per tensor (or the shape of
    ``scale``), (M, 1) per token, (M, ceil(K / group)) per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.float8_support import no_float8
from compile_moe.ops.kernels.quantize_per_tensor import quantize_per_tensor
from compile_moe.ops.kernels.quantize_tokens import quantize_tokens as quantize_per_share
from compile_moe.ops.problem_size import (
    check_device,
    check_float_dtype,
    check_in_one_piece,
    require,
    require_type,
    shape,
)
from compile_moe.ops.quantized_operands import check_token_scale
from compile_moe.ops.registry import OutputSpec, define_op
from compile_moe.quantization import parse_scaling
from compile_moe.quantization.rounding import LARGEST


def _check(
    tokens: Tensor,
    scaling: str,
    scale: Tensor | None = None,
    maxima: Tensor | None = None,
    expert_offsets: Tensor | None = None,
) -> None:
    parsed = parse_scaling(scaling)
    check_float_dtype("tokens", tokens)
    require(tokens.dim() == 2, lambda: f"tokens must be (M, K), got {shape(tokens)}")
    if scale is not None:
        require(
            parsed.per == "tensor",
            lambda: f"scales {scaling} are computed from the tokens: scale must be None, got {shape(scale)}",
        )
        check_token_scale("scale", scale, parsed, tokens)
    if maxima is not None:
        require(
            parsed.per == "tensor" and scale is None,
            lambda: (
                f"maxima are for the one scale of all tokens: with scaling {scaling}"
                f"{'' if scale is None else ' and a given scale'} they must be None, got {shape(maxima)}"
            ),
        )
        require_type(maxima.dtype is torch.float32, lambda: f"maxima must be float32, got {maxima.dtype}")
        require(maxima.dim() == 1, lambda: f"maxima must have one dimension, got {shape(maxima)}")
        check_device("tokens", tokens, maxima=maxima)
    if expert_offsets is not None:
        if maxima is not None:
            raise ValueError(
                "with expert_offsets not all rows count: maxima must be None, for the op to find those of the others, "
                f"got {shape(maxima)}"
            )
        require(
            expert_offsets.dim() == 1 and expert_offsets.size(0) >= 1,
            lambda: f"expert_offsets must be (E + 1,), got {shape(expert_offsets)}",
        )
        require_type(
            expert_offsets.dtype is torch.int32,
            lambda: f"expert_offsets must be int32, got {expert_offsets.dtype}",
        )
        check_device("tokens", tokens, expert_offsets=expert_offsets)
        check_in_one_piece(expert_offsets=expert_offsets)


def _outputs(
    tokens: Tensor,
    scaling: str,
    scale: Tensor | None = None,
    maxima: Tensor | None = None,
    expert_offsets: Tensor | None = None,
) -> tuple[OutputSpec, ...]:
    parsed = parse_scaling(scaling)
    m, k = tokens.shape
    scale_shape = parsed.scale_shape(m, k) if scale is None else tuple(scale.shape)
    return ((m, k), parsed.dtype), (scale_shape, torch.float32)


def _torch(
    tokens: Tensor,
    scaling: str,
    scale: Tensor | None = None,
    maxima: Tensor | None = None,
    expert_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    parsed = parse_scaling(scaling)
    if expert_offsets is not None:
        # Zeros behind the last expert's rows; their scales, where given, are copied.
        is_row = torch.arange(tokens.size(0), device=tokens.device) < expert_offsets[-1]
        tokens = torch.where(is_row.unsqueeze(1), tokens, 0)
    if maxima is not None:
        scale = parsed.scale_of_all(maxima)
    quantized, scales = parsed.quantize(tokens, scale)
    # Functional: a given scale is copied, never returned.
    return quantized.contiguous(), scales.clone(memory_format=torch.contiguous_format)


def _launch(
    outputs: tuple[Tensor, Tensor],
    tokens: Tensor,
    scaling: str,
    scale: Tensor | None = None,
    maxima: Tensor | None = None,
    expert_offsets: Tensor | None = None,
) -> None:
    parsed = parse_scaling(scaling)
    if reason := no_float8(parsed.dtype, tokens.device):
        raise NotImplementedError(f"compile_moe::quantize_tokens: {reason}")
    largest = LARGEST[parsed.dtype]
    if parsed.per == "tensor":
        quantize_per_tensor(*outputs, tokens, scale, maxima, expert_offsets, largest)
    else:
        width = parsed.group_size if parsed.per == "group" else tokens.size(1)
        quantize_per_share(*outputs, tokens, expert_offsets, width, largest)


quantize_tokens = define_op(
    "quantize_tokens",
    "Tensor tokens, str scaling, Tensor? scale=None, Tensor? maxima=None, Tensor? expert_offsets=None",
    ("quantized", "scales"),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=_launch,
)
