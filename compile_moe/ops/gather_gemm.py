"""GEMM 1: gather each slot's token, multiply by its expert's w1, apply the activation.

Args:
    hidden_states: (M, K), any strides; never permuted in memory.
    w1: (E, N, K) of hidden_states' dtype, any strides (transposed storage included).
    sorted_slots, expert_offsets: from ``sort_tokens``.
    topk: slots a row of hidden_states serves; slot s reads row s // topk.
    bias: (E, N) or None, added before the activation.
    epilogue: program text, or "" for none.
    zero_skipped: fill the rows of skipped slots with zeros instead of leaving them unwritten.

Returns:
    (S, I), or (S, N) without an epilogue: rows in expert order, contiguous, accumulated in float32.
"""

from __future__ import annotations

from torch import Tensor

from compile_moe.ops.act_and_mul import check_columns
from compile_moe.ops.epilogue import parse
from compile_moe.ops.grouped_linear import grouped_linear_torch
from compile_moe.ops.kernels import gather_gemm as kernels
from compile_moe.ops.problem_size import (
    check_bias,
    check_float_dtype,
    check_same,
    check_sorted,
    check_weight,
    require,
    shape,
)
from compile_moe.ops.registry import OutputSpec, define_op


def _check(
    hidden_states: Tensor,
    w1: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    bias: Tensor | None = None,
    epilogue: str = "",
    zero_skipped: bool = False,
) -> None:
    check_float_dtype("hidden_states", hidden_states)
    check_same("hidden_states", hidden_states, w1=w1, w1_bias=bias)
    check_weight("w1", "(E, N, K)", w1)
    require(
        hidden_states.dim() == 2 and hidden_states.size(1) == w1.size(2),
        lambda: (
            f"hidden_states must be (M, K) with the K of w1 (E, N, K) = {shape(w1)}, got {shape(hidden_states)}"
        ),
    )
    check_sorted(sorted_slots, expert_offsets, hidden_states.size(0), topk, w1)
    check_columns("w1 (E, N, K)", w1.size(1), epilogue)
    check_bias("w1_bias", bias, "(E, N)", w1)


def _outputs(
    hidden_states: Tensor,
    w1: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    bias: Tensor | None = None,
    epilogue: str = "",
    zero_skipped: bool = False,
) -> tuple[OutputSpec, ...]:
    columns = parse(epilogue).columns_out(w1.size(1)) if epilogue else w1.size(1)
    return (((hidden_states.size(0) * topk, columns), hidden_states.dtype),)


def _torch(
    hidden_states: Tensor,
    w1: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    bias: Tensor | None = None,
    epilogue: str = "",
    zero_skipped: bool = False,
) -> Tensor:
    rows = hidden_states[sorted_slots.long() // topk]
    gate_up = grouped_linear_torch(rows, w1, expert_offsets, bias)
    if not epilogue:
        return gate_up
    out = parse(epilogue).evaluate(gate_up).contiguous()
    if zero_skipped:
        # An activation need not map zero to zero.
        out[int(expert_offsets[-1]) :] = 0
    return out


def _launch(
    outputs: tuple[Tensor],
    hidden_states: Tensor,
    w1: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    bias: Tensor | None = None,
    epilogue: str = "",
    zero_skipped: bool = False,
) -> None:
    program = parse(epilogue) if epilogue else None
    kernels.gather_gemm(
        outputs[0],
        hidden_states,
        w1,
        sorted_slots,
        expert_offsets,
        topk,
        bias,
        program.triton_source() if program else "",
        program.layout if program else "ungated",
        zero_skipped,
    )


gather_gemm = define_op(
    "gather_gemm",
    "Tensor hidden_states, Tensor w1, Tensor sorted_slots, Tensor expert_offsets, SymInt topk, "
    'Tensor? bias=None, str epilogue="", bool zero_skipped=False',
    ("out",),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=_launch,
    autocast=True,
)
