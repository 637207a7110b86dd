"""The search of ``compile-moe tune``: which tile is the fastest for one GEMM at one number of tokens."""

from __future__ import annotations

import functools
import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from compile_moe.cli.language_model import one_line
from compile_moe.cli.refusal import Refusal
from compile_moe.cli.timing import seconds_per_call
from compile_moe.cli.tune_journal import Journal, Outcome
from compile_moe.cli.tune_steps import neighbours, starts
from compile_moe.ops.tuning import Gemm, GemmProblem, Tile

#: Seconds of one of the GEMMs with a tile; they are the same but for the routing.
Timer = Callable[[Sequence[Gemm], Tile], float]
#: Largest difference from the heuristic tile's result, relative, in the L2 norm. Both are float32 sums, rounded once.
_MOST_DIFFERENCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
#: The best of one measurement each are measured again, in turns with the heuristic's tile: the least of many
#: measurements is partly luck.
_FINALISTS = 4
_ROUNDS = 3
#: Neighbours of so many of the fastest tiles that have some are measured.
_LEADERS = 2
#: Another tile must be this much faster than the heuristic's.
_LEAST_GAIN = 0.01


class Case(Protocol):
    """One GEMM at one number of tokens."""

    @property
    def problem(self) -> GemmProblem: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def heuristic_tile(self) -> Tile: ...
    def tiles(self) -> tuple[Tile, ...]: ...
    def compile(self, tiles: Sequence[Tile]) -> None: ...
    def measure(self, tile: Tile) -> tuple[float, ...]: ...


class Found(NamedTuple):
    """The result of a search; seconds are means over the kinds of routing."""

    problem: GemmProblem
    num_slots: int
    heuristic_tile: Tile
    heuristic_seconds: float
    tile: Tile
    seconds: float
    num_failed: int


def time_on_device(gemms: Sequence[Gemm], tile: Tile) -> float:
    """On a GPU as a CUDA graph of all of them, with a small kernel behind each, whose time is taken off: behind itself
    a GEMM would start while its own last programs run (programmatic dependent launch). Behind that kernel none does,
    though in a layer it starts while the kernel ahead ends.
    """
    device = gemms[0].out.device
    calls = [lambda gemm=gemm: gemm.run(tile) for gemm in gemms]
    if device.type != "cuda":
        return seconds_per_call(calls, device, False)
    between = torch.zeros(1, device=device)
    apart = [part for call in calls for part in (call, between.neg_)]
    # The shortest time that is one: noise can't make it 0 or less.
    return max(2 * seconds_per_call(apart, device, True) - _seconds_between(device, len(calls)), 1e-9)


@functools.cache
def _seconds_between(device: torch.device, times: int) -> float:
    """Of the small kernel; measured once, so that its noise is in all timings alike."""
    return seconds_per_call([torch.zeros(1, device=device).neg_] * times, device, True)


