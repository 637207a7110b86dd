"""Weights and activation of a model's experts, as the adapters of other libraries take them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compile_moe.cli.contestants.contestant import Unavailable
from compile_moe.cli.moe_layer import columns_of
from compile_moe.ops.epilogue import evaluate_steps, parse
from compile_moe.ops.named_activations import NAMES, program_text


class ExpertWeights(NamedTuple):
    """w1 (E, N, K) and w2 (E, K, I), with any strides; w1_bias (E, N) and w2_bias (E, K), or None.

    activation: its name, as :func:`compile_moe.fused_experts` takes it, or None where it has none. Rows of w1: gate
    and up alternate for swigluoai; gate rows come first for every other gated name.
    function: the activation itself, (..., N) to (..., I).
    """

    w1: Tensor
    w2: Tensor
    w1_bias: Tensor | None
    w2_bias: Tensor | None
    activation: str | None
    function: Callable[[Tensor], Tensor]

    def require(self, activations: Collection[str], dtypes: Collection[torch.dtype]) -> None:
        """Raise Unavailable unless the activation and the dtype are of those given."""
        if self.activation not in activations:
            raise Unavailable(
                f"computes {' and '.join(activations)}; this model's activation is "
                f"{self.activation or 'none that has a name'}"
            )
        if self.w1.dtype not in dtypes:
            names = " and ".join(_short(dtype) for dtype in dtypes)
            raise Unavailable(f"computes {names}, got {_short(self.w1.dtype)}; choose another --dtype")


def weights_of(experts: Any) -> ExpertWeights:
    """Views of the parameters of a module that transformers dispatches by experts_implementation.

    Raises:
        Unavailable: experts that do more than two products, biases and an activation.
    """
    if getattr(experts, "has_post_expert_norm", False):
        raise Unavailable("other libraries have no norm behind each expert, as this model has")
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    w1, w2 = getattr(experts, name).detach(), experts.down_proj.detach()
    if experts.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    w1_bias = getattr(experts, f"{name}_bias").detach() if experts.has_bias else None
    w2_bias = experts.down_proj_bias.detach() if experts.has_bias else None
    function = experts._apply_gate if experts.has_gate else experts.act_fn
    return ExpertWeights(w1, w2, w1_bias, w2_bias, _name_of(function, *columns_of(experts)), function)


def interleaved(rows: Tensor) -> Tensor:
    """A copy of (E, 2I, ...), gate before up, with gate and up alternating."""
    return torch.stack(rows.chunk(2, dim=1), dim=2).flatten(1, 2)


def _name_of(function: Callable[[Tensor], Tensor], num_columns: int, intermediate_size: int) -> str | None:
    """The named activation that gives the same on random rows, some beyond swigluoai's limit."""
    gated = num_columns == 2 * intermediate_size
    rows = torch.randn(4, num_columns, generator=torch.Generator().manual_seed(0)) * 4
    result = function(rows)
    for name in NAMES:
        if gated is name.endswith("_no_mul"):
            continue
        if torch.allclose(result, evaluate_steps(*parse(program_text(name)).as_tuples(), rows), atol=1e-4):
            return name
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
