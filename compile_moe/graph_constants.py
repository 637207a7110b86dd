"""Functions that dynamo calls while it traces, instead of tracing into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def constant_in_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.assume_constant_result``, without its import of dynamo and inductor (seconds).

    The arguments must be constants to dynamo, and the result holds for as long as their guards do.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
