"""Routings that are drawn at random, evenly or with favourites."""

from __future__ import annotations

import torch
from torch import Tensor


def log_popularities(num_experts: int, skew: float, generator: torch.Generator) -> Tensor:
    """(E,) such that the r-th most popular expert is chosen as often as r ** -skew; which one that is, is random."""
    by_rank = -skew * torch.log(torch.arange(1, num_experts + 1).float())
    return by_rank[torch.randperm(num_experts, generator=generator)]


def draw_ids(log_popularity: Tensor, tokens: int, topk: int, generator: torch.Generator) -> Tensor:
    """(tokens, topk) experts, drawn without replacement."""
    # The largest of these sums are such a sample.
    noise = -torch.log(torch.empty(tokens, len(log_popularity)).exponential_(generator=generator))
    return (log_popularity + noise).topk(topk).indices
