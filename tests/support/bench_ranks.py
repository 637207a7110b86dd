"""``compile-moe bench-ranks`` on ranks of a test."""

from __future__ import annotations

import json
from unittest import mock

import torch

from compile_moe.cli import rank_timing, timing
from compile_moe.cli.bench_ranks import DISPATCHES, BenchRanksOptions, measure_ranks
from compile_moe.cli.bench_ranks_results import as_json, table
from compile_moe.cli.rank_timing import Ranks
from compile_moe.cli.tune_inputs import experts_of_sizes

TOKENS = 1, 20
K, TOPK = 32, 2


def measure_on_ranks(rank: int, num_ranks: int, seed: int) -> None:
    """Two sizes, with favourite experts; the same numbers on every rank."""
    experts = experts_of_sizes(hidden_size=K, intermediate_size=16, num_experts=8, topk=TOPK)
    options = BenchRanksOptions(tokens=TOKENS, skew=1.0, seed=seed % 1000, compiled=False)
    repetitions = mock.patch.object(rank_timing, "_REPETITIONS", 3)
    with repetitions, mock.patch.object(timing, "_SECONDS", 0.0):
        results = measure_ranks("tiny", experts, options, Ranks(rank, num_ranks, torch.device("cpu")))
    assert [(m.tokens, m.dispatch_by) for m in results.measurements] == [
        (tokens, dispatch) for tokens in TOKENS for dispatch in DISPATCHES
    ]
    for m in results.measurements:
        assert m.replayed is None and m.layer == m.eager > 0 and m.alone > 0 and m.dispatch > 0
        assert m.raw_dispatch > 0 and m.raw_combine > 0 and m.error < 1e-4
        assert (m.simulated is None) == (m.dispatch_by == "batched")
        if m.dispatch_by == "batched":
            assert m.dispatch_bytes == m.combine_bytes and m.dispatch_bytes % (K * 4 * 4) == 0
            continue
        # To one other rank: no more than all tokens.
        most = m.tokens * (K * 4 + TOPK * 8)
        assert m.dispatch_bytes == most or (m.dispatch_by == "all_to_all" and m.dispatch_bytes <= most)
        assert m.combine_bytes * (K * 4 + TOPK * 8) == m.dispatch_bytes * K * 4
    assert table(results).row_count == len(results.measurements)
    assert json.loads(json.dumps(as_json(results)))["num_ranks"] == num_ranks
