"""Which rank of a group holds which experts, and which rank computes a slot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compile_moe.ops.problem_size import require_int


class OwnerTables(NamedTuple):
    """Where each expert lies, on a device: what :meth:`owners` and :meth:`owner_places` look up.

    ranks: (num_experts, most copies of an expert) int64, the ranks of an expert's copies, then -1; num_copies:
    (num_experts,) int64, or None where every expert has one; places: as ranks, where a copy is among all copies in the
    order of (rank, local expert).
    """

    ranks: Tensor
    num_copies: Tensor | None
    places: Tensor

    def owners(self, topk_ids: Tensor, first_token: int = 0) -> Tensor:
        """The rank that computes each slot: (M, topk) int64, -1 where the id names no expert.

        Token t takes copy ``(first_token + t) % copies`` of an expert: one rank computes a slot, and copies share the
        load.
        """
        return self._of_copies(self.ranks, topk_ids, first_token)

    def owner_places(self, topk_ids: Tensor, first_token: int = 0) -> Tensor:
        """As :meth:`owners`, the place of the copy that computes each slot."""
        return self._of_copies(self.places, topk_ids, first_token)

    def _of_copies(self, table: Tensor, topk_ids: Tensor, first_token: int) -> Tensor:
        ids = topk_ids.long()
        is_known = (ids >= 0) & (ids < table.size(0))
        ids = torch.where(is_known, ids, 0)
        if self.num_copies is None:
            values = table[ids, 0]
        else:
            tokens = torch.arange(ids.size(0), device=ids.device) + first_token
            values = table[ids, tokens.unsqueeze(1) % self.num_copies[ids]]
        return torch.where(is_known, values, -1)


@dataclass(frozen=True)
class ExpertPlacement:
    """The experts of each rank. The constructor takes any placement; ``linear`` and ``round_robin`` make usual ones.

    Args:
        num_experts: number of experts in the global id space.
        local_experts: for each rank, the global ids of its experts in the order of its weights: rank r's w1 is
            ``w1[list(local_experts[r])]``. Every rank has an expert, and every expert a rank; an expert on several
            ranks is replicated, and each of its slots is computed by one of them.

    Raises:
        ValueError, TypeError: ids out of range or twice on a rank, a rank without experts, an expert without a rank.

    Example:
        >>> from compile_moe import ExpertPlacement
        >>> ExpertPlacement.round_robin(5, 2).local_experts
        ((0, 2, 4), (1, 3))
        >>> ExpertPlacement.linear(5, 2).with_copies({0: [1]}).expert_map(1)
        tensor([ 2, -1, -1,  0,  1], dtype=torch.int32)
    """

    num_experts: int
    local_experts: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        _require_positive("num_experts", self.num_experts)
        ranks = _as_tuples(self.local_experts)
        object.__setattr__(self, "local_experts", ranks)
        if not ranks:
            raise ValueError("local_experts must list the experts of at least one rank, got none")
        for rank, experts in enumerate(ranks):
            if not experts:
                raise ValueError(
                    f"every rank must have an expert, got none for rank {rank} of {len(ranks)}; use fewer ranks, or "
                    "give it a copy of another rank's"
                )
            outside = [e for e in experts if not 0 <= e < self.num_experts]
            if outside:
                raise ValueError(
                    f"expert ids must be in 0 … {self.num_experts - 1} (num_experts = {self.num_experts}), got "
                    f"{outside[0]} on rank {rank}"
                )
            if len(set(experts)) != len(experts):
                twice = next(e for e in experts if experts.count(e) > 1)
                raise ValueError(f"a rank holds an expert once, got {twice} twice on rank {rank}")
        missing = sorted(set(range(self.num_experts)).difference(*ranks))
        if missing:
            raise ValueError(
                f"every one of {self.num_experts} experts must be on a rank, got none for {_listed(missing)}"
            )

    @classmethod
    def linear(cls, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """Consecutive experts on each rank. Where they don't divide evenly, the first ranks have one more."""
        _require_enough(num_experts, num_ranks)
        size, larger = divmod(num_experts, num_ranks)
        starts = [r * size + min(r, larger) for r in range(num_ranks + 1)]
        return cls(num_experts, [range(starts[r], starts[r + 1]) for r in range(num_ranks)])

    @classmethod
    def round_robin(cls, num_experts: int, num_ranks: int) -> ExpertPlacement:
        """Expert e on rank e % num_ranks: neighbours, which are often chosen together, on different ranks."""
        _require_enough(num_experts, num_ranks)
        return cls(num_experts, [range(r, num_experts, num_ranks) for r in range(num_ranks)])

    def with_copies(self, copies: Mapping[int, Iterable[int]]) -> ExpertPlacement:
        """This placement with experts on further ranks, behind those that the ranks have.

        Args:
            copies: for each expert to replicate, the ranks that get it, too.
        """
        ranks = [list(experts) for experts in self.local_experts]
        for expert, others in copies.items():
            for rank in others:
                if not 0 <= rank < len(ranks):
                    raise ValueError(
                        f"copies must go to ranks 0 … {len(ranks) - 1}, got rank {rank} for expert {expert}"
                    )
                ranks[rank].append(expert)
        return ExpertPlacement(self.num_experts, ranks)

    @property
    def num_ranks(self) -> int:
        return len(self.local_experts)

    @property
    def is_replicated(self) -> bool:
        """Whether an expert is on several ranks."""
        return sum(map(len, self.local_experts)) > self.num_experts

    def expert_map(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """A rank's expert_map: (num_experts,) int32, global to local ids, -1 for experts that it doesn't have."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank must be in 0 … {self.num_ranks - 1}, got {rank}")
        local = [-1] * self.num_experts
        for i, expert in enumerate(self.local_experts[rank]):
            local[expert] = i
        return torch.tensor(local, dtype=torch.int32, device=device)

    def owner_tables(self, device: torch.device | str | None = None) -> OwnerTables:
        """What is needed to find the rank of a slot on a device."""
        ranks: list[list[int]] = [[] for _ in range(self.num_experts)]
        places: list[list[int]] = [[] for _ in range(self.num_experts)]
        copies = [(rank, expert) for rank, experts in enumerate(self.local_experts) for expert in experts]
        for place, (rank, expert) in enumerate(copies):
            ranks[expert].append(rank)
            places[expert].append(place)
        most = max(map(len, ranks))

        def table(rows: list[list[int]]) -> Tensor:
            padded = [row + [-1] * (most - len(row)) for row in rows]
            return torch.tensor(padded, dtype=torch.int64, device=device)

        num_copies = None
        if most > 1:
            num_copies = torch.tensor([len(r) for r in ranks], dtype=torch.int64, device=device)
        return OwnerTables(table(ranks), num_copies, table(places))


def _as_tuples(local_experts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    try:
        ranks = tuple(tuple(experts) for experts in local_experts)
    except TypeError:
        raise TypeError(
            f"local_experts must be a sequence of ids for each rank, got {local_experts!r}"
        ) from None
    for experts in ranks:
        for expert in experts:
            require_int("an expert id", expert)
    return ranks


def _require_positive(name: str, value: int) -> None:
    require_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _require_enough(num_experts: int, num_ranks: int) -> None:
    _require_positive("num_experts", num_experts)
    _require_positive("num_ranks", num_ranks)
    if num_experts < num_ranks:
        raise ValueError(
            f"num_experts must be at least num_ranks, so that every rank has an expert, got {num_experts} experts for "
            f"{num_ranks} ranks; list copies in ExpertPlacement(num_experts, local_experts)"
        )


def _listed(numbers: list[int], most: int = 5) -> str:
    return ", ".join(map(str, numbers[:most])) + (f" and {len(numbers) - most} more" * (len(numbers) > most))
