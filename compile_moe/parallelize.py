"""Expert parallelism for a whole model: each experts module keeps this rank's experts, tokens travel to theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from torch import nn

from compile_moe.expert_placement import ExpertPlacement
from compile_moe.integrations.experts_module import is_experts
from compile_moe.integrations.sharded_experts import check_module, num_experts_of, refuse_saving, shard_module
from compile_moe.prepare_finalize import (
    AllGatherPrepareAndFinalize,
    AllToAllPrepareAndFinalize,
    BatchedAllToAllPrepareAndFinalize,
)

Module = TypeVar("Module", bound=nn.Module)
#: A module's qualified name, its number of experts and the number of ranks to where its experts lie.
PlacementOf = Callable[[str, int, int], ExpertPlacement]

_PLACEMENTS = {"linear": ExpertPlacement.linear, "round_robin": ExpertPlacement.round_robin}
_DISPATCHES = ("all_to_all", "all_gather", "batched")


def parallelize(
    module: Module,
    mesh: Any,
    *,
    dispatch: Literal["all_to_all", "all_gather", "batched"] = "all_to_all",
    placement: Literal["linear", "round_robin"] | ExpertPlacement | PlacementOf = "linear",
    num_tokens: int | Literal["exchanged", "equal"] = "exchanged",
    max_tokens_per_rank: int | None = None,
) -> Module:
    """Spread a model's experts over the ranks of a mesh, in place. Each rank calls the model with tokens of its own.

    Every experts module of transformers' ``use_experts_implementation`` in ``module`` keeps the experts that the
    placement gives this rank, frees the others, and from then on runs through a
    :class:`compile_moe.FusedMoEModularKernel`, whatever ``experts_implementation`` is. Nothing else in the model
    changes: the ranks are data-parallel, and all call it together and equally often, also one without tokens
    (``generate``: with as many new tokens on each).

    Weights may be plain tensors, DTensors of any layout (they are gathered one module after the other, by all ranks) or
    on the meta device; with biases, stored transposed, with a norm behind the experts, FP8 or quantized by
    ``integrations.transformers.quantize_experts`` (before this call).

    ``state_dict`` then holds this rank's experts, under the names that they had. ``load_state_dict`` takes that, and
    also the whole model's, of which each rank takes its experts: so a model made on the meta device is loaded with
    ``assign=True``. ``save_pretrained`` raises.

    Args:
        module: a model, a part of one, or an experts module, on its device or on the meta device.
        mesh: a ``torch.distributed.device_mesh.DeviceMesh`` of one dimension; of a larger one ``mesh["ep"]``.
        dispatch: how tokens reach their experts: :class:`compile_moe.AllToAllPrepareAndFinalize`,
            :class:`compile_moe.AllGatherPrepareAndFinalize`, or "batched",
            :class:`compile_moe.BatchedAllToAllPrepareAndFinalize`, with room for ``max_tokens_per_rank`` slots of each
            rank at each expert; ``compile_moe_prepare_finalize.num_dropped`` of an experts module counts the others.
        placement: where experts lie, the same on all ranks: a name, an :class:`compile_moe.ExpertPlacement` for all
            experts modules, or a function of a module's name, its number of experts and the number of ranks.
        num_tokens: for "all_gather", see :class:`compile_moe.AllGatherPrepareAndFinalize`.
        max_tokens_per_rank: for "batched", which needs it.

    Returns:
        ``module``.

    Raises:
        ValueError, TypeError: arguments that don't fit together, no experts, or experts that are sharded already. The
            module is then as it was.
        NotImplementedError: experts with weights that can't be cut by expert.

    Example:
        >>> from torch.distributed.device_mesh import init_device_mesh          # doctest: +SKIP
        >>> mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("ep",))       # doctest: +SKIP
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B")  # doctest: +SKIP
        >>> model = compile_moe.parallelize(model, mesh["ep"])                  # doctest: +SKIP
        >>> compiled = torch.compile(model, fullgraph=True)                     # doctest: +SKIP
    """
    group = _group_of(mesh)
    if dispatch not in _DISPATCHES:
        raise ValueError(f"dispatch must be one of {', '.join(map(repr, _DISPATCHES))}, got {dispatch!r}")
    if dispatch != "all_gather" and num_tokens != "exchanged":
        raise ValueError(
            f"num_tokens is for dispatch='all_gather', got num_tokens={num_tokens!r} with dispatch={dispatch!r}; leave "
            "it out"
        )
    if (dispatch == "batched") != (max_tokens_per_rank is not None):
        raise ValueError(
            "dispatch='batched', and only that, needs max_tokens_per_rank, the slots that an expert has room for of "
            f"each rank; got dispatch={dispatch!r} and max_tokens_per_rank={max_tokens_per_rank!r}"
        )
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    found = {name: part for name, part in module.named_modules() if is_experts(part)}
    if not found:
        raise ValueError(
            f"{type(module).__name__} has no experts that transformers dispatches by experts_implementation; for "
            "weights of your own, give this rank's to compile_moe.FusedMoEModularKernel with "
            "compile_moe.AllToAllPrepareAndFinalize(placement, mesh.get_group())"
        )
    prepared = []
    for name, experts in found.items():
        config = check_module(name, experts)
        if dispatch == "batched" and getattr(experts, "has_post_expert_norm", False):
            raise NotImplementedError(
                f"dispatch='batched' has no place for the norm behind the experts of {type(experts).__name__}; choose "
                "'all_to_all' or 'all_gather'"
            )
        where = _placement(placement, name, num_experts_of(experts), mesh.size())
        # On CPUs until the model is moved, if at all; the group knows where to.
        weights = next(experts.parameters())
        device = weights.device if weights.is_cuda else None
        if dispatch == "all_to_all":
            parts: Any = AllToAllPrepareAndFinalize(where, group, config, device)
        elif dispatch == "batched":
            assert max_tokens_per_rank is not None
            parts = BatchedAllToAllPrepareAndFinalize(where, max_tokens_per_rank, group, config, device)
        else:
            parts = AllGatherPrepareAndFinalize(where, group, config, device, num_tokens=num_tokens)
        prepared.append((experts, parts))
    refuse_saving(module)
    for experts, parts in prepared:
        shard_module(experts, parts)
    return module


def _group_of(mesh: Any) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh must be a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}; make one by "
            "init_device_mesh('cuda', (num_ranks,), mesh_dim_names=('ep',)), or of a process group by "
            "DeviceMesh.from_group(group, 'cuda')"
        )
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        example = (
            f"mesh[{names[-1]!r}]" if names else "name its dimensions (mesh_dim_names) and pass mesh['ep']"
        )
        raise ValueError(
            f"mesh must have one dimension, that of the experts, got {tuple(mesh.shape)}"
            f"{f' with dimensions {names}' if names else ''}; pass one of them: {example}"
        )
    if mesh.get_coordinate() is None:
        raise ValueError("this process is not in the mesh; call parallelize in the mesh's processes only")
    return mesh.get_group()


def _placement(given: Any, name: str, num_experts: int, num_ranks: int) -> ExpertPlacement:
    result = given
    if isinstance(given, str):
        if given not in _PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(map(repr, _PLACEMENTS))}, got {given!r}")
        result = _PLACEMENTS[given](num_experts, num_ranks)
    elif not isinstance(given, ExpertPlacement) and callable(given):
        result = given(name, num_experts, num_ranks)
    if not isinstance(result, ExpertPlacement):
        raise TypeError(
            "placement must be 'linear', 'round_robin', a compile_moe.ExpertPlacement, or a function (name, "
            f"num_experts, num_ranks) that returns one, got {type(result).__name__}"
        )
    if (result.num_experts, result.num_ranks) != (num_experts, num_ranks):
        raise ValueError(
            f"placement must be for {num_experts} experts on {num_ranks} ranks at {name or 'the module'}, got one for "
            f"{result.num_experts} on {result.num_ranks}; where layers differ, pass a function (name, num_experts, "
            "num_ranks)"
        )
    return result
