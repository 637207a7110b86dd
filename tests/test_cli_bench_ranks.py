"""``compile-moe bench-ranks``: what it refuses. Its measurements: test_expert_parallel.py."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from compile_moe.cli import app

SHAPE = ("--hidden-size", "64", "--intermediate-size", "32", "--num-experts", "8", "--topk", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "bench-ranks runs on every rank: torchrun --nproc-per-node=2 -m compile_moe bench-ranks"),
        (("--tokens", "0"), "--tokens must be at least 1, got 0"),
        (("--dispatch", "pigeons"), "--dispatch must be of all_to_all, all_gather, batched"),
        (("--skew", "-1"), "--skew must not be negative, got -1"),
        (("--topk", "9"), "--topk must be at most --num-experts, got 9 of 8"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str) -> None:
    printed = CliRunner().invoke(app, ["bench-ranks", *SHAPE, *arguments], env={"COLUMNS": "200"})
    assert printed.exit_code == 2 and message in printed.stderr
