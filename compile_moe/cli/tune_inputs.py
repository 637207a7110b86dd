"""What ``compile-moe tune`` runs: the experts of a model or of given sizes, their weights, tokens and routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from compile_moe.cli.moe_layer import columns_of, experts_of, make_layer
from compile_moe.cli.refusal import Refusal
from compile_moe.cli.routing import draw_ids, log_popularities
from compile_moe.ops import sort_tokens
from compile_moe.ops.named_activations import program_text
from compile_moe.ops.tuning import Gemm, Shape, gather, scatter

GEMMS = ("gather_gemm", "scatter_gemm")
#: Routings of each kind, so that the weights don't stay in the cache.
NUM_ROUTINGS = 8


class Experts(NamedTuple):
    """What of a model's experts decides on their tiles.

    layout: of gate and up, or "ungated". transposed: weights are stored as (E, K, N) and (E, I, K).
    """

    shape: Shape
    topk: int
    layout: str = "concatenated"
    transposed: bool = False
    biased: bool = False


#: An activation for each layout; which one it is changes little.
ACTIVATIONS = {"concatenated": "silu", "interleaved": "swigluoai", "ungated": "silu_no_mul"}


def experts_of_sizes(hidden_size: int, intermediate_size: int, num_experts: int, topk: int) -> Experts:
    """Experts with gate rows before up rows, without biases.

    Raises:
        Refusal: sizes that don't fit together.
    """
    for option, size in (
        ("--hidden-size", hidden_size),
        ("--intermediate-size", intermediate_size),
        ("--num-experts", num_experts),
        ("--topk", topk),
    ):
        if size < 1:
            raise Refusal(f"{option} must be at least 1, got {size}")
    if topk > num_experts:
        raise Refusal(f"--topk must be at most --num-experts, got {topk} of {num_experts}")
    return Experts(Shape(num_experts, hidden_size, intermediate_size), topk)


def experts_of_model(config: Any) -> Experts:
    """The experts of a model's first MoE layer; nothing is allocated.

    Raises:
        Refusal: not a Mixture-of-Experts model.
    """
    with FakeTensorMode():
        experts = experts_of(make_layer(config, "compile_moe", torch.device("cpu"), torch.bfloat16))
    layout = "concatenated" if experts.is_concatenated else "interleaved"
    _, intermediate_size = columns_of(experts)
    hidden_size = experts.down_proj.size(2 if experts.is_transposed else 1)
    return Experts(
        Shape(experts.down_proj.size(0), hidden_size, intermediate_size),
        experts.config.num_experts_per_tok,
        layout if experts.has_gate else "ungated",
        experts.is_transposed,
        experts.has_bias,
    )


class Weights(NamedTuple):
    """Of one GEMM: w (E, rows, depth), and its bias (E, rows) or None."""

    w: Tensor
    bias: Tensor | None


def make_weights(experts: Experts, gemm: str, dtype: torch.dtype, device: torch.device) -> Weights:
    num_experts, hidden_size, intermediate_size = experts.shape
    rows, depth = hidden_size, intermediate_size
    if gemm == "gather_gemm":
        rows, depth = intermediate_size * (1 if experts.layout == "ungated" else 2), hidden_size
    size = (num_experts, depth, rows) if experts.transposed else (num_experts, rows, depth)
    w = torch.empty(size, dtype=dtype, device=device).normal_(0, depth**-0.5)
    bias = torch.randn(num_experts, rows, dtype=dtype, device=device) if experts.biased else None
    return Weights(w.transpose(1, 2) if experts.transposed else w, bias)


def make_gemms(
    experts: Experts, gemm: str, weights: Weights, tokens: int, skews: Sequence[float]
) -> list[list[Gemm]]:
    """For each skew, the GEMM on several routings. They share all operands but these."""
    w, bias = weights
    like: dict[str, Any] = {"dtype": w.dtype, "device": w.device}
    _, hidden_size, intermediate_size = experts.shape
    num_slots = tokens * experts.topk
    if gemm == "gather_gemm":
        x = torch.randn(tokens, hidden_size, **like)
        out = torch.empty(num_slots, intermediate_size, **like)
        program = program_text(ACTIVATIONS[experts.layout])

        def make(routing: tuple[Tensor, Tensor]) -> Gemm:
            return gather(out, x, w, routing, experts.topk, bias, program)
    else:
        x = torch.randn(num_slots, intermediate_size, **like)
        out = torch.empty(num_slots, hidden_size, **like)

        def make(routing: tuple[Tensor, Tensor]) -> Gemm:
            return scatter(out, x, w, routing, bias)

    return [
        [make(make_routing(experts, tokens, skew, seed, w.device)) for seed in range(NUM_ROUTINGS)]
        for skew in skews
    ]


def make_routing(
    experts: Experts, tokens: int, skew: float, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sorted slots and offsets where the expert of rank r is chosen as often as r ** -skew; which expert has which
    rank is random.
    """
    num_experts = experts.shape.num_experts
    generator = torch.Generator().manual_seed(seed)
    ids = draw_ids(log_popularities(num_experts, skew, generator), tokens, experts.topk, generator)
    slots, offsets = sort_tokens(ids.to(device), num_experts)
    return slots, offsets
