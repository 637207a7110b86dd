"""What prepare/finalize classes over the ranks of a group share: placement, checks, quantize before dispatch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from compile_moe.expert_placement import ExpertPlacement
from compile_moe.modular_parts import FusedMoEPrepareAndFinalize, PrepareResult
from compile_moe.ops.problem_size import require, require_int
from compile_moe.prepare_finalize.collectives import find_group
from compile_moe.prepare_finalize.quantized_input import in_autocast_dtype, quantized_input
from compile_moe.prepare_finalize.without_backward import needing_gradients, without_backward
from compile_moe.quant_config import FusedMoEQuantConfig, require_quant_config


class GroupPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """Base of the classes that send tokens to the ranks of their experts, in whatever format.

    A layer calls ``prepare`` and then ``finalize`` once: in between, the object remembers how the rows come back.
    All ranks of the group call the layer together, in the same order with their other collectives.

    For arguments, attributes and errors see :class:`AllToAllPrepareAndFinalize`.
    """

    def __init__(
        self,
        placement: ExpertPlacement,
        group: Any = None,
        quant_config: FusedMoEQuantConfig | None = None,
        device: torch.device | str | None = None,
        tensor_parallel_size: int = 1,
    ) -> None:
        if not isinstance(placement, ExpertPlacement):
            raise TypeError(
                f"placement must be a compile_moe.ExpertPlacement, got {type(placement).__name__}"
            )
        require_quant_config(quant_config)
        self.quant_config = quant_config
        self.group = find_group(group)
        require_int("tensor_parallel_size", tensor_parallel_size)
        if placement.num_ranks * tensor_parallel_size != self.group.size:
            times = (
                "" if tensor_parallel_size == 1 else f" with tensor_parallel_size = {tensor_parallel_size}"
            )
            raise ValueError(
                f"placement must be for the ranks of the group, {self.group.size}, got one for {placement.num_ranks}"
                f"{times}"
            )
        device = self.group.device if device is None else device
        self.placement = placement
        self.num_experts = placement.num_experts
        self.tensor_parallel_size = tensor_parallel_size
        #: In the placement.
        self.rank_of_experts = self.group.rank // tensor_parallel_size
        self.expert_map = placement.expert_map(self.rank_of_experts, device)
        self.experts_of_rank = len(placement.local_experts[self.rank_of_experts])
        self.owner_tables = placement.owner_tables(device)
        self._way_back: Any = None
        self._sources: tuple[Tensor, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Without what the latest call left: of a call that torch.export traced, these are tensors without memory."""
        return {**self.__dict__, "_way_back": None, "_sources": ()}

    @abstractmethod
    def send(
        self, tokens: Tensor, scale: Tensor | None, topk_weights: Tensor, topk_ids: Tensor
    ) -> Callable[[], PrepareResult]:
        """Start to exchange this rank's tokens (M, K), with scales (1,) or (M, G) or None, for those of its experts.

        Returns:
            A function that waits for them, and remembers how results find back.
        """

    def prepare_async(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> Callable[[], PrepareResult]:
        """``prepare``, but for the wait until tokens are here, which the returned function does."""
        self._way_back = None  # of a call that failed
        self._sources = needing_gradients(a1, topk_weights)
        require(
            num_experts == self.num_experts,
            lambda: (
                f"global_num_experts must be that of the placement, {self.num_experts}, got {num_experts}; pass "
                "expert_map=prepare_finalize.expert_map to the layer"
            ),
        )
        if expert_map is None:
            require(
                self.placement.num_ranks == 1,
                lambda: (
                    f"expert_map is missing: this rank holds some of {self.num_experts} experts; pass "
                    "expert_map=prepare_finalize.expert_map to the layer"
                ),
            )
        else:
            self._check_map(expert_map)
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
        return self.send(tokens, scale, topk_weights, topk_ids)

    def _check_map(self, expert_map: Tensor) -> None:
        """Raise ValueError for a map of other experts than this rank's, where that is seen without waiting for a GPU.
        Their order may be the caller's.
        """
        if expert_map is self.expert_map or torch.compiler.is_compiling() or type(expert_map) is not Tensor:
            return
        if expert_map.device.type != "cpu":
            return
        with _disable_current_modes():
            is_same = torch.equal(expert_map >= 0, self.expert_map.cpu() >= 0)
        if not is_same:
            raise ValueError(
                "expert_map must have the experts of this rank, as prepare_finalize.expert_map has, got one of others: "
                "tokens would reach experts that they are not for"
            )

    def _returned(self, result: Callable[[], Tensor], expert_output: Tensor) -> Callable[[], Tensor]:
        """What a call gives back, also to autograd."""
        sources, self._sources = self._sources, ()
        return without_backward(result, (*sources, *needing_gradients(expert_output)))

    @abstractmethod
    def reduce_async(self, *arguments: Any, **options: Any) -> Callable[[], Tensor]:
        """``reduce``, but for the wait until results are here, which the returned function does."""

    def prepare(self, *arguments: Any, **options: Any) -> PrepareResult:
        """Exchange this rank's tokens for those of its experts.

        They are weighted if asked, quantized if the config's scheme does, and sent as :meth:`send` says. Under autocast
        they are cast to its dtype first.
        """
        return self.prepare_async(*arguments, **options)()

    def reduce(self, *arguments: Any, **options: Any) -> Tensor:
        """``finalize`` as a function: :meth:`reduce_async`, and the wait."""
        return self.reduce_async(*arguments, **options)()

    prepare_async_counterpart = prepare
    reduce_async_counterpart = reduce

    def _remembered(self) -> Any:
        if self._way_back is None:
            raise RuntimeError(
                f"{type(self).__name__}: finalize without a prepare before it; each prepare is finalized once, and "
                "layers whose calls overlap need an object each"
            )
        return self._way_back
