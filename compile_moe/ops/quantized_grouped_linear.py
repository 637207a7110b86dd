"""Per-expert linear layers with quantized operands over rows in expert order, in plain PyTorch.

Weights are dequantized one expert at a time, into float32. The op form exists for ``TorchExperts``, as that of
``grouped_linear``.

Args:
    rows: (S, K): in the dtype of scheme's tokens, or of ``out_dtype`` where the scheme leaves them alone.
    rows_scale: scales of rows, as ``quantize_tokens`` returns them; or None.
    w, w_scale, w_zp: (E, N, K) in the scheme's layout.
    expert_offsets: (E + 1,) int32, from ``sort_tokens``.
    scheme: text of a :class:`compile_moe.quantization.Scheme`.
    out_dtype: dtype of bias and result.
    bias: (E, N) or None.

Returns:
    (S, N) in out_dtype, accumulated in float32; rows past the last offset are zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.problem_size import check_device, require, require_type, shape
from compile_moe.ops.quantized_operands import (
    check_compute_dtype,
    check_output_bias,
    check_quantized_weight,
    check_tokens,
)
from compile_moe.ops.registry import OutputSpec, define_op
from compile_moe.quantization import parse_scheme


def quantized_grouped_linear_torch(
    rows: Tensor,
    rows_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_zp: Tensor | None,
    expert_offsets: Tensor,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """The result before it is rounded: in float32, or float64 for float64."""
    parsed = parse_scheme(scheme)
    dtype = torch.float64 if out_dtype is torch.float64 else torch.float32
    out = rows.new_zeros((rows.size(0), w.size(1)), dtype=dtype)
    if parsed.token_scaling is not None and rows_scale is not None:
        rows_scale = parsed.token_scaling.expand(rows_scale, rows.size(1)).to(dtype)
        rows_scale = rows_scale.expand(rows.size(0), -1)
    offsets = expert_offsets.tolist()
    for e in range(w.size(0)):
        first, last = offsets[e], offsets[e + 1]
        if first == last:
            continue
        x = rows[first:last].to(dtype)
        if rows_scale is not None:
            x = x * rows_scale[first:last]
        matrix = parsed.dequantize(w[e], w_scale[e], None if w_zp is None else w_zp[e], dtype)
        with torch.autocast(rows.device.type, enabled=False):
            y = x @ matrix.t()
        out[first:last] = y if bias is None else y + bias[e].to(dtype)
    return out


def _check(
    rows: Tensor,
    rows_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_zp: Tensor | None,
    expert_offsets: Tensor,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> None:
    parsed = parse_scheme(scheme)
    check_compute_dtype(out_dtype, rows)
    check_tokens("rows", "rows_scale", rows, rows_scale, parsed, out_dtype)
    check_quantized_weight("w", "E, N, K", w, w_scale, w_zp, rows.size(1), parsed, out_dtype)
    require(
        expert_offsets.dim() == 1 and expert_offsets.size(0) == w.size(0) + 1,
        lambda: f"expert_offsets must be (E + 1,) = ({w.size(0) + 1},), got {shape(expert_offsets)}",
    )
    require_type(
        expert_offsets.dtype is torch.int32,
        lambda: f"expert_offsets must be int32, got {expert_offsets.dtype}",
    )
    check_device("rows", rows, w=w, expert_offsets=expert_offsets)
    check_output_bias("bias", bias, "(E, N)", w, out_dtype)


def _outputs(
    rows: Tensor,
    rows_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_zp: Tensor | None,
    expert_offsets: Tensor,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> tuple[OutputSpec, ...]:
    return (((rows.size(0), w.size(1)), out_dtype),)


def _torch(
    rows: Tensor,
    rows_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_zp: Tensor | None,
    expert_offsets: Tensor,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    return quantized_grouped_linear_torch(
        rows, rows_scale, w, w_scale, w_zp, expert_offsets, scheme, out_dtype, bias
    ).to(out_dtype)


def _launch(
    outputs: tuple[Tensor],
    rows: Tensor,
    rows_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_zp: Tensor | None,
    expert_offsets: Tensor,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> None:
    outputs[0].copy_(
        quantized_grouped_linear_torch(
            rows, rows_scale, w, w_scale, w_zp, expert_offsets, scheme, out_dtype, bias
        )
    )


quantized_grouped_linear = define_op(
    "quantized_grouped_linear",
    "Tensor rows, Tensor? rows_scale, Tensor w, Tensor w_scale, Tensor? w_zp, Tensor expert_offsets, str scheme, "
    "ScalarType out_dtype, Tensor? bias=None",
    ("out",),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=_launch,
)
