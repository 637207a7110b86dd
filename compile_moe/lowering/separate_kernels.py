"""Which generated kernels inductor didn't merge with finalize, and why, as far as its kernels tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, fx

from compile_moe.lowering.graph_edits import name_of
from compile_moe.lowering.scheduled_kernels import ScheduledKernel
from compile_moe.ops.problem_size import shape
from compile_moe.ops.reduce_batch import reduce_batch
from compile_moe.ops.weight_and_reduce import weight_and_reduce

_FINALIZE = weight_and_reduce, reduce_batch
_REDUCTIONS = {
    *("amax", "amin", "any", "argmax", "argmin", "max", "mean", "min", "prod", "sum", "var", "var_mean"),
}


def separate_from_finalize(kernels: Sequence[ScheduledKernel]) -> list[str]:
    """A line for each kernel that could have been one with finalize's: no call lies between them."""
    owners: dict[fx.Node, list[int]] = {}
    sources: list[set[int]] = []
    for index, kernel in enumerate(kernels):
        sources.append(_sources(kernel, owners))
        for node in kernel.own:
            owners.setdefault(node, []).append(index)
    lines: list[str] = []
    for index, finalize in enumerate(kernels):
        if not finalize.generated or all(node.target not in _FINALIZE for node in finalize.own):
            continue
        neighbours = []
        for other, kernel in enumerate(kernels):
            first, last = sorted((index, other))
            is_neighbour = kernel.generated and first in sources[last]
            if is_neighbour and not _call_between(kernels, sources, first, last):
                neighbours.append((kernel, "behind it" if index < other else "in front of it"))
        split = {
            node for kernel, _ in neighbours for node in kernel.own if set(kernel.own) <= set(finalize.own)
        }
        lines += [f"finalize: {_difference(finalize, *neighbour, split)}" for neighbour in neighbours]
    return lines


def _sources(kernel: ScheduledKernel, owners: dict[fx.Node, list[int]]) -> set[int]:
    """The earlier kernels that this one reads from; ``owners`` has those that compute a node."""
    own = set(kernel.own)
    pending = [source for node in own for source in node.all_input_nodes if source not in own]
    found: set[int] = set()
    seen = set(pending)
    while pending:
        node = pending.pop()
        found.update(owners.get(node, ()))
        if node not in owners:  # a view, or one result of several
            pending += [source for source in node.all_input_nodes if source not in seen]
            seen.update(node.all_input_nodes)
    return found


def _call_between(kernels: Sequence[ScheduledKernel], sources: list[set[int]], first: int, last: int) -> bool:
    """Whether something that is not generated has to run between two kernels."""
    behind_call: dict[int, bool] = {first: False}
    for index in range(first + 1, last + 1):
        reached = [behind_call[source] for source in sources[index] if source in behind_call]
        if reached:
            behind_call[index] = any(reached) or not kernels[index].generated
    return behind_call.get(last, False)


def _difference(finalize: ScheduledKernel, other: ScheduledKernel, where: str, split: set[fx.Node]) -> str:
    """What is in another kernel than finalize, and why. ``split`` holds reductions of several kernels."""
    own = [node for node in other.own if node not in finalize.own]
    names = dict.fromkeys(name for name in map(name_of, own) if name in other.operations)
    apart = f"{', '.join(names) or 'partial results'} {where} are in another kernel"
    reductions = _reductions(finalize.own)
    for node, described in reductions.items():
        if node in split and node in other.own:
            return f"{apart}, since inductor splits {described}"
    for ours in reductions.values():
        for theirs in _reductions(own).values():
            if ours.partition(" of ")[2] != theirs.partition(" of ")[2]:
                return f"{apart}, since {theirs} goes over other elements than {ours}"
    return f"{apart}; inductor gives no reason"


def _reductions(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Those among ``nodes``, described by what they reduce."""
    found = {}
    for node in nodes:
        if name_of(node) in _REDUCTIONS and node.all_input_nodes:
            value = node.all_input_nodes[0].meta.get("val")
            if isinstance(value, Tensor):
                found[node] = f"{name_of(node)} of {shape(value)}"
    return found
