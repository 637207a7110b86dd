"""``compile-moe tune`` with the real kernels, interpreted: results are compared, times are the interpreter's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from compile_moe.cli import timing, tune
from compile_moe.cli.tune import TuneOptions
from compile_moe.cli.tune_inputs import Experts
from compile_moe.cli.tune_search import time_on_device
from compile_moe.ops.kernels import tile_space
from compile_moe.ops.tuning import Gemm, Shape, Tile
from tests.support.tuned_device import tuned_device

CHOICES = {
    "block_m": (16, 32),
    "block_n": (32, 64),
    "block_k": (64, 128),
    "num_stages": (3,),  # nothing to an interpreter
    "num_warps": (4,),
    "swapped": (False, True),
}


@pytest.mark.parametrize(
    "experts",
    [
        Experts(Shape(2, 64, 32), topk=2),
        Experts(Shape(2, 64, 32), topk=2, layout="interleaved", transposed=True, biased=True),
        Experts(Shape(3, 40, 33), topk=1, layout="ungated"),
    ],
    ids=lambda experts: experts.layout,
)
def test_every_tile_gives_the_same(experts: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_space, "_CHOICES", CHOICES)
    timed: list[Tile] = []

    def timer(gemms: Sequence[Gemm], tile: Tile) -> float:
        timed.append(tile)
        return 1.0 / tile.block_n

    with tuned_device(tmp_path):
        options = TuneOptions(tokens=(1, 20))
        found, _ = tune.tune(experts, options, tmp_path, torch.bfloat16, torch.device("cpu"), timer)
    assert len(found) == 4 and len(set(timed)) >= 4
    assert all(each.num_failed == 0 for each in found)


def test_times_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    with tuned_device(tmp_path):
        experts = Experts(Shape(2, 16, 16), topk=1)
        weights = tune.make_weights(experts, "gather_gemm", torch.float32, torch.device("cpu"))
        (gemms,) = tune.make_gemms(experts, "gather_gemm", weights, 1, (0.5,))
    assert 0 < time_on_device(gemms[:2], gemms[0].heuristic_tile) < 10