class DeviceCase:
    """A case on this machine's device.

    Args:
        kinds: for each kind of routing, the GEMM on several routings.
    """

    def __init__(self, kinds: Sequence[Sequence[Gemm]], timer: Timer = time_on_device) -> None:
        self._kinds = kinds
        self._timer = timer
        self._expected: list[Tensor] = []
        first = kinds[0][0]
        self.problem = first.problem
        self.num_slots = first.num_slots
        self.heuristic_tile = first.heuristic_tile
        self.tiles = first.tiles

    def compile(self, tiles: Sequence[Tile]) -> None:
        """In threads. What fails here fails again, by itself, when it is measured."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for attempt in [pool.submit(self._kinds[0][0].compile, tile) for tile in tiles]:
                attempt.exception()

    def measure(self, tile: Tile) -> tuple[float, ...]:
        """Seconds for each kind of routing.

        Raises:
            ValueError: a result that differs from the heuristic tile's; it is not timed.
            Exception: whatever compiling or launching raises.
        """
        if not self._expected:
            self._expected = [self._result(gemms[0], self.heuristic_tile) for gemms in self._kinds]
        for gemms, expected in zip(self._kinds, self._expected, strict=True):
            difference = float((self._result(gemms[0], tile) - expected).norm() / expected.norm())
            if not difference <= _MOST_DIFFERENCE[gemms[0].out.dtype]:
                raise ValueError(f"wrong result, by {difference:.1e}")
        return tuple(self._timer(gemms, tile) for gemms in self._kinds)

    def _result(self, gemm: Gemm, tile: Tile) -> Tensor:
        gemm.out.fill_(torch.nan)  # what is not written shows
        gemm.run(tile)
        return gemm.out.float() if gemm.out.dtype is not torch.float32 else gemm.out.clone()


class _Measurements:
    """Outcomes of one case, from the journal or measured."""

    def __init__(self, case: Case, journal: Journal, on_progress: Callable[[str, int, int], None]) -> None:
        self._case = case
        self._journal = journal
        self._on_progress = on_progress
        self._key = case.problem.gemm, case.num_slots
        self.outcomes: dict[Tile, Outcome] = {}

    def add(self, tiles: Sequence[Tile]) -> None:
        """Raises: as :func:`search`."""
        known = {tile: self._journal.get(*self._key, tile) for tile in tiles if tile not in self.outcomes}
        self.outcomes.update({tile: outcome for tile, outcome in known.items() if outcome is not None})
        left = [tile for tile, outcome in known.items() if outcome is None]
        done = len(self.outcomes)
        self._on_progress("compiling", done, done + len(left))
        self._case.compile(left)
        for i, tile in enumerate(left):
            self._on_progress("timing", done + i, done + len(left))
            outcome = _outcome(self._case, tile)
            self._journal.add(*self._key, tile, outcome)
            _check_device(outcome, tile)
            self.outcomes[tile] = outcome
        heuristic = self._case.heuristic_tile
        if not self.outcomes[heuristic].seconds:
            raise Refusal(
                f"{self._key[0]} can't be tuned for {self._key[1]} slots, because it fails with the tile it has "
                f"without tuning, {heuristic}: {self.outcomes[heuristic].failure}; please report this"
            )

    def ranked(self) -> list[Tile]:
        """Those that ran, fastest first."""
        baseline = self.outcomes[self._case.heuristic_tile].seconds
        ran = [tile for tile, outcome in self.outcomes.items() if outcome.seconds]
        return sorted(ran, key=lambda tile: _ratio(self.outcomes[tile].seconds, baseline))


def search(
    case: Case,
    journal: Journal,
    on_progress: Callable[[str, int, int], None],
    exhaustive: bool = False,
) -> Found:
    """Measure tiles, from the heuristic's tile and ones of other kinds to their neighbours as long as that brings
    faster ones, or all tiles; then the best ones again. What the journal knows isn't measured.

    Args:
        on_progress: called with what is being done, tiles done and tiles in sight.

    Raises:
        Refusal: the heuristic's tile fails, or the device does.
    """
    heuristic = case.heuristic_tile
    tiles = tuple(dict.fromkeys([heuristic, *case.tiles()]))
    measurements = _Measurements(case, journal, on_progress)
    if exhaustive:
        measurements.add(tiles)
    else:
        next_tiles = starts(heuristic, tiles)
        while not all(tile in measurements.outcomes for tile in next_tiles):
            measurements.add(next_tiles)
            around = (near for tile in measurements.ranked() if (near := neighbours(tile, tiles)))
            next_tiles = [tile for near in itertools.islice(around, _LEADERS) for tile in near]
    ranked, done = measurements.ranked(), len(measurements.outcomes)
    finalists = list(dict.fromkeys([heuristic, *ranked[:_FINALISTS]]))
    on_progress("timing the best again", done, done)
    rounds = [{tile: case.measure(tile) for tile in finalists} for _ in range(_ROUNDS)]
    ratios = {
        tile: statistics.median(_ratio(each[tile], each[heuristic]) for each in rounds) for tile in finalists
    }
    best = min(finalists, key=lambda tile: ratios[tile])
    if ratios[best] > 1 - _LEAST_GAIN:
        best = heuristic
    heuristic_seconds = statistics.median(statistics.mean(each[heuristic]) for each in rounds)
    seconds = statistics.median(statistics.mean(each[best]) for each in rounds)
    num_failed = done - len(ranked)
    return Found(case.problem, case.num_slots, heuristic, heuristic_seconds, best, seconds, num_failed)


def _outcome(case: Case, tile: Tile) -> Outcome:
    try:
        return Outcome(seconds=case.measure(tile))
    except torch.OutOfMemoryError:  # of the inputs, not of the tile
        raise
    except Exception as error:  # whatever a compiler or a driver raises for this tile
        return Outcome(failure=f"{type(error).__name__}: {one_line(error)[:200]}")


def _check_device(outcome: Outcome, tile: Tile) -> None:
    """Some errors leave the whole process without its GPU."""
    if not outcome.failure or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise Refusal(
            f"{tile} made the device fail ({outcome.failure}); run the same command again: it skips this tile and "
            "goes on behind it"
        ) from error


def _ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Mean over the kinds of routing."""
    return statistics.mean(s / b for s, b in zip(seconds, baseline, strict=True))
