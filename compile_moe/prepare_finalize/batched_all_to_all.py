"""Expert parallelism by all-to-all with a static capacity: messages of one size, whatever the routing.

Letters: R ranks of the group, E experts of this rank, P rows that an expert has for a rank's slots, G scales of a
token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compile_moe.expert_placement import ExpertPlacement
from compile_moe.modular_parts import PrepareResult, write_result
from compile_moe.ops.batch_tokens import batch_tokens
from compile_moe.ops.problem_size import require, require_int, shape
from compile_moe.ops.reduce_batch import reduce_batch
from compile_moe.ops.registry import is_watched
from compile_moe.ops.sort_tokens import check_id_values, sort_tokens
from compile_moe.prepare_finalize.collectives import all_to_all, wait
from compile_moe.prepare_finalize.group import GroupPrepareAndFinalize
from compile_moe.quant_config import FusedMoEQuantConfig


class WayBack(NamedTuple):
    """How results return.

    slots: (M, topk) int32, where each slot is in the batch that this rank sent, as a row of the flattened batch; -1 for
    slots that are skipped or dropped. received: (R * E * P, 1) int32, where each received row is in the batch that this
    rank's experts get; -1 for rows without a token.
    """

    slots: Tensor
    received: Tensor


class BatchedAllToAllPrepareAndFinalize(GroupPrepareAndFinalize):
    """Slots to the ranks of their experts in the batched format, with room for a fixed number of them.

    Each expert, or copy of an expert, has room for max_tokens_per_rank = P slots of each rank. A rank's slots beyond,
    in the order of tokens, are dropped: the layer's result is then the sum over a token's other slots, and nothing else
    changes. :attr:`num_dropped` says how many. With P as large as the most tokens of a rank nothing is dropped, unless
    a token names an expert twice.

    To a rank with E' experts a rank sends E' * P rows of K elements in the tokens' dtype (quantized where the scheme
    quantizes tokens) and E' * 4 * (1 + P * G) bytes (counts, scales; a scale for all tokens goes once an expert), and
    gets E' * P rows of K elements in the results' dtype. These sizes follow from the placement, which the host knows:
    it never waits, no shape depends on the routing, and a compiled graph has no unbacked sizes: what a CUDA graph
    needs. A token with two experts on a rank is sent twice. This suits small batches of decoding;
    :class:`AllToAllPrepareAndFinalize` sends only what there is.

    The experts are BatchedTritonExperts or BatchedTorchExperts of :attr:`max_num_tokens` tokens.

    Args:
        placement, group, quant_config, device: see :class:`AllToAllPrepareAndFinalize`.
        max_tokens_per_rank: P, at least 1, the same on all ranks. A rank that breaks this breaks the collectives: an
            error or wrong results, as the backend has it.

    Attributes:
        max_num_tokens: R * P, rows of each expert: construct the experts with it.

    Raises:
        ValueError, TypeError: a max_tokens_per_rank that is no positive int, or too large.
    """

    #: (num_experts,) int32 by global expert: slots of this rank that the latest ``prepare`` dropped; None before it. A
    #: layer in a CUDA graph writes it at each replay. Reading its values is up to the caller, and so is waiting for
    #: them: add it to a total on the device to look at that now and then. An exported program has it as a result.
    num_dropped: Tensor | None = None

    reduces_batches = True

    def __init__(
        self,
        placement: ExpertPlacement,
        max_tokens_per_rank: int,
        group: Any = None,
        quant_config: FusedMoEQuantConfig | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(placement, group, quant_config, device)
        require_int("max_tokens_per_rank", max_tokens_per_rank)
        require(
            max_tokens_per_rank >= 1,
            lambda: f"max_tokens_per_rank must be at least 1, got {max_tokens_per_rank}",
        )
        size = self.group.size
        num_sent = [len(experts) for experts in placement.local_experts]
        # Of the largest rank, so that all ranks agree.
        require(
            max(num_sent) * size * max_tokens_per_rank < 2**31 - 1,
            lambda: (
                f"a batch must have fewer than 2^31 - 1 rows, got {max(num_sent)} experts for {max_tokens_per_rank} "
                f"slots of each of {size} ranks; lower max_tokens_per_rank"
            ),
        )
        self.max_tokens_per_rank = max_tokens_per_rank
        self.max_num_tokens = size * max_tokens_per_rank
        #: Blocks of P rows to each rank, and from each.
        self._num_sent = num_sent
        self._num_received = [num_sent[self.group.rank]] * size
        self._places = self.owner_tables.places[:, 0].to(torch.int32)

    def __getstate__(self) -> dict[str, Any]:
        """Without what the latest call left."""
        return {**super().__getstate__(), "num_dropped": None}

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Bring the rows (E, R * P, K) back, weight and sum each token's into output (M, K)."""
        result = self.reduce(
            fused_expert_output, topk_weights, topk_ids, None, -1, apply_router_weight_on_input
        )
        write_result(output, result)

    def reduce_async(
        self,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor | None,
        expert_map: Tensor | None,
        num_experts: int,
        apply_router_weight_on_input: bool,
    ) -> Callable[[], Tensor]:
        """``finalize`` as a function, but for the wait. Which slots count was decided by ``prepare``."""
        way_back = self._remembered()
        self._way_back = None
        expected = self._num_received[0], self.max_num_tokens
        require(
            tuple(fused_expert_output.shape)[:2] == expected,
            lambda: (
                f"fused_expert_output must be (E, max_num_tokens, K) for this rank's (E, max_num_tokens) = {expected}, "
                f"got {shape(fused_expert_output)}"
            ),
        )
        combined = self.combine(fused_expert_output, topk_weights, way_back, not apply_router_weight_on_input)
        return self._returned(combined, fused_expert_output)

    reduce_counterpart = finalize

    def send(
        self, tokens: Tensor, scale: Tensor | None, topk_weights: Tensor, topk_ids: Tensor
    ) -> Callable[[], PrepareResult]:
        """Start to exchange slots.

        Returns:
            A function that waits for those of this rank's experts: hidden_states (E, R * P, K), of which only rows with
            tokens hold anything; scales (E, R * P, G), or None; expert_num_tokens (E,) int32.
        """
        order = self._sorted_by_place(topk_ids)
        sizes = topk_ids.size(1), self.max_tokens_per_rank
        batch, slots, num_tokens, num_dropped = batch_tokens(tokens, *order, *sizes)
        # Over an expert's copies; the table has -1 where there is none, which is the zero behind the last place.
        self.num_dropped = F.pad(num_dropped, (0, 1))[self.owner_tables.places].sum(1, dtype=torch.int32)
        facts, num_scales = [num_tokens.unsqueeze(1)], 0
        if scale is not None:
            num_scales = scale.size(-1)
            if scale.dim() == 1:
                scale = scale.expand(num_tokens.size(0), 1)
            else:
                scale = batch_tokens(scale, *order, *sizes)[0].flatten(1)
            facts.append(scale.view(torch.int32))
        # Backends don't know all one-byte types.
        as_bytes = batch.view(torch.uint8) if batch.itemsize == 1 else batch
        started = all_to_all([as_bytes, torch.cat(facts, 1)], self._num_sent, self._num_received, self.group)

        dtype = batch.dtype

        def receive() -> PrepareResult:
            received, facts = wait(started)
            started.clear()
            result, rows = self._as_one_batch(received.view(dtype), facts, num_scales)
            self._way_back = WayBack(slots, rows)
            return result

        return receive

    def combine(
        self, expert_output: Tensor, topk_weights: Tensor, way_back: WayBack, apply_weights: bool
    ) -> Callable[[], Tensor]:
        """Start to return the experts' results; the function returned waits for this rank's, and sums each token's."""
        slots, received = way_back
        # One slot a row, which gets its expert's result as it is; zeros in rows without a token.
        ones = expert_output.new_ones(1, 1).expand(received.shape)
        results = reduce_batch(expert_output, ones, received, False)
        started = all_to_all(
            [results.unflatten(0, (-1, self.max_tokens_per_rank))],
            self._num_received,
            self._num_sent,
            self.group,
        )

        def receive() -> Tensor:
            (returned,) = wait(started)
            result: Tensor = reduce_batch(returned, topk_weights, slots, apply_weights)
            return result

        return receive

    def _sorted_by_place(self, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted slots and offsets, as ``sort_tokens``, of all copies of all experts."""
        num_places = sum(self._num_sent)
        if self.owner_tables.num_copies is None:
            order: tuple[Tensor, Tensor] = sort_tokens(topk_ids, num_places, self._places)
            return order
        if topk_ids.device.type == "cpu" and not is_watched():
            # The sort would speak of places.
            check_id_values(topk_ids, self.num_experts)
        # Each rank starts at another copy of a replicated expert.
        places = self.owner_tables.owner_places(topk_ids, first_token=self.group.rank)
        order = sort_tokens(
            torch.where(topk_ids > self.num_experts, num_places + 1, places), num_places, None
        )
        return order

    def _as_one_batch(self, received: Tensor, facts: Tensor, num_scales: int) -> tuple[PrepareResult, Tensor]:
        """The blocks of all ranks, (R * E, P, K), as one of each expert: its tokens in the order of ranks.

        Also where each row of the blocks went, (R * E * P, 1).
        """
        size, num_local, num_rows = self.group.size, self._num_received[0], self.max_tokens_per_rank
        num_tokens = facts[:, :1]
        experts = torch.arange(num_local, dtype=torch.int32, device=facts.device).repeat(size)
        row = torch.arange(num_rows, device=facts.device)
        ids = torch.where(row < num_tokens, experts.unsqueeze(1), -1).view(-1, 1)
        order = sort_tokens(ids, num_local)
        sizes = 1, self.max_num_tokens
        batch, rows, expert_num_tokens, _ = batch_tokens(received.flatten(0, 1), *order, *sizes)
        scale = None
        if num_scales:
            scale = facts[:, 1:].view(torch.float32).unflatten(1, (-1, num_scales))
            scale = batch_tokens(scale.expand(-1, num_rows, -1).flatten(0, 1), *order, *sizes)[0]
        return PrepareResult(batch, scale, expert_num_tokens), rows
