"""Lowering of quantize_tokens: a reduction for the scales, and the quotients, which fuse with what computes the tokens.

A row's maximum shares the reduction of an RMSNorm, so that both are one kernel. One scale for all tokens is the largest
of these maxima: the op gets them, and reads the tokens once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import sympy
import torch

from compile_moe.lowering.inductor_compat import (
    call,
    floor_div,
    lower,
    ops,
    pointwise,
    quotient,
    row_maxima,
)
from compile_moe.ops.quantize_tokens import no_kernel, quantize_tokens
from compile_moe.quantization import parse_scaling
from compile_moe.quantization.rounding import LARGEST, LEAST_SCALE

_FLOAT = torch.float32
_ZERO, _ONE = sympy.Integer(0), sympy.Integer(1)

Index = Sequence[Any]


class _Scales(NamedTuple):
    """Scales, and the index of that of an element (row, column)."""

    box: Any
    index_of: Callable[[Any, Any], Index]


def _lowering(tokens: Any, scaling: str, scale: Any = None, maxima: Any = None) -> Any:
    parsed = parse_scaling(scaling)
    m, k = tokens.get_size()
    is_ragged = parsed.per == "group" and not _divides(parsed.group_size, k)
    if maxima is not None or is_ragged or k == 0 or no_kernel(parsed.dtype, tokens.get_device()):
        return call(quantize_tokens, tokens, scaling, scale, maxima)
    load = tokens.make_loader()

    def token(row: Any, column: Any) -> Any:
        return ops.to_dtype(load([row, column]), _FLOAT)

    def largest(sizes: Sequence[Any], width: Any) -> Any:
        """Magnitudes of ``width`` columns each; sizes are (M, shares), or (1,) of one token."""

        def element(index: Index, reduced: Index) -> Any:
            share = index[1] if len(sizes) == 2 else _ZERO
            return ops.abs(token(index[0], share * width + reduced[0]))

        return row_maxima(tokens, sizes, [width], element)

    if scale is not None:
        scales = _given(scale, k)
    elif parsed.per == "group":
        width = sympy.Integer(parsed.group_size)
        box = _scales(largest([m, k // width], width), LARGEST[parsed.dtype])
        scales = _Scales(box, lambda row, column: [row, floor_div(column, width)])
    elif parsed.per == "token":
        scales = _Scales(_scales(largest([m, _ONE], k), LARGEST[parsed.dtype]), lambda row, column: [row, _ZERO])
    elif m == 1:
        scales = _Scales(_scales(largest([_ONE], k), LARGEST[parsed.dtype]), lambda row, column: [_ZERO])
    else:
        rows = row_maxima(tokens, [m], [k], lambda index, reduced: ops.abs(token(index[0], reduced[0])))
        return call(quantize_tokens, tokens, scaling, None, rows)
    load_scale = scales.box.make_loader()

    def element(index: Index) -> Any:
        y = quotient(token(*index), load_scale(scales.index_of(*index)), tokens)
        return _rounded(y, parsed.dtype)

    return pointwise(tokens, parsed.dtype, [m, k], element), scales.box


def _divides(width: int, size: Any) -> bool:
    return isinstance(size, (int, sympy.Integer)) and int(size) % width == 0


def _scales(magnitudes: Any, largest: float) -> Any:
    load = magnitudes.make_loader()

    def element(index: Index) -> Any:
        scale = quotient(load(index), ops.constant(largest, _FLOAT), magnitudes)
        return ops.maximum(scale, ops.constant(LEAST_SCALE, _FLOAT))

    return pointwise(magnitudes, _FLOAT, magnitudes.get_size(), element)


def _given(scale: Any, k: Any) -> _Scales:
    """Static scales (1,), copied; or (M, 1)."""
    load = scale.make_loader()
    if len(scale.get_size()) == 1:
        return _Scales(pointwise(scale, _FLOAT, scale.get_size(), load), lambda row, column: [_ZERO])
    # The largest of k equal numbers: where it belongs to a reduction over the row, what computes a row's scale is in
    # the kernel that quantizes the row. A copy would be a kernel of its own, as it has other sizes.
    box = row_maxima(scale, scale.get_size(), [k], lambda index, reduced: load(index))
    return _Scales(box, lambda row, column: [row, _ZERO])


def _rounded(y: Any, dtype: torch.dtype) -> Any:
    """As :func:`compile_moe.quantization.rounding.round_to`."""
    largest = LARGEST[dtype]
    y = ops.minimum(ops.maximum(y, ops.constant(-largest, _FLOAT)), ops.constant(largest, _FLOAT))
    if dtype is torch.int8:
        y = ops.round(ops.where(ops.isnan(y), ops.constant(0.0, _FLOAT), y))
    return ops.to_dtype(y, dtype, src_dtype=_FLOAT)


def register() -> None:
    lower(quantize_tokens, _lowering)
