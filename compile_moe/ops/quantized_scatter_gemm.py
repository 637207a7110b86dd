"""GEMM 2 with quantized operands: multiply rows in expert order by their expert's w2, store them by slot.

Args:
    intermediate: (S, I), rows in expert order: in the dtype of scheme's tokens, or of ``out_dtype`` where the scheme
        leaves them alone.
    intermediate_scale: scales of intermediate, as ``quantize_tokens`` returns them; or None.
    w2, w2_scale, w2_zp: (E, K, I) in the scheme's layout; I is that of intermediate.
    sorted_slots, expert_offsets: from ``sort_tokens``.
    num_tokens, topk: M and topk.
    scheme: text of a :class:`compile_moe.quantization.Scheme`.
    out_dtype: dtype of bias and result.
    bias: (E, K) or None.
    zero_skipped: store zeros in skipped slots instead of leaving them unwritten.

Returns:
    (M, topk, K) in out_dtype, in slot order, contiguous, accumulated in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.kernels.quantized import scatter_gemm as kernels
from compile_moe.ops.problem_size import check_device, check_sorted, require, shape
from compile_moe.ops.quantized_format import check_capability, weight_format
from compile_moe.ops.quantized_grouped_linear import quantized_grouped_linear_torch
from compile_moe.ops.quantized_operands import (
    check_compute_dtype,
    check_output_bias,
    check_quantized_weight,
    check_tokens,
)
from compile_moe.ops.registry import OutputSpec, define_op
from compile_moe.quantization import parse_scheme


def _check(
    intermediate: Tensor,
    intermediate_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor,
    w2_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    topk: int,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    zero_skipped: bool = False,
) -> None:
    parsed = parse_scheme(scheme)
    check_compute_dtype(out_dtype, intermediate)
    check_tokens("intermediate", "intermediate_scale", intermediate, intermediate_scale, parsed, out_dtype)
    check_quantized_weight("w2", "E, K, I", w2, w2_scale, w2_zp, intermediate.size(1), parsed, out_dtype)
    check_device("intermediate", intermediate, w2=w2)
    check_sorted(sorted_slots, expert_offsets, num_tokens, topk, w2)
    require(
        intermediate.size(0) == sorted_slots.size(0),
        lambda: f"intermediate must have a row a slot, {sorted_slots.size(0)}, got {shape(intermediate)}",
    )
    check_output_bias("w2_bias", bias, "(E, K)", w2, out_dtype)


def _outputs(
    intermediate: Tensor,
    intermediate_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor,
    w2_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    topk: int,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    zero_skipped: bool = False,
) -> tuple[OutputSpec, ...]:
    return (((num_tokens, topk, w2.size(1)), out_dtype),)


def _torch(
    intermediate: Tensor,
    intermediate_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor,
    w2_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    topk: int,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    zero_skipped: bool = False,
) -> Tensor:
    rows = quantized_grouped_linear_torch(
        intermediate, intermediate_scale, w2, w2_scale, w2_zp, expert_offsets, scheme, out_dtype, bias
    ).to(out_dtype)
    out = torch.empty_like(rows)
    out[sorted_slots.long()] = rows
    return out.view(num_tokens, topk, w2.size(1))


def _launch(
    outputs: tuple[Tensor],
    intermediate: Tensor,
    intermediate_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor,
    w2_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    topk: int,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    zero_skipped: bool = False,
) -> None:
    check_capability("quantized_scatter_gemm", w2, scheme)
    kernels.quantized_scatter_gemm(
        outputs[0].view(-1, w2.size(1)),
        intermediate,
        intermediate_scale,
        w2,
        w2_scale,
        w2_zp,
        sorted_slots,
        expert_offsets,
        weight_format(scheme),
        bias,
        zero_skipped,
    )


quantized_scatter_gemm = define_op(
    "quantized_scatter_gemm",
    "Tensor intermediate, Tensor? intermediate_scale, Tensor w2, Tensor w2_scale, Tensor? w2_zp, "
    "Tensor sorted_slots, Tensor expert_offsets, SymInt num_tokens, SymInt topk, str scheme, ScalarType out_dtype, "
    "Tensor? bias=None, bool zero_skipped=False",
    ("out",),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=_launch,
)
