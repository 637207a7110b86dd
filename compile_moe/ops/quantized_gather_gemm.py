"""GEMM 1 with quantized operands: gather each slot's token, multiply by its expert's w1, apply the activation.

Args:
    hidden_states: (M, K): in the dtype of scheme's tokens, or of ``out_dtype`` where the scheme leaves them alone.
    hidden_states_scale: scales of hidden_states, as ``quantize_tokens`` returns them; or None.
    w1, w1_scale, w1_zp: (E, N, K) in the scheme's layout; K is that of hidden_states.
    sorted_slots, expert_offsets: from ``sort_tokens``.
    topk: slots a row of hidden_states serves; slot s reads row s // topk.
    scheme: text of a :class:`compile_moe.quantization.Scheme`.
    out_dtype: dtype of bias and result.
    bias: (E, N) or None, added before the activation.
    epilogue: program text, or "" for none.
    zero_skipped: fill the rows of skipped slots with zeros instead of leaving them unwritten.

Returns:
    (S, I), or (S, N) without an epilogue, in out_dtype: rows in expert order, contiguous, accumulated in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.act_and_mul import check_columns
from compile_moe.ops.epilogue import parse
from compile_moe.ops.kernels.quantized import gather_gemm as kernels
from compile_moe.ops.problem_size import check_device, check_sorted
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
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    w1: Tensor,
    w1_scale: Tensor,
    w1_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    epilogue: str = "",
    zero_skipped: bool = False,
) -> None:
    parsed = parse_scheme(scheme)
    check_compute_dtype(out_dtype, hidden_states)
    check_tokens("hidden_states", "a1q_scale", hidden_states, hidden_states_scale, parsed, out_dtype)
    check_quantized_weight("w1", "E, N, K", w1, w1_scale, w1_zp, hidden_states.size(1), parsed, out_dtype)
    check_device("hidden_states", hidden_states, w1=w1)
    check_sorted(sorted_slots, expert_offsets, hidden_states.size(0), topk, w1)
    check_columns("w1 (E, N, K)", w1.size(1), epilogue)
    check_output_bias("w1_bias", bias, "(E, N)", w1, out_dtype)


def _outputs(
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    w1: Tensor,
    w1_scale: Tensor,
    w1_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    epilogue: str = "",
    zero_skipped: bool = False,
) -> tuple[OutputSpec, ...]:
    columns = parse(epilogue).columns_out(w1.size(1)) if epilogue else w1.size(1)
    return (((hidden_states.size(0) * topk, columns), out_dtype),)


def _torch(
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    w1: Tensor,
    w1_scale: Tensor,
    w1_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    epilogue: str = "",
    zero_skipped: bool = False,
) -> Tensor:
    rows = sorted_slots.long() // topk
    rows_scale = hidden_states_scale
    if rows_scale is not None and rows_scale.dim() == 2:
        rows_scale = rows_scale[rows]
    out = quantized_grouped_linear_torch(
        hidden_states[rows], rows_scale, w1, w1_scale, w1_zp, expert_offsets, scheme, out_dtype, bias
    )
    if epilogue:
        out = parse(epilogue).evaluate(out)
        if zero_skipped:
            # An activation need not map zero to zero.
            out[int(expert_offsets[-1]) :] = 0
    return out.to(out_dtype).contiguous()


def _launch(
    outputs: tuple[Tensor],
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    w1: Tensor,
    w1_scale: Tensor,
    w1_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    epilogue: str = "",
    zero_skipped: bool = False,
) -> None:
    check_capability("quantized_gather_gemm", w1, scheme)
    program = parse(epilogue) if epilogue else None
    kernels.quantized_gather_gemm(
        outputs[0],
        hidden_states,
        hidden_states_scale,
        w1,
        w1_scale,
        w1_zp,
        sorted_slots,
        expert_offsets,
        topk,
        weight_format(scheme),
        bias,
        program.triton_source() if program else "",
        program.layout if program else "ungated",
        zero_skipped,
    )


quantized_gather_gemm = define_op(
    "quantized_gather_gemm",
    "Tensor hidden_states, Tensor? hidden_states_scale, Tensor w1, Tensor w1_scale, Tensor? w1_zp, "
    "Tensor sorted_slots, Tensor expert_offsets, SymInt topk, str scheme, ScalarType out_dtype, Tensor? bias=None, "
    'str epilogue="", bool zero_skipped=False',
    ("out",),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=_launch,
)
