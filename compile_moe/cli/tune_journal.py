"""What an interrupted run of ``compile-moe tune`` had measured: one JSON line for each tile."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from compile_moe.ops.tuning import Tile, record


class Outcome(NamedTuple):
    """Of measuring a tile: seconds for each kind of routing, or why there are none."""

    seconds: tuple[float, ...] = ()
    failure: str = ""


class Journal:
    """Outcomes by GEMM, number of slots and tile, kept in a file. A line that was cut off counts as not measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._outcomes: dict[tuple[str, int, Tile], Outcome] = {}
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            text = ""
        for line in text.splitlines():
            try:
                self._outcomes.update([_parse(line)])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        self._file = path.open("a", encoding="utf-8")
        if text and not text.endswith("\n"):
            self._file.write("\n")

    def __len__(self) -> int:
        return len(self._outcomes)

    def get(self, gemm: str, num_slots: int, tile: Tile) -> Outcome | None:
        return self._outcomes.get((gemm, num_slots, tile))

    def add(self, gemm: str, num_slots: int, tile: Tile, outcome: Outcome) -> None:
        self._outcomes[gemm, num_slots, tile] = outcome
        entry = {"gemm": gemm, "slots": num_slots, "tile": tile._asdict(), **outcome._asdict()}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Nothing is left to do: the next run measures everything again."""
        self.close()
        self.path.unlink(missing_ok=True)


def _parse(line: str) -> tuple[tuple[str, int, Tile], Outcome]:
    entry: dict[str, Any] = json.loads(line)
    outcome = Outcome(tuple(map(float, entry["seconds"])), str(entry["failure"]))
    if not outcome.failure and not outcome.seconds:
        raise ValueError("neither seconds nor a failure")
    if not all(seconds > 0 and math.isfinite(seconds) for seconds in outcome.seconds):
        raise ValueError("seconds must be positive")
    return (str(entry["gemm"]), int(entry["slots"]), record(Tile, entry["tile"])), outcome
