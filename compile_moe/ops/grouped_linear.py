"""Per-expert linear layers over rows in expert order, in plain PyTorch: the GEMMs of the CPU implementations.

The op form exists for ``TorchExperts``, which runs plain PyTorch on any device: the loop over experts needs the
offsets on the host, so a traced graph has to see it as one op. On CUDA it synchronizes; it is the oracle, not the
fast path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.problem_size import (
    check_bias,
    check_device,
    check_float_dtype,
    check_same,
    require,
    require_type,
    shape,
)
from compile_moe.ops.registry import OutputSpec, define_op


def grouped_linear_torch(
    rows: Tensor, w: Tensor, expert_offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """One GEMM an expert that has rows. Rows past the last offset come out as zeros."""
    out = rows.new_zeros((rows.size(0), w.size(1)))
    offsets = expert_offsets.tolist()
    for e in range(w.size(0)):
        first, last = offsets[e], offsets[e + 1]
        if first < last:
            y = rows[first:last] @ w[e].t()
            out[first:last] = y if bias is None else y + bias[e]
    return out


def _check(rows: Tensor, w: Tensor, expert_offsets: Tensor, bias: Tensor | None = None) -> None:
    check_float_dtype("rows", rows)
    check_same("rows", rows, w=w, bias=bias)
    require(
        rows.dim() == 2 and w.dim() == 3 and rows.size(1) == w.size(2),
        lambda: f"rows must be (S, K) and w (E, N, K), got {shape(rows)} and {shape(w)}",
    )
    require(
        expert_offsets.dim() == 1 and expert_offsets.size(0) == w.size(0) + 1,
        lambda: f"expert_offsets must be (E + 1,) = ({w.size(0) + 1},), got {shape(expert_offsets)}",
    )
    require_type(
        expert_offsets.dtype is torch.int32,
        lambda: f"expert_offsets must be int32, got {expert_offsets.dtype}",
    )
    check_device("rows", rows, expert_offsets=expert_offsets)
    check_bias("bias", bias, "(E, N)", w)


def _outputs(
    rows: Tensor, w: Tensor, expert_offsets: Tensor, bias: Tensor | None = None
) -> tuple[OutputSpec, ...]:
    return (((rows.size(0), w.size(1)), rows.dtype),)


def _launch(
    outputs: tuple[Tensor], rows: Tensor, w: Tensor, expert_offsets: Tensor, bias: Tensor | None = None
) -> None:
    outputs[0].copy_(grouped_linear_torch(rows, w, expert_offsets, bias))


grouped_linear = define_op(
    "grouped_linear",
    "Tensor rows, Tensor w, Tensor expert_offsets, Tensor? bias=None",
    ("out",),
    check=_check,
    outputs=_outputs,
    torch_impl=grouped_linear_torch,
    launch=_launch,
    autocast=True,
)
