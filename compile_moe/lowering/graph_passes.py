"""The passes over inductor's graphs, and the library's identity in inductor's caches."""

from __future__ import annotations

import copy
import functools
import hashlib
from pathlib import Path

from torch import fx

from compile_moe.lowering.fuse_epilogue import fuse_epilogue
from compile_moe.lowering.fuse_router import fuse_router, fuse_router_and_sort
from compile_moe.lowering.fusion_warning import warn_once
from compile_moe.lowering.inductor_compat import GraphFunction, install_passes
from compile_moe.lowering.refusals import Refusals, rehearsal
from compile_moe.lowering.use_one_token_experts import use_one_token_experts
from compile_moe.ops.registry import NAMESPACE

#: In the order of their application.
PASSES: tuple[GraphFunction, ...] = (fuse_router, fuse_epilogue, use_one_token_experts, fuse_router_and_sort)


#: Passes that raised, newest last; for those who want to explain a graph.
refusals = Refusals()


def run_passes(graph: fx.Graph) -> None:
    """All passes, on a graph with the layer: other models' graphs are none of our business.

    Each is tried on a copy of the graph first, so that one that raises leaves it as it was. Copying takes some 30 µs a
    node, nothing beside what inductor does with it.
    """
    if not any(getattr(node.target, "namespace", None) == NAMESPACE for node in graph.nodes):
        return
    trial = copy.deepcopy(graph)
    for graph_pass in PASSES:
        try:
            with rehearsal():
                graph_pass(trial)
        except Exception as error:  # a bug: compiled code is right without the pass
            name = getattr(graph_pass, "__name__", str(graph_pass))
            reason = f"the pass {name} raised {type(error).__name__}: {error}"
            refusals.refuse(reason)
            warn_once(f"pass {name}", f"{reason}; graphs are compiled without it")
            trial = copy.deepcopy(graph)
        else:
            graph_pass(graph)


@functools.cache
def source_hash() -> str:
    """Hash of the library's sources. Graphs compiled by other sources, with other fakes or lowerings, are stale."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def register() -> None:
    install_passes((run_passes,), source_hash())
