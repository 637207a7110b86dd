"""A weighted sum over a token's slots, unrolled over topk.

Unrolled rather than a reduction: inductor turns reductions of 8 and more into loops of their own, which can't join the
reduction of an RMSNorm behind them. Unrolled, finalize, residual add and RMSNorm are one kernel for every topk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from compile_moe.lowering.inductor_compat import ops, pointwise, static_int


def in_range(value: Any, bound: Any, dtype: torch.dtype) -> Any:
    """Whether a value of an integer dtype is at least 0 and less than a bound."""
    bound = ops.index_expr(sympy.sympify(bound), dtype)
    return ops.logical_and(ops.ge(value, ops.constant(0, dtype)), ops.lt(value, bound))


def weighted_sum(
    terms: Any,
    topk_weights: Any,
    sizes: tuple[Any, Any, Any],
    load_term: Callable[[Any, Any, Any], Any],
    is_valid: Callable[[Any, Any], Any] | None,
    apply_weights: bool,
    many_invalid: bool = False,
) -> Any:
    """(M, K) in the dtype of the terms, accumulated in float32 (float64 for float64).

    Args:
        sizes: M, topk, K.
        load_term: of token, slot of the token, column.
        is_valid: of token, slot of the token; None: all are.
        many_invalid: such slots are not even loaded. The others are then loaded later: when it is known which they are.
    """
    m, topk, k = sizes
    slots_of_token = range(static_int(topk))
    dtype = terms.get_dtype()
    compute_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    load_weight = topk_weights.make_loader()

    def element(index: Sequence[Any]) -> Any:
        token, column = index
        total = None
        for j in map(sympy.Integer, slots_of_token):

            def load(j: Any = j) -> Any:
                return ops.to_dtype(load_term(token, j, column), compute_dtype)

            valid = None if is_valid is None else is_valid(token, j)
            skips_load = valid is not None and many_invalid
            term = ops.masked(valid, load, 0.0) if skips_load else load()
            if apply_weights:
                term = ops.mul(term, ops.to_dtype(load_weight([token, j]), compute_dtype))
            if valid is not None and (apply_weights or not skips_load):
                # Selects, so that nothing of an unwritten slot, nor a weight of it, not even NaN, gets through.
                term = ops.where(valid, term, ops.constant(0.0, compute_dtype))
            total = term if total is None else ops.add(total, term)
        return ops.to_dtype(total, dtype)

    return pointwise(terms, dtype, [m, k], element)
