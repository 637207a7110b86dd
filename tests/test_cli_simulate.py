"""``compile-moe simulate``: its costs by hand on small cases, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from compile_moe.cli import app
from compile_moe.cli.bench_results import Measurement, Results, Work, as_json
from compile_moe.cli.simulate_cost import Kernels, Layer, Links, _exchange, kernels_of_bench, simulate_layer
from compile_moe.cli.timing import Ceilings
from compile_moe.cli.tune_inputs import experts_of_sizes

EXPERTS = experts_of_sizes(hidden_size=100, intermediate_size=10, num_experts=8, topk=2)
CEILINGS = Ceilings(1e12, 1e9)
KERNELS = Kernels(CEILINGS, 5e-6, ((1.0, 0.5),))
LINKS = Links(node_size=2, node_bandwidth=1e9, network_bandwidth=1e8, node_latency=1e-6, network_latency=1e-5)
SHAPE = ("--hidden-size", "64", "--intermediate-size", "32", "--num-experts", "8", "--topk", "2")


def layer(num_ranks: int, tokens: int = 50, skew: float = 0.0, **changed: Any) -> Layer:
    options: dict[str, Any] = {
        "kernels": KERNELS,
        "links": LINKS,
        "dispatched_bytes": 200.0,
        "combined_bytes": 200.0,
        "weight_bytes": 2.0,
        "seed": 3,
    }
    return simulate_layer(EXPERTS, num_ranks, tokens, skew, **(options | changed))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments], env={"COLUMNS": "200"})


def test_one_rank_has_the_experts_alone() -> None:
    alone = layer(1)
    weights = 8 * 3 * 100 * 10 * 2
    floor = (weights + 50 * 400) / CEILINGS.bandwidth
    assert (alone.dispatch, alone.combine, alone.imbalance) == (0, 0, 1)
    assert alone.experts == pytest.approx(5e-6 + floor / 0.5)


def test_an_exchange_is_its_busiest_rank() -> None:
    sent = torch.tensor([[9, 3, 2, 0], [1, 9, 0, 0], [0, 0, 9, 7], [0, 4, 0, 9]]) * 1e3
    # Rank 2 sends 7 to its node; rank 1 gets 4 from the other.
    assert _exchange(sent, LINKS) == pytest.approx(1e-5 + max(7e3 / 1e9, 4e3 / 1e8))
    assert _exchange(sent[:2, :2], LINKS) == pytest.approx(1e-6 + 3e3 / 1e9)
    assert _exchange(sent, LINKS._replace(node_size=4)) == pytest.approx(1e-6 + 7e3 / 1e9)


def test_a_token_travels_once_to_each_rank() -> None:
    everywhere = experts_of_sizes(hidden_size=100, intermediate_size=10, num_experts=8, topk=8)
    result = simulate_layer(everywhere, 2, 50, 0.0, KERNELS, LINKS, 200.0, 100.0, 2.0, 0)
    assert result.dispatch == pytest.approx(1e-6 + 50 * 200 / 1e9)
    assert result.combine == pytest.approx(1e-6 + 50 * 100 / 1e9)
    assert result.imbalance == 1


def test_or_to_all_ranks() -> None:
    gathered, sent = (layer(4, exchange=exchange) for exchange in ("all_gather", "all_to_all"))
    links = LINKS._replace(node_size=4)
    near = layer(4, exchange="all_gather", links=links)
    assert near.dispatch == pytest.approx(1e-6 + 3 * 50 * 200 / 1e9) == near.combine
    assert gathered.dispatch > sent.dispatch and gathered.imbalance == sent.imbalance


@pytest.mark.parametrize("num_ranks", [2, 8, 32])
def test_skew_makes_one_rank_busy(num_ranks: int) -> None:
    even, skewed = (layer(num_ranks, tokens=400, skew=skew) for skew in (0.0, 2.0))
    assert 1 <= even.imbalance < 1.3 < skewed.imbalance <= num_ranks
    assert skewed.experts >= even.experts and skewed.dispatch > even.dispatch
    assert layer(num_ranks, tokens=400, skew=2.0) == skewed, "the same seed"


def test_copies_share_an_experts_tokens() -> None:
    """With four ranks an expert and one favourite, its four copies have the same load."""
    one = layer(8, tokens=400, skew=9.0)
    shared = layer(32, tokens=100, skew=9.0)
    assert one.imbalance == pytest.approx(4, rel=0.01)  # a token has two experts
    assert shared.imbalance == pytest.approx(4, rel=0.05)
    assert shared.experts < one.experts


def test_no_tokens() -> None:
    assert layer(4, tokens=0).experts == KERNELS.overhead


def test_kernels_of_a_bench(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    works = Work(10**6, 1e6), Work(10**9, 1e6), Work(10**12, 1e6)
    times = (1000.0, 1, 1009.0), (1000.0, 2, 2009.0), (1e6, 3, 4e6 + 9)
    measured = [
        Measurement("compile_moe", 8, tokens, microseconds, work=work, floor=floor)
        for work, (floor, tokens, microseconds) in zip(works, times, strict=True)
    ]
    others = Measurement("grouped_mm", 8, 1, 5.0, work=works[0], floor=1.0), Measurement("compile_moe", 8, 9)
    results = Results("H100", {}, "a model", "experts", "bfloat16", CEILINGS, (*measured[::-1], *others))
    file.write_text(json.dumps(as_json(results)))
    kernels = kernels_of_bench(file)
    assert kernels.ceilings == CEILINGS and kernels.overhead == pytest.approx(9e-6)
    assert torch.tensor(kernels.shares).flatten().tolist() == pytest.approx([1, 1, 1e3, 0.5, 1e6, 0.25])
    shares = [kernels.share(intensity) for intensity in (0.1, 1.0, 1e3**0.5, 1e3, 1e9)]
    assert shares == pytest.approx([1, 1, 0.75, 0.5, 0.25])
    # What was measured comes out again.
    for work, (_, _, microseconds) in zip(works[:2], times[:2], strict=True):
        assert kernels.seconds(work) == pytest.approx(microseconds * 1e-6)
    printed = run(*SHAPE, "--ranks", "1,2", "--kernels", str(file))
    assert printed.exit_code == 0 and "overhead 9.0 µs" in " ".join(printed.output.split())


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "ranks.png"
    printed = run(*SHAPE, "--ranks", "1,2,16", "--tokens", "7", "--skew", "0,1", "--plot", str(picture))
    assert printed.exit_code == 0, printed.output
    rows = [line.split("│")[1:-1] for line in printed.output.splitlines() if line.startswith("│")]
    assert [(int(ranks), float(skew)) for skew, ranks, *_ in rows] == [
        (ranks, skew) for skew in (0, 1) for ranks in (1, 2, 16)
    ]
    assert "given, not measured" in " ".join(printed.output.split())
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "3"), "--ranks must divide the 8 experts or be a multiple of them, got 3"),
        (("--ranks", "8,0"), "--ranks must be at least 1, got 0"),
        (("--tokens", "0"), "--tokens must be at least 1, got 0"),
        (("--network-bandwidth", "0"), "--network-bandwidth must be positive, got 0"),
        (("--node-latency", "-1"), "--node-latency must not be negative, got -1"),
        (("--skew", "nan"), "--skew must not be negative, got nan"),
        (("--dispatch", "int3"), "--dispatch must be of bfloat16, float8, got int3"),
        (("--exchange", "mail"), "--exchange must be of all_to_all, all_gather, got mail"),
        (("--kernels", "missing.json"), "--kernels missing.json can't be read"),
        (("--plot", "ranks.txt"), "--plot must name a file"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str) -> None:
    printed = run(*SHAPE, *arguments)
    assert printed.exit_code == 2 and message in printed.stderr


def test_a_bench_without_our_experts(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(as_json(Results("H100", {}, "a model", "block", "bfloat16", CEILINGS))))
    printed = run(*SHAPE, "--kernels", str(file))
    assert printed.exit_code == 2 and "has no times of the contestant compile_moe" in printed.stderr
