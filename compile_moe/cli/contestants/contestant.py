"""What the bench knows of each contestant, and why one may be missing."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from compile_moe.cli.language_model import one_line


class Inputs(NamedTuple):
    """hidden_states (M, K); ids (M, topk), int64; weights (M, topk), in the dtype of hidden_states."""

    hidden_states: Tensor
    ids: Tensor
    weights: Tensor


class Contestant(NamedTuple):
    """One way to compute a layer or its experts.

    arguments: the inputs as ``call`` takes them, in the form that this library's own router gives; not timed.
    call: returns (M, K), or a tuple that starts with it.
    replayable: whether a CUDA graph can hold the call: it doesn't wait for the GPU.
    versions: of the libraries behind it that have one.
    reference: what its results are compared with, called alike; None for transformers' eager experts.
    most_error: how much they may differ, relative, in the L2 norm of a token; None where the dtype says it.
    expert_bytes: of one expert's weights; None where they are the model's.
    """

    arguments: Callable[[Inputs], tuple[Any, ...]]
    call: Callable[..., Any]
    replayable: bool = True
    versions: tuple[tuple[str, str], ...] = ()
    reference: Callable[..., Any] | None = None
    most_error: float | None = None
    expert_bytes: int | None = None


class Unavailable(Exception):
    """Why a contestant has no numbers here: what is missing, or what it can't compute."""


def load(module: str, install: str) -> Any:
    """The module of a peer.

    Raises:
        Unavailable: it is not installed, or its import fails.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise Unavailable(f"not installed; install it by: {install}") from error
        raise Unavailable(f"{module} can't be imported: {one_line(error)}; {install} brings it") from error
    except Exception as error:  # whatever a library does when it finds another torch, or no GPU
        raise Unavailable(
            f"{module} can't be imported: {type(error).__name__}: {one_line(error)[:200]}"
        ) from error


def versions_of(distribution: str) -> tuple[tuple[str, str], ...]:
    """The version of an installed distribution; none where it was put on the path by hand."""
    try:
        return ((distribution, importlib.metadata.version(distribution)),)
    except importlib.metadata.PackageNotFoundError:
        return ()
