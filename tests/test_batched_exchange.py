"""The ops of the batched format carry an exchange between ranks with a static capacity: no shape depends on a routing.

The ranks are all here, and what stands between them is a transposition, which is what an all-to-all does.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compile_moe import BatchedTritonExperts
from compile_moe.ops import batch_tokens, reduce_batch, sort_tokens
from tests.support.batched import holds_token, kept, poison
from tests.support.oracle import Layer, assert_as_accurate, make_layer

K = 48


def exchanged(sent: list[Tensor]) -> list[Tensor]:
    """Of each rank (E_global, ...), in blocks for each rank: (ranks, E_local, ...), from each rank."""
    ranks = len(sent)
    blocks = torch.stack([t.view(ranks, -1, *t.shape[1:]) for t in sent])
    return list(blocks.transpose(0, 1))


def experts_of_rank(layer: Layer, received: Tensor, counts: Tensor, rank: int, capacity: int) -> Tensor:
    """What a rank computes of (ranks, E_local, capacity, K): rows as the tokens of one more batch, and back."""
    ranks, num_local = counts.shape
    rows = received.reshape(-1, K)
    has_token = torch.stack([holds_token(n, capacity) for n in counts])
    ids = torch.where(has_token, torch.arange(num_local).view(1, -1, 1), -1).view(-1, 1)
    order = sort_tokens(ids, num_local)
    room = ranks * capacity
    batch, batch_rows, expert_num_tokens, dropped = batch_tokens(rows, *order, 1, room)
    assert dropped.tolist() == [0] * num_local
    local = slice(rank * num_local, (rank + 1) * num_local)
    empty = batch.new_empty(0)
    out = BatchedTritonExperts(room, layer.w1_bias[local], layer.w2_bias[local]).apply(
        poison(batch, expert_num_tokens),
        layer.w1[local],
        layer.w2[local],
        ids,
        *("silu", -1, *[None] * 7),
        workspace13=empty,
        workspace2=empty,
        expert_num_tokens=expert_num_tokens,
    )
    out = poison(out, expert_num_tokens)
    # One slot a row, as it was received; zeros in rows without a token.
    return reduce_batch(out, torch.ones(len(rows), 1), batch_rows, False).view(received.shape)


@pytest.mark.parametrize("capacity", [2, 5, 40])
@pytest.mark.parametrize("sizes", [(9, 9), (0, 17), (5, 1, 30, 0)], ids=str)
@pytest.mark.parametrize("routing", ["random", "one", "empty"])
def test_exchange_with_a_static_capacity(routing: str, sizes: tuple[int, ...], capacity: int) -> None:
    """Each rank's tokens get what the whole layer gives, but for slots over capacity, which each rank counts."""
    ranks = len(sizes)
    whole = make_layer(M=1, E=2 * ranks, biased=True)
    layers = [make_layer(M=m, E=2 * ranks, routing=routing) for m in sizes]
    for layer in layers:
        for name in ("w1", "w2", "w1_bias", "w2_bias"):
            setattr(layer, name, getattr(whole, name))
    sent, counts, rows, dropped = [], [], [], []
    for layer in layers:
        order = sort_tokens(layer.topk_ids, 2 * ranks)
        batch, batch_rows, num_tokens, num_dropped = batch_tokens(layer.hidden_states, *order, 2, capacity)
        sent.append(poison(batch, num_tokens))
        counts.append(num_tokens)
        rows.append(batch_rows)
        dropped.append(num_dropped)
    results = [
        experts_of_rank(whole, received, num_tokens, rank, capacity)
        for rank, (received, num_tokens) in enumerate(zip(exchanged(sent), exchanged(counts), strict=True))
    ]
    for rank, layer in enumerate(layers):
        # What each rank computed of this one's tokens.
        back = torch.cat([result[rank] for result in results])
        remaining = kept(layer, capacity)
        assert_as_accurate(reduce_batch(back, layer.topk_weights, rows[rank]), remaining.layer)
        assert dropped[rank].tolist() == remaining.num_dropped
