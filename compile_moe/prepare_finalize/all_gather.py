"""Expert parallelism by all-gather and reduce-scatter: every rank sees all tokens and computes its experts' slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from compile_moe.expert_placement import ExpertPlacement
from compile_moe.ops.problem_size import require, require_int
from compile_moe.prepare_finalize.collectives import all_gather, as_sizes, reduce_scatter, wait
from compile_moe.prepare_finalize.expert_parallel import ExpertParallelPrepareAndFinalize
from compile_moe.prepare_finalize.token_rows import TokenRows
from compile_moe.quant_config import FusedMoEQuantConfig


class AllGatherPrepareAndFinalize(ExpertParallelPrepareAndFinalize):
    """Tokens of all ranks on every rank, and the sum of all ranks' results back.

    For R ranks of P tokens each rank receives (R - 1) * P rows, of K elements in the tokens' dtype (quantized where the
    scheme quantizes tokens) and 8 * topk + 4 * G bytes (ids, weights, G scales), and in finalize as many rows of K
    elements in the results' dtype, summed in that dtype. That is independent of the routing: it suits few ranks, many
    experts a token and small batches; :class:`AllToAllPrepareAndFinalize` sends less where topk is well below R.

    Args:
        placement, group, quant_config, device, tensor_parallel_size: see :class:`AllToAllPrepareAndFinalize`.
        num_tokens: what is known of the ranks' token counts.

            - "exchanged": nothing. Each call exchanges them, for which the host waits once, and pads to the largest.
            - "equal": the same on all ranks. The host never waits. A rank that breaks this breaks the collectives: an
              error or wrong results, as the backend has it.
            - an int: at most that many on each rank, to which all pad. The host never waits.

    Raises:
        ValueError: when called with more tokens than ``num_tokens``.
    """

    def __init__(
        self,
        placement: ExpertPlacement,
        group: Any = None,
        quant_config: FusedMoEQuantConfig | None = None,
        device: torch.device | str | None = None,
        *,
        num_tokens: int | Literal["exchanged", "equal"] = "exchanged",
        tensor_parallel_size: int = 1,
    ) -> None:
        super().__init__(placement, group, quant_config, device, tensor_parallel_size)
        if num_tokens not in ("exchanged", "equal"):
            if isinstance(num_tokens, str):
                raise ValueError(f"num_tokens must be 'exchanged', 'equal' or an int, got {num_tokens!r}")
            require_int("num_tokens", num_tokens)
            if num_tokens < 0:
                raise ValueError(f"num_tokens must not be negative, got {num_tokens}")
        self.num_tokens = num_tokens

    def dispatch(self, rows: TokenRows) -> tuple[Callable[[], TokenRows], int]:
        arrived = self._padded(rows).sent(lambda tensors: all_gather(tensors, self.group))
        if self.owner_tables.num_copies is not None:
            return lambda: self._without_copies(arrived()), rows.topk_ids.size(0)
        return arrived, rows.topk_ids.size(0)

    def combine(self, partial: Tensor, way_back: int) -> Callable[[], Tensor]:
        started = reduce_scatter(partial, self.group)
        return lambda: wait(started)[0][:way_back]

    def _without_copies(self, gathered: TokenRows) -> TokenRows:
        """Rows without slots that another rank computes: the map has a local expert for a replicated one on each."""
        ids = gathered.topk_ids
        is_mine = self.owner_tables.owners(ids) == self.rank_of_experts
        return gathered._replace(topk_ids=torch.where(is_mine | (ids > self.num_experts), ids, -1))

    def _padded(self, rows: TokenRows) -> TokenRows:
        """Rows up to the number that all ranks have."""
        if self.num_tokens == "equal":
            return rows
        m = rows.topk_ids.size(0)
        if self.num_tokens == "exchanged":
            own = torch.full((1,), m, dtype=torch.int64, device=rows.topk_ids.device)
            (counts,) = wait(all_gather([own], self.group))
            (size,) = as_sizes(counts.amax(0, keepdim=True))
            torch._check(size >= m)
        else:
            size = int(self.num_tokens)
            require(
                m <= size,
                lambda: f"hidden_states must have at most num_tokens = {size} tokens on each rank, got {m}",
            )

        def pad(t: Tensor, value: int = 0) -> Tensor:
            # Two rows too many: sizes of 0 and 1 would have graphs of their own.
            return torch.cat([t, t.new_full((size + 2 - m, t.size(1)), value)]).narrow(0, 0, size)

        tokens = rows.hidden_states
        if tokens.itemsize == 1:
            # What pads float8 isn't there on every device; zero bytes are zeros.
            tokens = pad(tokens.view(torch.uint8)).view(tokens.dtype)
        else:
            tokens = pad(tokens)
        scale = None if rows.scale is None else pad(rows.scale)
        return TokenRows(tokens, pad(rows.topk_ids, -1), pad(rows.topk_weights), scale)
