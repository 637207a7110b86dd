"""What prepare/finalize classes over the ranks of a group share: placement, checks, quantize before dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compile_moe.expert_placement import ExpertPlacement
from compile_moe.modular_parts import FusedMoEPrepareAndFinalize
from compile_moe.ops.problem_size import require
from compile_moe.prepare_finalize.collectives import find_group
from compile_moe.prepare_finalize.quantized_input import in_autocast_dtype, quantized_input
from compile_moe.quant_config import FusedMoEQuantConfig, require_quant_config


class GroupPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """Base of the classes that send tokens to the ranks of their experts, in whatever format.

    A layer calls ``prepare`` and then ``finalize`` once: in between, the object remembers how the rows come back.
    All ranks of the group call the layer together, in the same order with their other collectives.

    Args:
        placement: the experts of each rank of the group; w1, w2 and their scales are this rank's.
        group: a ``torch.distributed.ProcessGroup``, or None for the default group.
        quant_config: how the experts want their tokens quantized, or None. Quantized tokens are sent as such, each with
            its scale. A computed scale per tensor is that of the sending rank's tokens.
        device: where the tokens are; None for the current CUDA device where the group's backend is NCCL, else the CPU.

    Attributes:
        expert_map: (num_experts,) int32 on ``device``: pass it to the layer's call.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        ValueError, TypeError: a placement for another number of ranks, or arguments of other kinds.
    """

    def __init__(
        self,
        placement: ExpertPlacement,
        group: Any = None,
        quant_config: FusedMoEQuantConfig | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(placement, ExpertPlacement):
            raise TypeError(
                f"placement must be a compile_moe.ExpertPlacement, got {type(placement).__name__}"
            )
        require_quant_config(quant_config)
        self.quant_config = quant_config
        self.group = find_group(group)
        if placement.num_ranks != self.group.size:
            raise ValueError(
                f"placement must be for the ranks of the group, {self.group.size}, got one for {placement.num_ranks}"
            )
        device = self.group.device if device is None else device
        self.placement = placement
        self.num_experts = placement.num_experts
        self.expert_map = placement.expert_map(self.group.rank, device)
        self.owner_tables = placement.owner_tables(device)
        self._way_back: Any = None

    def tokens_to_send(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Check what ``prepare`` got; this rank's tokens (M, K), weighted if asked, quantized if the config's scheme
        does, and their scales, (1,) or (M, G), or None. Under autocast they are cast to its dtype first.
        """
        require(
            num_experts == self.num_experts,
            lambda: (
                f"global_num_experts must be that of the placement, {self.num_experts}, got {num_experts}; pass "
                "expert_map=prepare_finalize.expert_map to the layer"
            ),
        )
        if expert_map is None:
            require(
                self.group.size == 1,
                lambda: (
                    f"expert_map is missing: this rank holds some of {self.num_experts} experts; pass "
                    "expert_map=prepare_finalize.expert_map to the layer"
                ),
            )
        require(
            topk_ids.device == self.owner_tables.ranks.device,
            lambda: (
                f"topk_ids must be on the device of {type(self).__name__}, {self.owner_tables.ranks.device}, got "
                f"{topk_ids.device}; construct it with device=..."
            ),
        )
        tokens, scale = quantized_input(
            type(self).__name__,
            self.quant_config,
            a1,
            a1_scale,
            a2_scale,
            topk_weights,
            topk_ids,
            apply_router_weight_on_input,
        )
        if self.quant_config is None:
            tokens = in_autocast_dtype(tokens)
        return tokens, scale

    def _remembered(self) -> Any:
        if self._way_back is None:
            raise RuntimeError(
                f"{type(self).__name__}: finalize without a prepare before it; each prepare is finalized once, and "
                "layers whose calls overlap need an object each"
            )
        return self._way_back
