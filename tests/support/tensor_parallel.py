"""Layers whose experts are cut along their intermediate size, compared with one rank's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compile_moe import (
    AllGatherPrepareAndFinalize,
    AllToAllPrepareAndFinalize,
    BatchedAllToAllPrepareAndFinalize,
    BatchedTritonExperts,
    ExpertPlacement,
    FusedMoEModularKernel,
    FusedMoEPrepareAndFinalize,
    MoEPrepareAndFinalizeNoEP,
    TensorParallelPrepareAndFinalize,
    TritonExperts,
)
from tests.support.expert_parallel import LAYERS, E, OwnExperts, Shard, own_finalize
from tests.support.oracle import make_layer

#: Ranks with the same experts.
SHARES = 2
#: Of an expert in a batch, for each rank: nothing is dropped.
ROOM = 45


OwnFinalize = own_finalize(TensorParallelPrepareAndFinalize)


@functools.cache
def same_experts(num_ranks: int) -> list[dist.ProcessGroup]:
    return [dist.new_group(range(r, r + SHARES)) for r in range(0, num_ranks, SHARES)]


@functools.cache
def same_part(num_ranks: int) -> list[dist.ProcessGroup]:
    return [dist.new_group(range(r, num_ranks, SHARES)) for r in range(SHARES)]


def make_placement(num_ranks: int) -> ExpertPlacement:
    placement = ExpertPlacement.round_robin(E, num_ranks // SHARES)
    return placement if placement.num_ranks == 1 else placement.with_copies({1: [0], 4: [1]})


def make_parts(kind: str, rank: int, num_ranks: int) -> FusedMoEPrepareAndFinalize:
    """Ranks with the same experts have tokens of their own in kinds "all_to_all" and "all_gather"."""
    placement = make_placement(num_ranks)
    if kind == "all_to_all":
        return AllToAllPrepareAndFinalize(placement, tensor_parallel_size=SHARES)
    if kind == "all_gather":
        return AllGatherPrepareAndFinalize(placement, tensor_parallel_size=SHARES)
    tensor_group = same_experts(num_ranks)[rank // SHARES]
    if kind == "one_device":
        return TensorParallelPrepareAndFinalize(MoEPrepareAndFinalizeNoEP(), tensor_group)
    group = same_part(num_ranks)[rank % SHARES]
    if kind == "batched":
        return TensorParallelPrepareAndFinalize(
            BatchedAllToAllPrepareAndFinalize(placement, ROOM, group), tensor_group
        )
    parts = AllToAllPrepareAndFinalize(placement, group)
    wrapper = OwnFinalize if kind == "own_finalize" else TensorParallelPrepareAndFinalize
    return wrapper(parts, tensor_group)


def make_tensor_shard(
    kind: str, rank: int, num_ranks: int, experts: Callable[..., Any] = TritonExperts, **layer_options: Any
) -> Shard:
    """This rank's tokens and parts of experts."""
    counts = [9, 0, 4, 1][:num_ranks]
    layer = make_layer(**{"M": sum(counts), "E": E} | layer_options)
    placement = make_placement(num_ranks)
    if kind in ("all_to_all", "all_gather"):
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    else:
        first = rank // SHARES
        own = slice(sum(counts[:first]), sum(counts[: first + 1]))
    local = list(placement.local_experts[rank // SHARES])
    if kind == "one_device":
        local = list(range(E))
    size = layer.w2.size(2) // SHARES
    columns = slice(rank % SHARES * size, (rank % SHARES + 1) * size)

    def cut_rows(t: Tensor) -> Tensor:
        return torch.cat([half[:, columns] for half in t[local].chunk(2, 1)], 1)

    w1_bias = None if layer.w1_bias is None else cut_rows(layer.w1_bias)
    w2_bias = None if layer.w2_bias is None or rank % SHARES else layer.w2_bias[local]
    parts = make_parts(kind, rank, num_ranks)
    if kind == "batched":
        experts = functools.partial(BatchedTritonExperts, num_ranks // SHARES * ROOM)
    tokens = replace(
        layer,
        hidden_states=layer.hidden_states[own],
        topk_weights=layer.topk_weights[own],
        topk_ids=layer.topk_ids[own],
    )
    x, _, _, topk_weights, topk_ids = tokens.args
    return Shard(
        tokens,
        None,
        FusedMoEModularKernel(parts, experts(w1_bias, w2_bias)),
        (x, cut_rows(layer.w1), layer.w2[local][:, :, columns], topk_weights, topk_ids),
        {
            "expert_map": None if kind == "one_device" else placement.expert_map(rank // SHARES).to(x.device),
            "apply_router_weight_on_input": layer.apply_router_weight_on_input,
        },
    )


def cases() -> Iterator[tuple[str, str, type[Any], dict[str, Any]]]:
    for kind in ("one_device", "reduced", "all_to_all", "all_gather"):
        for name in ("skipped", "biased", "topk1-on-input", "bfloat16", "float64"):
            yield f"{kind}-{name}", kind, TritonExperts, LAYERS[name]
        yield f"{kind}-own-experts", kind, OwnExperts, LAYERS["skipped"]
    for name in ("skipped", "biased"):
        yield f"batched-{name}", "batched", TritonExperts, LAYERS[name]
    yield "own-finalize", "own_finalize", TritonExperts, LAYERS["skipped"]


def run_tensor_parallel(rank: int, num_ranks: int, seed: int, device: str = "cpu") -> None:
    for name, kind, experts, options in cases():
        if device != "cpu" and options.get("dtype") is torch.float64:
            continue
        torch.manual_seed(seed)
        try:
            shard = make_tensor_shard(kind, rank, num_ranks, experts, **options, device=device)
            shard.check(shard.kernel(*shard.args, **shard.options))
        except Exception as e:
            raise AssertionError(f"{name}, rank {rank} of {num_ranks}, seed {seed}: {e}") from e
