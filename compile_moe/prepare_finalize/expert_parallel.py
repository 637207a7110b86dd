"""What expert-parallel prepare/finalize classes of token rows share: reduce before the way back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from compile_moe.modular_parts import PrepareResult, write_result
from compile_moe.ops.problem_size import require, shape
from compile_moe.ops.weight_and_reduce import weight_and_reduce
from compile_moe.prepare_finalize.group import GroupPrepareAndFinalize
from compile_moe.prepare_finalize.token_rows import TokenRows, token_rows


class ExpertParallelPrepareAndFinalize(GroupPrepareAndFinalize):
    """Base of the classes that send rows of tokens, and get one row back for each: its weighted sum there.

    For arguments, attributes and errors see :class:`AllToAllPrepareAndFinalize`.
    """

    @abstractmethod
    def dispatch(self, rows: TokenRows) -> tuple[Callable[[], TokenRows], Any]:
        """Start to exchange this rank's tokens for those that it computes.

        Returns:
            A function that waits for them, and how ``combine`` finds back.
        """

    @abstractmethod
    def combine(self, partial: Tensor, way_back: Any) -> Callable[[], Tensor]:
        """Start to send the dispatched rows' ``partial`` results back.

        Returns:
            A function that waits for those of this rank's tokens: (M, K), the sums over all ranks.
        """

    def send(
        self, tokens: Tensor, scale: Tensor | None, topk_weights: Tensor, topk_ids: Tensor
    ) -> Callable[[], PrepareResult]:
        """:meth:`dispatch` of the tokens.

        Returns:
            A function that waits for the tokens that this rank computes, (n, K); their scales, (n, G), or None; and
            their topk_ids (n, topk) int32, global, -1 for other ranks' slots, and topk_weights (n, topk) float32
            (float64 for float64).
        """
        rows = token_rows(tokens, scale, topk_ids, topk_weights, self.num_experts)
        arrived, way_back = self.dispatch(rows)

        def prepared() -> PrepareResult:
            rows = arrived()
            self._way_back = rows.topk_weights, way_back
            return PrepareResult(
                rows.hidden_states, rows.scale, None, topk_ids=rows.topk_ids, topk_weights=rows.topk_weights
            )

        return prepared

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Weight and sum the dispatched rows' (n, topk, K), bring the sums back, and write them into output (M, K)."""
        dispatched_weights, _ = self._remembered()
        write_result(
            output,
            self.reduce(
                fused_expert_output, dispatched_weights, None, None, -1, apply_router_weight_on_input
            ),
        )

    def reduce_async(
        self,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor | None,
        expert_map: Tensor | None,
        num_experts: int,
        apply_router_weight_on_input: bool,
    ) -> Callable[[], Tensor]:
        """``finalize`` as a function of the dispatched weights and ids, but for the wait.

        Ignores skipped slots if topk_ids is given.
        """
        _, way_back = self._remembered()
        self._way_back = None
        expected = tuple(topk_weights.shape)
        require(
            tuple(fused_expert_output.shape)[:2] == expected,
            lambda: (
                f"fused_expert_output must be (n, topk, K) for the dispatched (n, topk) = {expected}, got "
                f"{shape(fused_expert_output)}"
            ),
        )
        partial = weight_and_reduce(
            fused_expert_output,
            topk_weights,
            topk_ids,
            expert_map,
            num_experts,
            not apply_router_weight_on_input,
        )
        return self._returned(self.combine(partial, way_back), fused_expert_output)

    reduce_counterpart = finalize
