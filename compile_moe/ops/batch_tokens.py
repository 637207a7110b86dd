"""Tokens into the batched format: a block of max_num_tokens rows for each expert, filled from its start.

Args:
    tokens: (M, C): hidden states in any floating-point dtype, float8_e4m3fn or int8, or their scales; any strides.
    sorted_slots, expert_offsets: from ``sort_tokens``.
    topk: slots of a token; slot s is of token s // topk.
    max_num_tokens: rows of an expert in the batch. An expert's first slots, in slot order, get them; slots for which
        there are none left are dropped.

Returns:
    batch (E, max_num_tokens, C) in tokens' dtype. Rows behind an expert's tokens are never written.
    batch_rows (M, topk) int32: where each slot's token is, as a row of the flattened batch (E * max_num_tokens, C); -1
        for slots that are skipped or dropped.
    expert_num_tokens (E,) int32: rows of each expert that hold tokens.
    num_dropped (E,) int32: slots of each expert that found no room.

Nothing synchronizes with the host, and equal inputs give equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.kernels import batch_tokens as kernels
from compile_moe.ops.problem_size import (
    CPU_DTYPES,
    CUDA_DTYPES,
    check_batch_size,
    check_order,
    require,
    require_type,
    shape,
)
from compile_moe.ops.registry import OutputSpec, define_op

_QUANTIZED = (torch.float8_e4m3fn, torch.int8)


def _check(
    tokens: Tensor, sorted_slots: Tensor, expert_offsets: Tensor, topk: int, max_num_tokens: int
) -> None:
    require(tokens.dim() == 2, lambda: f"tokens must be (M, C), got {shape(tokens)}")
    accepted = (*(CUDA_DTYPES if tokens.is_cuda else CPU_DTYPES), *_QUANTIZED)
    require_type(
        tokens.dtype in accepted,
        lambda: f"tokens must be one of {', '.join(map(str, accepted))}, got {tokens.dtype}",
    )
    num_experts = expert_offsets.numel() - 1
    require(
        num_experts >= 1,
        lambda: f"expert_offsets must be (E + 1,) with at least one expert, got {shape(expert_offsets)}",
    )
    check_order(sorted_slots, expert_offsets, tokens.size(0), topk, num_experts, "tokens", tokens)
    check_batch_size(num_experts, max_num_tokens)


def _outputs(
    tokens: Tensor, sorted_slots: Tensor, expert_offsets: Tensor, topk: int, max_num_tokens: int
) -> tuple[OutputSpec, ...]:
    num_experts = expert_offsets.size(0) - 1
    return (
        ((num_experts, max_num_tokens, tokens.size(1)), tokens.dtype),
        ((tokens.size(0), topk), torch.int32),
        ((num_experts,), torch.int32),
        ((num_experts,), torch.int32),
    )


def _torch(
    tokens: Tensor, sorted_slots: Tensor, expert_offsets: Tensor, topk: int, max_num_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows behind an expert's tokens are zeros."""
    m, num_columns = tokens.shape
    offsets, slots = expert_offsets.long(), sorted_slots.long()
    wanted = offsets.diff()
    kept = wanted.clamp(max=max_num_tokens)
    row = torch.arange(m * topk, device=tokens.device)
    expert = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
    position = row - offsets[expert]
    is_placed = (expert < len(wanted)) & (position < max_num_tokens)
    batch_row = torch.where(is_placed, expert * max_num_tokens + position, -1)
    batch_rows = torch.empty_like(batch_row).index_copy(0, slots, batch_row)
    elements = _raw(tokens)
    batch = elements.new_zeros((len(wanted) * max_num_tokens, num_columns))
    batch[batch_row[is_placed]] = elements[slots[is_placed] // topk]
    return (
        batch.view(tokens.dtype).view(-1, max_num_tokens, num_columns),
        batch_rows.view(m, topk).to(torch.int32),
        kept.to(torch.int32),
        (wanted - kept).to(torch.int32),
    )


def _raw(tokens: Tensor) -> Tensor:
    """What can be moved everywhere: float8 can't."""
    return tokens.view(torch.uint8) if tokens.element_size() == 1 else tokens


def _launch(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    tokens: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    max_num_tokens: int,
) -> None:
    batch, *rest = outputs
    kernels.batch_tokens(_raw(batch), *rest, _raw(tokens), sorted_slots, expert_offsets)


batch_tokens = define_op(
    "batch_tokens",
    "Tensor tokens, Tensor sorted_slots, Tensor expert_offsets, SymInt topk, SymInt max_num_tokens",
    ("batch", "batch_rows", "expert_num_tokens", "num_dropped"),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=_launch,
)
