"""Tokens with all that travels along: two messages, whatever the format.

Letters: n rows, K hidden size, G scales of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compile_moe.prepare_finalize.collectives import wait


class TokenRows(NamedTuple):
    """Rows of tokens.

    hidden_states (n, K), quantized or not; topk_ids (n, topk) int32, negative where this row's receiver has nothing to
    do; topk_weights (n, topk) float32 or float64; scale (n, G) float32 where tokens are quantized, else None.
    """

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    scale: Tensor | None

    def sent(self, start: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[], TokenRows]:
        """Let ``start`` begin to exchange rows of tensors with other ranks; a function that waits for what arrives.

        In two messages: K elements a row of the tokens' dtype, and 8 * topk + 4 * G bytes (12 * topk with float64
        weights).
        """
        tokens = self.hidden_states
        # Backends don't know all one-byte types.
        as_bytes = tokens.view(torch.uint8) if tokens.itemsize == 1 else tokens
        facts = [self.topk_ids, self.topk_weights.contiguous().view(torch.int32)]
        if self.scale is not None:
            facts.append(self.scale.view(torch.int32))
        started = start([as_bytes, torch.cat(facts, 1)])
        # Not the rows themselves, which need not outlive their sending.
        dtype, weights_dtype, widths = tokens.dtype, self.topk_weights.dtype, [f.size(1) for f in facts]

        def arrived() -> TokenRows:
            moved_tokens, moved_facts = wait(started)
            ids, weights, *scales = moved_facts.split(widths, 1)
            if weights_dtype.itemsize > 4:
                # Eight bytes of a row need not lie where eight bytes may.
                weights = weights.clone(memory_format=torch.contiguous_format)
            return TokenRows(
                moved_tokens.view(dtype),
                ids,
                weights.view(weights_dtype),
                scales[0].view(torch.float32) if scales else None,
            )

        return arrived


def token_rows(
    hidden_states: Tensor, scale: Tensor | None, topk_ids: Tensor, topk_weights: Tensor, num_experts: int
) -> TokenRows:
    """Rows from what a layer has: ids that name no expert stay recognizable, as -1 or num_experts + 1."""
    if scale is not None and scale.dim() == 1:
        # One scale for all tokens of a rank, which other ranks don't share.
        scale = scale.unsqueeze(0).expand(hidden_states.size(0), 1)
    ids = topk_ids.clamp(-1, num_experts + 1).to(torch.int32)
    if topk_weights.dtype is not torch.float64:
        topk_weights = topk_weights.float()
    return TokenRows(hidden_states, ids, topk_weights, scale)
