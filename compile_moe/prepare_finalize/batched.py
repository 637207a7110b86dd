"""Prepare and finalize on one device in the batched format: a block of rows for each expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from compile_moe.modular_parts import FusedMoEPrepareAndFinalize, PrepareResult, write_result
from compile_moe.ops.batch_tokens import batch_tokens
from compile_moe.ops.problem_size import check_batch_size, require, require_int
from compile_moe.ops.reduce_batch import reduce_batch
from compile_moe.ops.sort_tokens import sort_tokens
from compile_moe.prepare_finalize.quantized_input import in_autocast_dtype, quantized_input
from compile_moe.quant_config import FusedMoEQuantConfig, require_quant_config


class BatchedPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """Prepare and finalize on one device in the batched format, for BatchedTritonExperts and BatchedTorchExperts.

    An expert has room for max_num_tokens slots. Those beyond, in the order of tokens, are dropped: the layer's result
    is then the sum over a token's other slots. :attr:`num_dropped` says how many. With as many rows as there are
    tokens nothing is dropped, unless a token names an expert twice.

    Nothing synchronizes with the host. Between ``prepare`` and ``finalize`` an instance holds where the tokens are:
    calls that overlap, such as those of two microbatches, need an instance each.

    Args:
        max_num_tokens: rows of each expert, at least 1.
        num_local_experts: E, the experts of w1 and w2; needed where the layer has an expert_map, which may send ids
            to any number of them. None: all experts are local.
        quant_config: how the experts want their tokens quantized, or None. They are quantized before they are copied
            to their experts.

    Raises:
        ValueError, TypeError: a number that is no positive int, or one that contradicts the layer's.
    """

    #: (E,) int32 on the layer's device: slots of each expert that the latest ``prepare`` dropped; None before it. A
    #: layer in a CUDA graph writes it at each replay. Reading its values is up to the caller, and so is waiting for
    #: them: add it to a total on the device to look at that now and then. An exported program has it as a result.
    num_dropped: Tensor | None = None

    reduces_batches = True

    def __init__(
        self,
        max_num_tokens: int,
        num_local_experts: int | None = None,
        quant_config: FusedMoEQuantConfig | None = None,
    ) -> None:
        require_quant_config(quant_config)
        require_int("max_num_tokens", max_num_tokens)
        if num_local_experts is not None:
            require_int("num_local_experts", num_local_experts)
            require(
                num_local_experts >= 1,
                lambda: f"num_local_experts must be at least 1, got {num_local_experts}",
            )
        check_batch_size(num_local_experts or 1, max_num_tokens)
        self.max_num_tokens = max_num_tokens
        self.num_local_experts = num_local_experts
        self.quant_config = quant_config
        self._batch_rows: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what the latest call left: of a call that torch.export traced, these are tensors without memory."""
        return {**self.__dict__, "num_dropped": None, "_batch_rows": None}

    def prepare(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> PrepareResult:
        """The tokens, weighted if asked and quantized if the config's scheme quantizes them, as a batch.

        Returns:
            hidden_states (E, max_num_tokens, K), of which only rows with tokens are written; scales (1,), or (E,
            max_num_tokens, scales of a token) alike, or None; expert_num_tokens (E,) int32, at most max_num_tokens.
        """
        self._batch_rows = None  # of a call that failed
        num_local_experts = self._num_local_experts(num_experts, expert_map)
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
            # Rather than rows without tokens, too.
            tokens = in_autocast_dtype(tokens)
        order = sort_tokens(topk_ids, num_local_experts, expert_map)
        sizes = topk_ids.size(1), self.max_num_tokens
        batch, self._batch_rows, expert_num_tokens, self.num_dropped = batch_tokens(tokens, *order, *sizes)
        if scale is not None and scale.dim() == 2:
            scale = batch_tokens(scale, *order, *sizes)[0]
        return PrepareResult(batch, scale, expert_num_tokens)

    def prepare_async(self, *arguments: Any, **options: Any) -> Callable[[], PrepareResult]:
        """``prepare``, but not before its result is asked for: another call may be finalized in between."""
        return lambda: self.prepare(*arguments, **options)

    prepare_async_counterpart = prepare

    def _num_local_experts(self, num_experts: int, expert_map: Tensor | None) -> int:
        given = self.num_local_experts
        if expert_map is None:
            require(
                given is None or given == num_experts,
                lambda: (
                    f"num_local_experts must be the number of experts, {num_experts}, where there is no expert_map, "
                    f"got {given}; pass the map from global to local ids"
                ),
            )
            return num_experts
        if given is None:
            raise ValueError(
                "num_local_experts must be given where there is an expert_map, got None; construct "
                f"{type(self).__name__} with the number of experts of w1"
            )
        return given

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Gather each token's rows of (E, max_num_tokens, K), weight and sum them into output (M, K).

        Raises:
            RuntimeError: there was no ``prepare`` before it.
        """
        result = self.reduce(
            fused_expert_output, topk_weights, topk_ids, None, -1, apply_router_weight_on_input
        )
        write_result(output, result)

    def reduce(
        self,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor | None,
        expert_map: Tensor | None,
        num_experts: int,
        apply_router_weight_on_input: bool,
    ) -> Tensor:
        """``finalize`` as a function. Which slots count was decided by ``prepare``."""
        batch_rows, self._batch_rows = self._batch_rows, None
        if batch_rows is None:
            raise RuntimeError(
                f"{type(self).__name__} finalizes what it prepared, once: call prepare of this instance first"
            )
        return reduce_batch(fused_expert_output, topk_weights, batch_rows, not apply_router_weight_on_input)

    reduce_counterpart = finalize
