"""What ``compile-moe tune`` runs: experts of models and of given sizes, and routing."""

from __future__ import annotations

import pytest
import torch

from compile_moe.cli.moe_layer import configuration
from compile_moe.cli.refusal import Refusal
from compile_moe.cli.tune_inputs import Experts, experts_of_model, experts_of_sizes, make_routing
from compile_moe.ops.tuning import Shape

CPU = torch.device("cpu")


@pytest.mark.parametrize(("skew", "fewest", "most"), [(0.0, 125, 160), (0.5, 200, 320), (2.0, 450, 500)])
def test_routing(skew: float, fewest: int, most: int) -> None:
    """The rows of the most popular expert; no expert twice for a token."""
    experts = Experts(Shape(16, 8, 8), topk=4)
    slots, offsets = make_routing(experts, 500, skew, 0, CPU)
    assert sorted(slots.tolist()) == list(range(2000)) and offsets[-1] == 2000
    assert fewest <= offsets.diff().max() <= most
    assert not torch.equal(offsets, make_routing(experts, 500, skew, 1, CPU)[1])


def test_experts_of_models() -> None:
    pytest.importorskip("transformers")
    assert experts_of_model(configuration("qwen3-30b-a3b")) == Experts(Shape(128, 2048, 768), 8)
    assert experts_of_model(configuration("gpt-oss-20b")) == Experts(
        Shape(32, 2880, 2880), 4, "interleaved", transposed=True, biased=True
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((64, 32, 4, 5), "--topk must be at most --num-experts, got 5 of 4"),
        ((0, 32, 4, 2), "--hidden-size must be"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        experts_of_sizes(*sizes)
