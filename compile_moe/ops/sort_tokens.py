"""Token sort: slots grouped by local expert.

Args:
    topk_ids: (M, topk) int32 or int64 expert ids. Skipped: negative ids, ids that expert_map sends to -1, and
        the id equal to the number of global experts. A larger id raises ValueError on CPU; on CUDA the slot is
        skipped, or with COMPILE_MOE_DEBUG=1 in the environment it raises too (which synchronizes).
    num_experts: E, local experts, at most 4096.
    expert_map: (global_num_experts,) int32 or int64, global to local ids, -1 where not local.

Returns:
    sorted_slots (S,) int32: slots ordered by (expert, slot); skipped slots come last, in slot order.
    expert_offsets (E + 1,) int32: expert e owns sorted_slots[expert_offsets[e]:expert_offsets[e + 1]].

On CUDA nothing synchronizes with the host and equal inputs give equal bits.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from compile_moe.ops.kernels import sort_tokens as kernels
from compile_moe.ops.problem_size import check_expert_map, check_ids, require, shape
from compile_moe.ops.registry import OutputSpec, define_op
from compile_moe.ops.route_tokens import MAX_EXPERTS


def _check(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None) -> None:
    check_ids(topk_ids)
    check_expert_map(expert_map, topk_ids)
    require(num_experts >= 1, lambda: f"num_experts must be at least 1, got {num_experts}")
    require(
        num_experts <= MAX_EXPERTS,
        lambda: (
            f"num_experts must be at most {MAX_EXPERTS}, which the kernels count at once, got {num_experts}"
        ),
    )
    require(
        topk_ids.size(0) * topk_ids.size(1) < 2**31 - 1,
        lambda: f"topk_ids must hold fewer than 2^31 - 1 slots, got {shape(topk_ids)}; split the tokens",
    )


def _outputs(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None) -> tuple[OutputSpec, ...]:
    num_slots = topk_ids.size(0) * topk_ids.size(1)
    return ((num_slots,), torch.int32), ((num_experts + 1,), torch.int32)


def local_experts(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None) -> Tensor:
    """Local expert of every slot, (M, topk) int64; num_experts where the slot is skipped. Never synchronizes."""
    ids = topk_ids.long()
    if expert_map is not None:
        if expert_map.size(0) == 0:
            return torch.full_like(ids, num_experts)
        known = (ids >= 0) & (ids < expert_map.size(0))
        ids = torch.where(known, expert_map.long()[torch.where(known, ids, 0)], -1)
    return torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)


def sort_tokens_torch(
    topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The result in plain PyTorch: any device, traceable, no data-dependent shapes."""
    experts = local_experts(topk_ids, num_experts, expert_map).flatten()
    sorted_experts, sorted_slots = torch.sort(experts, stable=True)
    boundaries = torch.arange(num_experts + 1, device=experts.device)
    offsets = torch.searchsorted(sorted_experts, boundaries, out_int32=True)
    return sorted_slots.to(torch.int32), offsets


def check_id_values(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None) -> None:
    """Raise ValueError for ids, and for values of expert_map, that name experts beyond the last. Reads data."""
    num_global = num_experts if expert_map is None else expert_map.size(0)
    if topk_ids.numel() and int(topk_ids.max()) > num_global:
        which = "" if expert_map is None else "the length of expert_map; "
        raise ValueError(
            f"topk_ids must be below the number of experts, {num_global} ({which}the slot is skipped if equal to it, "
            f"or negative), got {int(topk_ids.max())}"
        )
    if expert_map is not None and expert_map.numel() and int(expert_map.max()) >= num_experts:
        raise ValueError(
            f"expert_map must send global ids to local ids below {num_experts}, or to -1, "
            f"got {int(expert_map.max())}"
        )


def debug_check_id_values(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None) -> None:
    """:func:`check_id_values` with COMPILE_MOE_DEBUG=1 in the environment, outside of captures."""
    if os.environ.get("COMPILE_MOE_DEBUG") == "1" and not torch.cuda.is_current_stream_capturing():
        check_id_values(topk_ids, num_experts, expert_map)


def _torch(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check_id_values(topk_ids, num_experts, expert_map)
    return sort_tokens_torch(topk_ids, num_experts, expert_map)


def _launch(
    outputs: tuple[Tensor, Tensor], topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None
) -> None:
    debug_check_id_values(topk_ids, num_experts, expert_map)
    kernels.sort_tokens(*outputs, topk_ids, num_experts, expert_map)


sort_tokens = define_op(
    "sort_tokens",
    "Tensor topk_ids, SymInt num_experts, Tensor? expert_map=None",
    ("sorted_slots", "expert_offsets"),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=_launch,
)
