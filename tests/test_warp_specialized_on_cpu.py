"""Small functions of the warp-specialized kernels, computed on a CPU: numbers and indices, not who holds or waits."""

from __future__ import annotations

import pytest
import torch

from compile_moe.ops.kernels.warp_specialized import consumer, ring, store
from tests.support.gluon_on_cpu import Program, SharedMemory, Value, on_cpu


def test_consumers_get_the_tile_that_was_announced() -> None:
    program = Program()
    announce, announced = (
        on_cpu(function, program, {}) for function in (ring.announce_tile, ring.announced_tile)
    )
    memory = SharedMemory(torch.full((4, 4), -1))
    tiles = {stage: torch.randint(0, 2**31, (4,)).tolist() for stage in (2, 0, 3)}
    for stage, tile in tiles.items():
        announce(memory, stage, tuple(map(Value, tile)))
    for stage, tile in tiles.items():
        assert [int(each) for each in announced(memory, stage)] == tile
    assert (memory.data[1] == -1).all(), "a stage in which no tile begins"


@pytest.mark.parametrize("tails", [True, False])
def test_every_tile_is_of_one_kind_and_its_end_of_none(tails: bool) -> None:
    kinds = range(0, 6, 1 if tails else 2)
    for rows in range(289 if tails else 257):
        (kind,) = (kind for kind in kinds if consumer.is_kind.fn(rows, kind, tails))
        assert (64 << kind // 2) + kind % 2 * 32 >= rows
    assert not any(consumer.is_kind.fn(-1, kind, tails) for kind in kinds)


def exchanged(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``store.exchange_pairs`` does to rows 0..7 and 8..15 of each 16, (.., 8, T): a row is four threads'."""
    gate, up = low.clone(), high.clone()
    gate[..., 1::2, :], up[..., ::2, :] = high[..., ::2, :], low[..., 1::2, :]
    return gate, up


def test_gates_and_ups_in_turn_end_in_the_order_of_their_columns() -> None:
    tokens, columns = 32, 32
    pair = torch.arange(columns).repeat_interleave(2).view(4, 2, 8, 1).expand(-1, -1, -1, tokens)
    is_up = (torch.arange(2 * columns) % 2).view(4, 2, 8, 1).expand_as(pair)
    gates, ups = exchanged(pair[:, 0] * 2 + is_up[:, 0], pair[:, 1] * 2 + is_up[:, 1])
    assert (gates % 2 == 0).all() and (ups == gates + 1).all(), "a gate and the up that belongs to it"
    results = Value((gates // 2).reshape(columns, tokens).T)
    in_order = on_cpu(store.in_order, Program(), {})(results)
    assert torch.equal(in_order.data, torch.arange(columns).expand(tokens, -1))
