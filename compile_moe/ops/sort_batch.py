"""Expert order of a batch: what ``sort_tokens`` is for tokens, so that the same GEMMs run on both.

Slot e * max_num_tokens + i is row i of expert e in a batch (E, max_num_tokens, K). Rows behind an expert's tokens are
its skipped slots: the GEMMs have no tile for them.

Args:
    expert_num_tokens: (E,) int32 or int64, rows of each expert that hold tokens, from the first on. More than
        max_num_tokens count as that, fewer than none as none.
    max_num_tokens: rows of an expert in the batch.

Returns:
    sorted_slots (E * max_num_tokens,) int32: slots with tokens ordered by (expert, row); the others come last, in slot
        order.
    expert_offsets (E + 1,) int32: expert e owns sorted_slots[expert_offsets[e]:expert_offsets[e + 1]].

Nothing synchronizes with the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.kernels import sort_batch as kernels
from compile_moe.ops.problem_size import ID_DTYPES, check_batch_size, require, require_type, shape
from compile_moe.ops.registry import OutputSpec, define_op


def _check(expert_num_tokens: Tensor, max_num_tokens: int) -> None:
    require(
        expert_num_tokens.dim() == 1 and expert_num_tokens.size(0) >= 1,
        lambda: f"expert_num_tokens must be (E,) with at least one expert, got {shape(expert_num_tokens)}",
    )
    require_type(
        expert_num_tokens.dtype in ID_DTYPES,
        lambda: f"expert_num_tokens must be int32 or int64, got {expert_num_tokens.dtype}",
    )
    check_batch_size(expert_num_tokens.size(0), max_num_tokens)


def _outputs(expert_num_tokens: Tensor, max_num_tokens: int) -> tuple[OutputSpec, ...]:
    num_experts = expert_num_tokens.size(0)
    return ((num_experts * max_num_tokens,), torch.int32), ((num_experts + 1,), torch.int32)


def sort_batch_torch(expert_num_tokens: Tensor, max_num_tokens: int) -> tuple[Tensor, Tensor]:
    """The result in plain PyTorch: any device, traceable, no data-dependent shapes."""
    counts = expert_num_tokens.clamp(0, max_num_tokens).long()
    row = torch.arange(max_num_tokens, device=counts.device)
    is_empty = row >= counts.unsqueeze(1)
    _, slots = torch.sort(is_empty.flatten().to(torch.uint8), stable=True)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return slots.to(torch.int32), offsets.to(torch.int32)


def _launch(outputs: tuple[Tensor, Tensor], expert_num_tokens: Tensor, max_num_tokens: int) -> None:
    kernels.sort_batch(*outputs, expert_num_tokens, max_num_tokens)


sort_batch = define_op(
    "sort_batch",
    "Tensor expert_num_tokens, SymInt max_num_tokens",
    ("sorted_slots", "expert_offsets"),
    check=_check,
    outputs=_outputs,
    torch_impl=sort_batch_torch,
    launch=_launch,
)
