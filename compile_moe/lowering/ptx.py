"""Elements of generated kernels that inductor has no operation for, or a slower one: PTX, on NVIDIA's GPUs."""

from __future__ import annotations

from typing import Any

import torch

from compile_moe.lowering.inductor_compat import ops


def writes_ptx(like: Any) -> bool:
    """Whether kernels on the device of ``like`` are Triton's for NVIDIA's GPUs."""
    return like.get_device().type == "cuda" and torch.version.hip is None


def instruction(asm: str, *inputs: Any, dtype: torch.dtype = torch.float32) -> Any:
    """An element, float32 or int32, of float32 inputs: $0 is the result, $1 the first input."""
    result = "=r" if dtype is torch.int32 else "=f"
    constraints = ",".join([result] + ["f"] * len(inputs))
    return ops.inline_asm_elementwise(*inputs, asm=asm, constraints=constraints, dtype=dtype)


def quotient(x: Any, y: Any, like: Any) -> Any:
    """x / y of float32 elements of a tensor on the device of ``like``, correctly rounded.

    Triton's own division is not, and before torch 2.13 inductor has no other name for one that is.
    """
    return instruction("div.rn.f32 $0, $1, $2;", x, y) if writes_ptx(like) else ops.truediv(x, y)
