"""Activations: names, parameters, or any PyTorch callable, resolved to what the experts run."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compile_moe.activation_tracing import trace
from compile_moe.ops.named_activations import program_text


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


@torch.compiler.assume_constant_result
def _named(name: str, alpha: float | None, limit: float | None, interleaved: bool | None) -> str:
    return program_text(name, alpha, limit, interleaved)


@torch.compiler.assume_constant_result
def _traced(function: Any, owner: Any, num_columns: int) -> tuple[str, str]:
    return trace(function, owner, num_columns)


def resolve_activation(activation: ActivationLike, num_columns: int) -> ResolvedActivation:
    """Resolve what a caller gave as ``activation`` for gate/up tensors of N = num_columns.

    A callable gate_up (..., N) -> (..., I) is traced once for each N. If it is pointwise over gate and up, its
    program runs inside GEMM 1; Python scalars that it captured are constants of that program. Otherwise it runs as
    PyTorch between the GEMMs.

    Raises:
        ValueError, TypeError: no such name, or neither a name, an Activation nor a callable.
    """
    if isinstance(activation, str):
        return ResolvedActivation(_named(activation, None, None, None), None, "")
    if isinstance(activation, Activation):
        text = _named(activation.name, activation.alpha, activation.limit, activation.interleaved)
        return ResolvedActivation(text, None, "")
    if not callable(activation):
        raise TypeError(
            f"activation must be a name, a compile_moe.Activation or a callable, got {type(activation).__name__}"
        )
    # Dynamo takes functions and modules as constants, but not the methods that bind one to the other.
    if isinstance(activation, types.MethodType):
        text, reason = _traced(activation.__func__, activation.__self__, num_columns)
    else:
        text, reason = _traced(activation, None, num_columns)
    return ResolvedActivation(text, None if text else activation, reason)
