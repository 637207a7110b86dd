"""Finalize from the batched format: gather each token's rows, weight them, and sum.

Args:
    batch: (E, max_num_tokens, K), the experts' outputs, any strides.
    topk_weights: (M, topk), floating point.
    batch_rows: (M, topk) int32, from ``batch_tokens``. Slots of -1 contribute exactly nothing.
    apply_weights: False sums without weighting (the weights were applied to the input).

Returns:
    (M, K) in batch's dtype, contiguous. Accumulated in float32 in slot order (float64 for float64), rounded once. Rows
    that no slot names are never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.kernels import reduce_batch as kernels
from compile_moe.ops.problem_size import (
    check_batch_size,
    check_device,
    check_float_dtype,
    require,
    require_type,
    shape,
)
from compile_moe.ops.registry import OutputSpec, define_op
from compile_moe.ops.weight_and_reduce import check_topk_weights


def _check(batch: Tensor, topk_weights: Tensor, batch_rows: Tensor, apply_weights: bool = True) -> None:
    require(
        batch.dim() == 3 and batch.size(0) >= 1,
        lambda: (
            f"the experts' batch must be (E, max_num_tokens, K) with at least one expert, got {shape(batch)}"
        ),
    )
    check_float_dtype("batch", batch)
    check_batch_size(batch.size(0), batch.size(1))
    require(
        batch_rows.dim() == 2 and batch_rows.size(1) >= 1,
        lambda: f"batch_rows must be (M, topk) with topk at least 1, got {shape(batch_rows)}",
    )
    require_type(batch_rows.dtype is torch.int32, lambda: f"batch_rows must be int32, got {batch_rows.dtype}")
    check_topk_weights(topk_weights, batch)
    check_device("batch", batch, batch_rows=batch_rows)
    require(
        topk_weights.dim() == 2
        and topk_weights.size(1) == batch_rows.size(1)
        and topk_weights.size(0) == batch_rows.size(0),
        lambda: f"topk_weights must be (M, topk) = {shape(batch_rows)}, got {shape(topk_weights)}",
    )


def _outputs(
    batch: Tensor, topk_weights: Tensor, batch_rows: Tensor, apply_weights: bool = True
) -> tuple[OutputSpec, ...]:
    return (((batch_rows.size(0), batch.size(2)), batch.dtype),)


def _torch(batch: Tensor, topk_weights: Tensor, batch_rows: Tensor, apply_weights: bool = True) -> Tensor:
    compute_dtype = torch.float64 if batch.dtype is torch.float64 else torch.float32
    rows = batch.flatten(0, 1)
    is_placed = (batch_rows >= 0) & (batch_rows < rows.size(0))
    terms = rows[torch.where(is_placed, batch_rows, 0).long()].to(compute_dtype)
    terms = torch.where(is_placed.unsqueeze(-1), terms, 0)
    if apply_weights:
        terms = terms * torch.where(is_placed, topk_weights, 0).to(compute_dtype).unsqueeze(-1)
    return terms.sum(1).to(batch.dtype)


def _launch(
    outputs: tuple[Tensor],
    batch: Tensor,
    topk_weights: Tensor,
    batch_rows: Tensor,
    apply_weights: bool = True,
) -> None:
    kernels.reduce_batch(outputs[0], batch, topk_weights, batch_rows, apply_weights)


reduce_batch = define_op(
    "reduce_batch",
    "Tensor batch, Tensor topk_weights, Tensor batch_rows, bool apply_weights=True",
    ("out",),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=_launch,
)
