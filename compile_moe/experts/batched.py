"""Experts in the batched format: each expert's tokens in a block of rows of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.experts.built_in import BuiltInExperts
from compile_moe.experts.ordered_rows import OrderedRows
from compile_moe.experts.torch_experts import TorchExperts
from compile_moe.experts.triton_experts import TritonExperts
from compile_moe.ops.problem_size import (
    ID_DTYPES,
    _moe_problem_size,
    check_batch_size,
    check_device,
    require,
    require_int,
    require_optional_tensors,
    require_type,
    shape,
)
from compile_moe.quant_config import FusedMoEQuantConfig


class BatchedExperts(BuiltInExperts):
    """Base of the built-in experts in the batched format.

    ``apply`` takes hidden_states (E, max_num_tokens, K), of which the first expert_num_tokens[e] rows of expert e hold
    tokens, and expert_num_tokens (E,), int32 or int64 (more than max_num_tokens count as that); scales of tokens come
    as (E, max_num_tokens, scales of a token), or one for all as (1,). It returns (E, max_num_tokens, K). Rows without
    a token are neither computed nor read nor written: what they hold is undefined. (Where experts don't lie one behind
    the other in memory, hidden_states are copied first.) topk_ids is only looked at for its shape.

    Args:
        max_num_tokens: rows of each expert, at least 1.
        w1_bias, w2_bias, quant_config: as for :class:`TritonExperts`.

    Raises:
        ValueError, TypeError: max_num_tokens is no positive int; in ``apply``, tokens in another format or of other
            sizes.
    """

    def __init__(
        self,
        max_num_tokens: int,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        quant_config: FusedMoEQuantConfig | None = None,
    ) -> None:
        super().__init__(w1_bias, w2_bias, quant_config)
        require_int("max_num_tokens", max_num_tokens)
        check_batch_size(1, max_num_tokens)
        self.max_num_tokens = max_num_tokens

    def workspace_shapes(
        self, a: Tensor, M: int, N: int, K: int, topk: int, num_experts: int
    ) -> tuple[int, int, torch.dtype]:
        """The published sizes for a batch of num_experts experts. These experts use neither workspace."""
        rows = num_experts * self.max_num_tokens
        return rows * max(N, K), rows * N, a.dtype

    def check_format(
        self,
        hidden_states: Tensor,
        a1q_scale: Tensor | None,
        w1: Tensor,
        w2: Tensor,
        topk_ids: Tensor,
        expert_num_tokens: Tensor | None,
    ) -> None:
        name = type(self).__name__
        require_optional_tensors(expert_num_tokens=expert_num_tokens, a1q_scale=a1q_scale)
        if hidden_states.dim() != 3 or expert_num_tokens is None:
            raise ValueError(
                f"{name} takes the batched format, hidden_states (E, max_num_tokens, K) with expert_num_tokens (E,), "
                f"got {shape(hidden_states)} {'without' if expert_num_tokens is None else 'with'} expert_num_tokens; "
                "prepare must batch the tokens, as BatchedPrepareAndFinalize does"
            )
        num_experts, max_num_tokens, *_ = _moe_problem_size(hidden_states, w1, w2, topk_ids)
        require(
            max_num_tokens == self.max_num_tokens,
            lambda: (
                f"hidden_states must be (E, max_num_tokens, K) with max_num_tokens = {self.max_num_tokens}, as {name} "
                f"was constructed, got {shape(hidden_states)}; construct both parts with the same: the experts "
                "with max_num_tokens=prepare_finalize.max_num_tokens"
            ),
        )
        require(
            expert_num_tokens.dim() == 1 and expert_num_tokens.size(0) == num_experts,
            lambda: f"expert_num_tokens must be (E,) = ({num_experts},), got {shape(expert_num_tokens)}",
        )
        require_type(
            expert_num_tokens.dtype in ID_DTYPES,
            lambda: f"expert_num_tokens must be int32 or int64, got {expert_num_tokens.dtype}",
        )
        check_device("hidden_states", hidden_states, expert_num_tokens=expert_num_tokens)
        if a1q_scale is not None and a1q_scale.dim() != 1:
            rows = (num_experts, max_num_tokens)
            require(
                a1q_scale.dim() == 3 and tuple(a1q_scale.shape[:2]) == rows,
                lambda: (
                    f"a1q_scale must be {(*rows, 'scales of a token')}, or (1,) for all, got {shape(a1q_scale)}"
                ),
            )

    def order_of(
        self,
        w1: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        expert_num_tokens: Tensor | None,
    ) -> OrderedRows:
        assert expert_num_tokens is not None, "checked"
        num_rows = w1.size(0) * self.max_num_tokens
        return OrderedRows(*self.sort_batch(expert_num_tokens, self.max_num_tokens), num_rows, 1, True)


class BatchedTritonExperts(BatchedExperts, TritonExperts):
    """:class:`TritonExperts` in the batched format: the same kernels, which have no tile for rows without tokens.

    Args:
        max_num_tokens: rows of each expert, at least 1.
        w1_bias, w2_bias, quant_config: as for :class:`TritonExperts`.
    """


class BatchedTorchExperts(BatchedExperts, TorchExperts):
    """:class:`TorchExperts` in the batched format: plain PyTorch, for any device.

    On CUDA it synchronizes, and can't be captured.

    Args:
        max_num_tokens: rows of each expert, at least 1.
        w1_bias, w2_bias, quant_config: as for :class:`TritonExperts`.
    """
