"""Which rank holds which experts, and computes which slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compile_moe import AllToAllPrepareAndFinalize, ExpertPlacement

PLACEMENTS = {
    "linear": ExpertPlacement.linear(7, 3),
    "round_robin": ExpertPlacement.round_robin(7, 3),
    "explicit": ExpertPlacement(4, [[3], [0, 2, 1]]),
    "replicated": ExpertPlacement.linear(5, 3).with_copies({0: [1, 2], 4: [0]}),
    "one-rank": ExpertPlacement.linear(4, 1),
}


def test_usual_placements() -> None:
    assert PLACEMENTS["linear"].local_experts == ((0, 1, 2), (3, 4), (5, 6))
    assert PLACEMENTS["round_robin"].local_experts == ((0, 3, 6), (1, 4), (2, 5))
    assert PLACEMENTS["replicated"].local_experts == ((0, 1, 4), (2, 3, 0), (4, 0))
    assert [name for name, each in PLACEMENTS.items() if each.is_replicated] == ["replicated"]


@pytest.mark.parametrize("name", PLACEMENTS)
def test_maps_name_the_rows_of_a_ranks_weights(name: str) -> None:
    placement = PLACEMENTS[name]
    for rank, local in enumerate(placement.local_experts):
        expert_map = placement.expert_map(rank)
        assert expert_map.dtype is torch.int32 and expert_map.shape == (placement.num_experts,)
        assert expert_map[list(local)].tolist() == list(range(len(local)))
        assert (expert_map >= 0).sum() == len(local) and expert_map.min() >= -1


@pytest.mark.parametrize("name", PLACEMENTS)
def test_places_are_those_of_all_copies(name: str) -> None:
    """Rank by rank: where an expert's copies are, and where it is found in that order."""
    placement = PLACEMENTS[name]
    tables = placement.owner_tables()
    copies = [(rank, e) for rank, local in enumerate(placement.local_experts) for e in local]
    for expert in range(placement.num_experts):
        found = [(r, p) for r, p in zip(tables.ranks[expert], tables.places[expert], strict=True) if p >= 0]
        assert [copies[p] for _, p in found] == [(r, expert) for r, _ in found]
        assert len(found) == [e for _, e in copies].count(expert)
    ids = torch.arange(placement.num_experts).repeat(3, 1)
    owners, places = tables.owners(ids, 1), tables.owner_places(ids, 1)
    assert [copies[p][0] for p in places.flatten()] == owners.flatten().tolist()


@pytest.mark.parametrize("name", PLACEMENTS)
def test_one_rank_computes_a_slot(name: str) -> None:
    placement = PLACEMENTS[name]
    ids = torch.randint(-2, placement.num_experts + 3, (300, 3))
    owners = placement.owner_tables().owners(ids, first_token=2)
    for expert, owner in zip(ids.flatten().tolist(), owners.flatten().tolist(), strict=True):
        if 0 <= expert < placement.num_experts:
            assert expert in placement.local_experts[owner]
        else:
            assert owner == -1


def test_copies_take_tokens_in_turn() -> None:
    owners = PLACEMENTS["replicated"].owner_tables().owners(torch.zeros(7, 1, dtype=torch.int32), 1)
    assert owners.flatten().tolist() == [1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ExpertPlacement(2, []), ValueError, "at least one rank, got none"),
        (lambda: ExpertPlacement(2, [[0, 1], []]), ValueError, "got none for rank 1 of 2"),
        (lambda: ExpertPlacement(2, [[0], [2]]), ValueError, "got 2 on rank 1"),
        (lambda: ExpertPlacement(2, [[0, 1, 0]]), ValueError, "got 0 twice on rank 0"),
        (lambda: ExpertPlacement(9, [[0]]), ValueError, "got none for 1, 2, 3, 4, 5 and 3 more"),
        (lambda: ExpertPlacement(0, [[0]]), ValueError, "num_experts must be at least 1, got 0"),
        (lambda: ExpertPlacement(2, [0, 1]), TypeError, "a sequence of ids for each rank"),
        (lambda: ExpertPlacement(2, [[0.0, 1.0]]), TypeError, "an expert id"),
        (lambda: ExpertPlacement.linear(2, 3), ValueError, "got 2 experts for 3 ranks"),
        (lambda: ExpertPlacement.round_robin(2, 0), ValueError, "num_ranks must be at least 1, got 0"),
        (lambda: PLACEMENTS["linear"].with_copies({0: [3]}), ValueError, "got rank 3 for expert 0"),
        (lambda: PLACEMENTS["linear"].expert_map(3), ValueError, "rank must be in 0 … 2, got 3"),
    ],
)
def test_bad_placements(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_without_a_group() -> None:
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        AllToAllPrepareAndFinalize(PLACEMENTS["linear"])
    with pytest.raises(TypeError, match=r"must be a compile_moe\.ExpertPlacement, got list"):
        AllToAllPrepareAndFinalize([[0], [1]])  # type: ignore[arg-type]
