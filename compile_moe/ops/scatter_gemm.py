"""GEMM 2: multiply rows in expert order by their expert's w2 and store each at its slot.

Args:
    intermediate: (S, I) rows in expert order, from ``gather_gemm``.
    w2: (E, K, I) of intermediate's dtype, any strides.
    sorted_slots, expert_offsets: from ``sort_tokens``.
    num_tokens, topk: M and topk; S = M * topk.
    bias: (E, K) or None.
    zero_skipped: fill skipped slots with zeros instead of leaving them unwritten.

Returns:
    (M, topk, K) in slot order, contiguous: the unweighted, unreduced expert outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.grouped_linear import grouped_linear_torch
from compile_moe.ops.kernels import scatter_gemm as kernels
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
    intermediate: Tensor,
    w2: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    topk: int,
    bias: Tensor | None = None,
    zero_skipped: bool = False,
) -> None:
    check_float_dtype("intermediate", intermediate)
    check_same("intermediate", intermediate, w2=w2, w2_bias=bias)
    check_weight("w2", "(E, K, I)", w2)
    require(
        intermediate.dim() == 2 and intermediate.size(1) == w2.size(2),
        lambda: (
            f"intermediate must be (S, I) with the I of w2 (E, K, I) = {shape(w2)}, got {shape(intermediate)}"
        ),
    )
    check_sorted(sorted_slots, expert_offsets, num_tokens, topk, w2)
    require(
        intermediate.size(0) == sorted_slots.size(0),
        lambda: f"intermediate must have a row a slot, {sorted_slots.size(0)}, got {shape(intermediate)}",
    )
    check_bias("w2_bias", bias, "(E, K)", w2)


def _outputs(
    intermediate: Tensor,
    w2: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    topk: int,
    bias: Tensor | None = None,
    zero_skipped: bool = False,
) -> tuple[OutputSpec, ...]:
    return (((num_tokens, topk, w2.size(1)), intermediate.dtype),)


def _torch(
    intermediate: Tensor,
    w2: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    topk: int,
    bias: Tensor | None = None,
    zero_skipped: bool = False,
) -> Tensor:
    rows = grouped_linear_torch(intermediate, w2, expert_offsets, bias)
    out = torch.empty_like(rows)
    out[sorted_slots.long()] = rows
    return out.view(num_tokens, topk, w2.size(1))


def _launch(
    outputs: tuple[Tensor],
    intermediate: Tensor,
    w2: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    topk: int,
    bias: Tensor | None = None,
    zero_skipped: bool = False,
) -> None:
    kernels.scatter_gemm(
        outputs[0].view(-1, w2.size(1)), intermediate, w2, sorted_slots, expert_offsets, bias, zero_skipped
    )


scatter_gemm = define_op(
    "scatter_gemm",
    "Tensor intermediate, Tensor w2, Tensor sorted_slots, Tensor expert_offsets, SymInt num_tokens, SymInt topk, "
    "Tensor? bias=None, bool zero_skipped=False",
    ("out",),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=_launch,
    autocast=True,
)
