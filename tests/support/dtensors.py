"""Layers whose weights are DTensors, on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compile_moe import (
    AllGatherPrepareAndFinalize,
    AllToAllPrepareAndFinalize,
    ExpertPlacement,
    FusedMoEModularKernel,
    MoEPrepareAndFinalizeNoEP,
    TritonExperts,
    fused_experts,
)
from tests.support.oracle import Layer, assert_as_accurate, make_layer

E = 6


def run_dtensor_weights(rank: int) -> None:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def distributed(placement: Any) -> list[Any]:
        weights = (layer.w1, layer.w2, layer.w1_bias, layer.w2_bias)
        shards = [w.chunk(2)[rank] if placement.is_shard() else w for w in weights if w is not None]
        return [DTensor.from_local(s, mesh, [placement], run_check=False) for s in shards]

    mesh = init_device_mesh("cpu", (2,))
    layer = make_layer(M=6, E=E, biased=True)
    x, _, _, topk_weights, topk_ids = layer.args
    own = slice(0, 2) if rank == 0 else slice(2, 6)
    tokens = replace(layer, hidden_states=x[own], topk_weights=topk_weights[own], topk_ids=topk_ids[own])
    replicated, sharded = distributed(Replicate()), distributed(Shard(0))

    def one_rank(w1: Tensor, w2: Tensor, *biases: Tensor) -> Tensor:
        return fused_experts(x, w1, w2, topk_weights, topk_ids, w1_bias=biases[0], w2_bias=biases[1])

    assert_as_accurate(one_rank(*replicated), layer)
    for parts_class in (AllToAllPrepareAndFinalize, AllGatherPrepareAndFinalize):
        function = _layer_on(parts_class(ExpertPlacement.linear(E, 2)), tokens, sharded[2:])
        assert_as_accurate(function(*sharded[:2]), tokens)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert_as_accurate(compiled(*sharded[:2]), tokens)

    round_robin = AllToAllPrepareAndFinalize(ExpertPlacement.round_robin(E, 2))
    linear = AllToAllPrepareAndFinalize(ExpertPlacement.linear(E, 2))
    given = r"DTensor \(6, .*placements \(.*\) on a mesh of 2"
    with pytest.raises(
        ValueError, match=rf"w1 is a {given}, but nothing here says on which ranks its experts are"
    ):
        one_rank(*sharded)
    with pytest.raises(
        ValueError, match=rf"w2 is a {given}, but nothing here says on which ranks its experts are"
    ):
        _layer_on(MoEPrepareAndFinalizeNoEP(), layer, layer_biases(layer))(layer.w1, sharded[1])
    with pytest.raises(
        ValueError, match=r"which holds on rank \d experts \d to \d; AllToAll.* has experts \("
    ):
        _layer_on(round_robin, tokens, layer_biases(layer))(*sharded[:2])
    with pytest.raises(ValueError, match=r"w2_bias is a .* has experts \("):
        FusedMoEModularKernel(round_robin, TritonExperts(None, sharded[3]))
    with pytest.raises(ValueError, match=r"which holds on rank \d a copy of all of them; .* with 3 experts"):
        _layer_on(linear, tokens, layer_biases(layer))(*replicated[:2])
    with pytest.raises(ValueError, match=r"which holds on rank \d a part of each"):
        _layer_on(linear, tokens, layer_biases(layer))(*distributed(Shard(1))[:2])
    with pytest.raises(ValueError, match=r"w1_bias is a .*; accepted are Replicate\(\), and Shard\(0\)"):
        TritonExperts(distributed(Shard(1))[2])
    # A mesh dimension of one rank, and a mesh in another order than its group.
    halves = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "ep"))
    backwards = DeviceMesh("cpu", [1, 0], mesh_dim_names=("ep",))
    for mesh, layout, sizes in (
        (halves, [Replicate(), Shard(0)], r"2 x 1 \(dp, ep\)"),
        (backwards, [Shard(0)], r"2 \(ep\)"),
    ):
        w1, w2 = (DTensor.from_local(w.chunk(2)[0], mesh, layout) for w in (layer.w1, layer.w2))
        with pytest.raises(ValueError, match=rf"{sizes}, .* those of another group"):
            _layer_on(linear, tokens, layer_biases(layer))(w1, w2)


def layer_biases(layer: Layer) -> tuple[Tensor | None, Tensor | None]:
    return layer.w1_bias, layer.w2_bias


def _layer_on(parts: Any, tokens: Layer, biases: Any) -> Callable[..., Tensor]:
    kernel = FusedMoEModularKernel(parts, TritonExperts(*biases))
    x, _, _, topk_weights, topk_ids = tokens.args

    def layer(w1: Tensor, w2: Tensor) -> Tensor:
        expert_map = getattr(parts, "expert_map", None)
        return kernel(x, w1, w2, topk_weights, topk_ids, expert_map=expert_map)

    return layer
