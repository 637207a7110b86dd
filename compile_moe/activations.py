"""Activations: names, parameters, or any PyTorch callable, resolved to what the experts run."""

from __future__ import annotations

import ctypes
import functools
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compile_moe.activation_tracing import trace, trace_cached
from compile_moe.graph_constants import constant_in_graphs
from compile_moe.ops.named_activations import program_text
from compile_moe.ops.problem_size import require_type, shape


@dataclass(frozen=True)
class Activation:
    """A named activation with its parameters.

    Args:
        name: "silu", "gelu", "gelu_tanh", "relu2" (f(gate) * up), their ungated forms with suffix "_no_mul" (f
            alone), or "swigluoai" (gpt-oss: clamped gate and up, gate * sigmoid(alpha * gate) * (up + 1)).
        alpha: factor inside the sigmoid, swigluoai (default 1.702) and silu (default 1) only.
        limit: gate is clamped above at limit and up to [-limit, limit]; swigluoai (default 7.0) and silu (default:
            none) only.
        interleaved: gate rows of w1 at even and up rows at odd positions, instead of all gate rows first. None is the
            name's own storage: interleaved for swigluoai, concatenated for the others.

    Raises:
        ValueError: unknown name, or a parameter that the activation doesn't have.
    """

    name: str
    alpha: float | None = None
    limit: float | None = None
    interleaved: bool | None = None

    def __post_init__(self) -> None:
        program_text(self.name, self.alpha, self.limit, self.interleaved)


ActivationLike = str | Activation | Callable[[Tensor], Tensor]


class ResolvedActivation(NamedTuple):
    """What the experts run: an epilogue's text, or a callable that couldn't become one, and why."""

    epilogue: str
    function: Callable[[Tensor], Tensor] | None
    reason: str


_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, functools.partial)


@constant_in_graphs
def _named(name: str, alpha: float | None, limit: float | None, interleaved: bool | None) -> str:
    return program_text(name, alpha, limit, interleaved)


@constant_in_graphs
def _traced_in_graph(function: Any, owner_id: int, num_columns: int) -> tuple[str, str]:
    owner: Any = ctypes.cast(owner_id, ctypes.py_object).value if owner_id else None
    if function is None:
        return trace(owner, None, num_columns)
    return trace(function, owner, num_columns)


def resolve_activation(activation: ActivationLike, num_columns: int, like: Tensor) -> ResolvedActivation:
    """Resolve what a caller gave as ``activation``.

    A callable gate_up (..., N) -> (..., I) is traced. If it is pointwise over gate and up, its program runs inside
    GEMM 1, and the Python scalars it captured are constants of that program. Otherwise it runs as PyTorch between the
    GEMMs.

    Args:
        activation: a name, an :class:`Activation` or a callable.
        num_columns: N.
        like: a tensor of the device and dtype that a callable will see that is not pointwise. A pointwise one is
            traced on float32, in which its program runs.

    Raises:
        ValueError, TypeError: no such name, or neither a name, an Activation nor a callable.
    """
    if isinstance(activation, str):
        return ResolvedActivation(_named(activation, None, None, None), None, "")
    if isinstance(activation, Activation):
        text = _named(activation.name, activation.alpha, activation.limit, activation.interleaved)
        return ResolvedActivation(text, None, "")
    if isinstance(activation, type):
        raise TypeError(
            f"activation must be a name, a compile_moe.Activation or a callable, got the class {activation.__name__}; "
            "pass an object of it"
        )
    if not callable(activation):
        raise TypeError(
            f"activation must be a name, a compile_moe.Activation or a callable, got {type(activation).__name__}"
        )
    # Dynamo hands a size over as a constant only once something has asked for its value.
    num_columns = operator.index(num_columns)
    is_method = isinstance(activation, types.MethodType)
    function, owner = activation, None
    if isinstance(activation, types.MethodType):
        function, owner = activation.__func__, activation.__self__
    if not torch.compiler.is_compiling():
        text, reason = trace_cached(function, owner, num_columns)
    else:
        # A dead call, for its guards: when something that the callable captured changes, dynamo traces anew.
        activation(like.new_empty((1, num_columns)))
        # Dynamo hands functions over as constants, but not other objects: these go by their addresses, which are
        # those of live objects while dynamo traces a call that has them.
        if is_method:
            text, reason = _traced_in_graph(function, id(owner), num_columns)
        elif isinstance(activation, _FUNCTIONS):
            text, reason = _traced_in_graph(function, 0, num_columns)
        else:
            text, reason = _traced_in_graph(None, id(activation), num_columns)
    return ResolvedActivation(text, None if text else activation, reason)


def call_activation(function: Callable[[Tensor], Tensor], gate_up: Tensor, num_columns: int) -> Tensor:
    """Run an activation that could not be fused: (S, N) -> (S, num_columns), in gate_up's dtype.

    Raises:
        TypeError, ValueError: if it returns anything else.
    """
    result = function(gate_up)
    require_type(
        isinstance(result, Tensor), lambda: f"activation must return a tensor, got {type(result).__name__}"
    )
    # A plain raise, which dynamo traces with any message.
    if result.dim() != 2 or result.size(1) != num_columns or result.size(0) != gate_up.size(0):
        raise ValueError(
            f"activation must return (S, I) = {(gate_up.size(0), num_columns)} for gate_up {shape(gate_up)}, "
            f"got {shape(result)}"
        )
    return result.to(gate_up.dtype)
