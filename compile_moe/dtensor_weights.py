"""Weights that are DTensors: the part of them that this rank computes with.

Distributed tensors are not imported here: who gives one has done so, and importing them takes long.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from compile_moe.graph_constants import constant_in_graphs
from compile_moe.prepare_finalize.group import GroupPrepareAndFinalize


def is_dtensor(value: object) -> bool:
    """Whether a value is a ``torch.distributed.tensor.DTensor``."""
    dtensor = _dtensor_class()
    return dtensor is not None and isinstance(value, dtensor)


@constant_in_graphs
def _dtensor_class() -> Any:
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def local_experts(name: str, weight: Any, parts: object = None) -> Any:
    """A layer's weight as this rank's plain tensor; what is no DTensor comes back as it is.

    Args:
        name: the argument that it was given as.
        weight: (E, ...) or None.
        parts: the layer's prepare/finalize part, or None. Only one that sends tokens to the ranks of their experts
            makes a layer of sharded weights.

    Raises:
        ValueError: a DTensor that is not replicated, nor sharded as ``parts`` has its experts.
    """
    if not is_dtensor(weight):
        return weight
    if not isinstance(parts, GroupPrepareAndFinalize):
        if not all(p.is_replicate() for p in weight.placements):
            raise ValueError(
                f"{_described(name, weight)}, but nothing here says on which ranks its experts are: weights must be "
                "plain tensors or replicated DTensors. Give a FusedMoEModularKernel with AllToAllPrepareAndFinalize or "
                f"AllGatherPrepareAndFinalize the sharded weights; pass {name}.to_local() where topk_ids (or "
                f"expert_map) name this rank's experts only, or {name}.full_tensor() to gather them"
            )
        return weight.to_local()
    fits, held = _holds_own_experts(weight, parts)
    if not fits:
        own = tuple(parts.placement.local_experts[parts.rank_of_experts])
        raise ValueError(
            f"{_described(name, weight)}, which holds on rank {parts.group.rank} {held}; {type(parts).__name__} has "
            f"experts {own} there. Accepted are Shard(0) on a mesh dimension of the ranks of its group, in the "
            f"order of its placement (ExpertPlacement.linear, if the ranks divide the experts), and Replicate() with "
            f"{len(own)} experts; redistribute {name}, or pass this rank's experts as a plain tensor"
        )
    return weight.to_local()


def own_experts(weight: Any, parts: Any) -> Tensor:
    """Of a whole model's weight (num_experts, ...), this rank's experts, in memory of their own.

    All ranks of a DTensor call it together: it is gathered, unless it lies as the experts do.
    """
    own = list(parts.placement.local_experts[parts.rank_of_experts])
    weight = weight.detach()
    if weight.is_meta:
        return weight.new_empty(len(own), *weight.shape[1:])
    if is_dtensor(weight):
        fits, _ = _holds_own_experts(weight, parts)
        if fits and weight.size(0) == parts.placement.num_experts:
            return weight.to_local()
        weight = weight.full_tensor()
    if weight.itemsize == 1:
        # Not every device can index all one-byte types.
        return weight.view(torch.uint8)[own].view(weight.dtype)
    return weight[own]


def _holds_own_experts(weight: Any, parts: Any) -> tuple[bool, str]:
    """Whether the local part of a DTensor is what the placement gives this rank, and what it is, in words."""
    placement, group = parts.placement, parts.group
    own = tuple(placement.local_experts[parts.rank_of_experts])
    sharded = [i for i, p in enumerate(weight.placements) if not p.is_replicate()]
    if not sharded:
        return weight.size(0) == len(own), "a copy of all of them"
    if len(sharded) > 1 or not weight.placements[sharded[0]].is_shard(0) or parts.tensor_parallel_size > 1:
        return False, "a part of each"
    if not _is_over(weight.device_mesh, sharded[0], group):
        return False, "those of another group"
    start, end = _chunk(weight.size(0), group.size, group.rank)
    held = f"experts {start} to {end - 1}" if end > start else "none"
    return weight.size(0) == placement.num_experts and own == tuple(range(start, end)), held


def shard_of_experts(name: str, weight: Any) -> Any:
    """This rank's plain tensor of a DTensor that holds whole experts, whichever these are.

    Raises:
        ValueError: a DTensor that is sharded otherwise.
    """
    if not is_dtensor(weight):
        return weight
    sharded = [p for p in weight.placements if not p.is_replicate()]
    if len(sharded) > 1 or not all(p.is_shard(0) for p in sharded):
        raise ValueError(
            f"{_described(name, weight)}; accepted are Replicate(), and Shard(0) on one dimension of its mesh: whole "
            f"experts on each rank. Redistribute {name} first"
        )
    return weight.to_local()


def as_sharded(local: Any, weight: Any) -> Any:
    """What a rank made of its shard of a weight, as a DTensor like it; as it is where the weight is plain."""
    if local is None or not is_dtensor(weight):
        return local
    return type(weight).from_local(local, weight.device_mesh, weight.placements, run_check=False)


def local_tensors(parts: object, *named: tuple[str, Tensor | None]) -> tuple[Any, ...]:
    """:func:`local_experts` of several weights."""
    dtensor = _dtensor_class()
    if dtensor is None:
        return tuple([weight for _, weight in named])
    return tuple(
        [
            local_experts(name, weight, parts)
            if weight is not None and isinstance(weight, dtensor)
            else weight
            for name, weight in named
        ]
    )


def _is_over(mesh: Any, dim: int, group: Any) -> bool:
    """Whether a mesh dimension has a group's ranks, in their order."""
    import torch.distributed as dist

    # Groups are sorted, meshes need not be.
    has_ranks = tuple(dist.get_process_group_ranks(mesh.get_group(dim))) == group.ranks
    return has_ranks and mesh.get_coordinate()[dim] == group.rank


def _chunk(num_experts: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """The experts that Shard(0) gives a rank: those of ``torch.chunk``."""
    size = -(-num_experts // num_ranks)
    return min(rank * size, num_experts), min((rank + 1) * size, num_experts)


def _described(name: str, weight: Any) -> str:
    mesh = weight.device_mesh
    sizes = " x ".join(map(str, mesh.shape))
    names = "" if mesh.mesh_dim_names is None else f" ({', '.join(mesh.mesh_dim_names)})"
    return f"{name} is a DTensor {tuple(weight.shape)} with placements {weight.placements} on a mesh of {sizes}{names}"
