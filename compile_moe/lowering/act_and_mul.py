"""Lowering of act_and_mul: its program replayed in inductor's own operations, so that it fuses with neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from compile_moe.lowering.inductor_compat import lower, ops, pointwise
from compile_moe.ops.act_and_mul import act_and_mul
from compile_moe.ops.epilogue import parse

# Vocabulary of epilogues that inductor has under another name.
_OTHER_NAMES = {"div": "truediv"}


def inductor_function(name: str) -> Callable[..., Any]:
    """Inductor's operation for an operation of the epilogue vocabulary."""
    function: Callable[..., Any] = getattr(ops, _OTHER_NAMES.get(name, name))
    return function


def _lowering(gate_up: Any, epilogue: str) -> Any:
    program = parse(epilogue)
    *leading, n = gate_up.get_size()
    half = n // 2
    dtype = gate_up.get_dtype()
    compute_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    load = gate_up.make_loader()

    def column(index: Sequence[Any], which: str) -> Any:
        *row, j = index
        if program.layout == "interleaved":
            j = 2 * j + (1 if which == "up" else 0)
        elif which == "up":
            j = j + half
        return ops.to_dtype(load([*row, j]), compute_dtype)

    def element(index: Sequence[Any]) -> Any:
        values = {"gate": column(index, "gate")}
        if program.gated:
            values["up"] = column(index, "up")
        for i, step in enumerate(program.steps):
            operands = [
                values[o] if isinstance(o, str) else ops.constant(o, compute_dtype) for o in step.operands
            ]
            values[f"t{i}"] = inductor_function(step.op)(*operands)
        return ops.to_dtype(values[program.result], dtype)

    return pointwise(gate_up, dtype, [*leading, half if program.gated else n], element)


def register() -> None:
    lower(act_and_mul, _lowering)
