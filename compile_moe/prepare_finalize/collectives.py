"""Collectives as functional ops: dynamo traces them, and inductor schedules them among the kernels.

The only file that uses torch's functional collectives, whose Python module is private and renames its functions
between versions; the ops below them, which compiled graphs hold, have kept their schemas (torch 2.13 tested).
Graphs name a group by a string, so that nothing of torch.distributed is traced. Inductor keeps collectives in the order
of the program, on every rank the same.

Every function but ``wait`` starts what it names: what a program does before it waits runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ops = torch.ops._c10d_functional


class Group(NamedTuple):
    """A process group, as graphs know it."""

    name: str
    size: int
    rank: int
    #: Of its backend's tensors.
    device: torch.device
    #: Global ranks, in the group's order.
    ranks: tuple[int, ...] = ()


def find_group(group: Any) -> Group:
    """Describe a ``torch.distributed.ProcessGroup``; None is the default group.

    Raises:
        RuntimeError: torch.distributed is not there, or not initialized.
        TypeError: not a process group.
        ValueError: this process is not in the group.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "expert parallelism needs torch.distributed's default group: call "
            "torch.distributed.init_process_group first, in a process that torchrun started"
        )
    # Importing it registers the shapes of the ops' results.
    import torch.distributed._functional_collectives

    group = dist.group.WORLD if group is None else group
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "this process is not in the group; construct the layer in the group's processes only"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    on_cuda = "nccl" in str(dist.get_backend(group))
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    ranks = tuple(dist.get_process_group_ranks(group))
    return Group(str(group.group_name), group.size(), group.rank(), device, ranks)


def all_gather(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Each tensor (n, ...) of all ranks, one after the other: (size * n, ...). n is the same on all ranks.

    Between CPUs as an exchange of copies: several of Gloo's coalesced all-gathers under way, which this op is there,
    corrupt the heap now and then (torch 2.13, nothing of ours involved).
    """
    if group.device.type == "cpu":
        return [_copies_exchanged(t, group) for t in tensors]
    return [_ops.all_gather_into_tensor(t.contiguous(), group.size, group.name) for t in tensors]


def _copies_exchanged(t: Tensor, group: Group) -> Tensor:
    rows = [t.size(0)] * group.size
    return all_to_all([t.repeat(group.size, *[1] * (t.dim() - 1))], rows, rows, group)[0]


def all_reduce(t: Tensor, group: Group) -> list[Tensor]:
    """The sum over all ranks."""
    return [_ops.all_reduce(t.contiguous(), "sum", group.name)]


def reduce_scatter(t: Tensor, group: Group) -> list[Tensor]:
    """This rank's part (n, ...) of the sum over all ranks of (size * n, ...)."""
    return [_ops.reduce_scatter_tensor(t.contiguous(), "sum", group.size, group.name)]


def all_to_all(
    tensors: Sequence[Tensor], num_sent: Sequence[int], num_received: Sequence[int], group: Group
) -> list[Tensor]:
    """Rows for each rank in turn, ``num_sent`` of them, exchanged for ``num_received`` rows from each rank in turn."""
    return [
        _ops.all_to_all_single(t.contiguous(), list(num_received), list(num_sent), group.name)
        for t in tensors
    ]


def wait(started: Sequence[Tensor]) -> list[Tensor]:
    """What the functions above started, once it has arrived: until then the tensors hold nothing."""
    return [_ops.wait_tensor(t) for t in started]


def as_sizes(t: Tensor) -> list[int]:
    """Numbers of rows, read by the host: it waits for the device, once. Unbacked sizes of a graph."""
    sizes: list[int] = t.cpu().tolist()
    for size in sizes:
        torch._check(size >= 0)
    return sizes
