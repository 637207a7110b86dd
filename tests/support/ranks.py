"""Processes of a group on this machine."""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp

#: Longest wait for another rank, in seconds: compiling, or starting, on a busy machine.
TIMEOUT = 120.0


def spawn(
    function: Callable[..., None], num_ranks: int, folder: Path, *args: Any, backend: str = "gloo"
) -> None:
    """Run ``function(rank, num_ranks, *args)`` in as many processes of a group; what a rank raises, is raised.

    With "nccl" each has a GPU of its own, its current one.
    They are forks of one process that has imported what the first such function's module imports, and dynamo: that
    takes seconds.
    """
    multiprocessing.set_forkserver_preload([function.__module__, "torch._dynamo"])
    mp.start_processes(
        _rank,
        (num_ranks, backend, str(folder / f"rendezvous-{secrets.token_hex(4)}"), function, args),
        nprocs=num_ranks,
        start_method="forkserver",
    )


def _rank(
    rank: int,
    num_ranks: int,
    backend: str,
    rendezvous: str,
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    # Whatever network the machine has.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        backend,
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    with torch.no_grad():
        function(rank, num_ranks, *args)
    # NCCL waits for the graphs that hold its collectives.
    torch._dynamo.reset()
    gc.collect()
    dist.destroy_process_group()
