"""Layers in the batched format for tests: what capacity leaves of them, and parts that poison rows without tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compile_moe import (
    BatchedPrepareAndFinalize,
    BatchedTorchExperts,
    BatchedTritonExperts,
    FusedMoEModularKernel,
    FusedMoEQuantConfig,
    PrepareResult,
)
from tests.support.oracle import Layer

EXPERTS: dict[str, type[Any]] = {"triton": BatchedTritonExperts, "torch": BatchedTorchExperts}


class Kept(NamedTuple):
    """What a capacity leaves of a layer: the ids of dropped slots are negative; by expert, slots kept and dropped."""

    layer: Layer
    num_tokens: list[int]
    num_dropped: list[int]


def kept(layer: Layer, max_num_tokens: int) -> Kept:
    """Slot by slot, from the contract: an expert's first slots are kept."""
    num_experts = layer.w1.size(0)
    expert_map = None if layer.expert_map is None else layer.expert_map.tolist()
    num_global = num_experts if expert_map is None else len(expert_map)
    counts, dropped = [0] * num_experts, [0] * num_experts
    ids = layer.topk_ids.tolist()
    for token in ids:
        for j, expert in enumerate(token):
            local = expert if 0 <= expert < num_global else -1
            if expert_map is not None and local >= 0:
                local = expert_map[local]
            if local < 0:
                continue
            if counts[local] == max_num_tokens:
                dropped[local] += 1
                token[j] = -1
            else:
                counts[local] += 1
    like = layer.topk_ids
    remaining = torch.tensor(ids, dtype=like.dtype, device=like.device).view(like.shape)
    return Kept(replace(layer, topk_ids=remaining), counts, dropped)


def holds_token(expert_num_tokens: Tensor, max_num_tokens: int) -> Tensor:
    """(E, max_num_tokens) bool."""
    row = torch.arange(max_num_tokens, device=expert_num_tokens.device)
    return row < expert_num_tokens.unsqueeze(1)


def poison(batch: Tensor, expert_num_tokens: Tensor) -> Tensor:
    """The batch with NaN, or what integers have of it, in all rows without a token."""
    mask = holds_token(expert_num_tokens, batch.size(1)).unsqueeze(-1)
    if batch.element_size() == 1:
        # NaN in float8_e4m3fn, the largest number in int8.
        return torch.where(mask, batch.view(torch.uint8), 0x7F).view(batch.dtype)
    return torch.where(mask, batch, torch.nan)


class PoisonedParts(BatchedPrepareAndFinalize):
    """Rows without a token hold NaN when they reach the experts."""

    def prepare(self, *args: Any) -> PrepareResult:
        batch, scale, counts, *rest = super().prepare(*args)
        assert counts is not None
        if scale is not None and scale.dim() == 3:
            scale = poison(scale, counts)
        return PrepareResult(poison(batch, counts), scale, counts, *rest)


def poisoning(base: type[Any]) -> type[Any]:
    """Experts that leave NaN in rows without a token."""

    class Poisoning(base):  # type: ignore[misc]
        def apply(self, *args: Any, expert_num_tokens: Tensor, **options: Any) -> Tensor:
            out = super().apply(*args, expert_num_tokens=expert_num_tokens, **options)
            return poison(out, expert_num_tokens)

    return Poisoning


def batched_kernel(
    layer: Layer,
    max_num_tokens: int,
    experts: str | type[Any] = "triton",
    config: FusedMoEQuantConfig | None = None,
    parts: type[Any] = BatchedPrepareAndFinalize,
) -> FusedMoEModularKernel:
    made = EXPERTS[experts] if isinstance(experts, str) else experts
    num_local = None if layer.expert_map is None else layer.w1.size(0)
    return FusedMoEModularKernel(
        parts(max_num_tokens, num_local, config),
        made(max_num_tokens, layer.w1_bias, layer.w2_bias, config),
    )


def options_of(layer: Layer) -> dict[str, Any]:
    """Of the kernel's call: biases belong to the experts' constructor."""
    return {k: v for k, v in layer.options.items() if not k.endswith("bias")}
