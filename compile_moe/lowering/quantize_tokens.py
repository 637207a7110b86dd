"""Lowering of quantize_tokens: a reduction for the scales, and the quotients, which fuse with what computes the tokens.

A row's maximum shares the reduction of an RMSNorm, so that both are one kernel. One scale for all tokens is the largest
of these maxima: the op gets them, and reads the tokens once more.

Where there is nothing to fuse with, on a GPU, the op's own kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from compile_moe.lowering.inductor_compat import call, flattened, lower, ops, pointwise, row_maxima
from compile_moe.lowering.ptx import instruction, quotient, writes_ptx
from compile_moe.lowering.stands_alone import is_only_reader, stands_alone
from compile_moe.ops.float8_support import no_float8
from compile_moe.ops.quantize_tokens import quantize_tokens
from compile_moe.quantization import TokenScaling, parse_scaling
from compile_moe.quantization.rounding import LARGEST, LEAST_SCALE

_FLOAT = torch.float32
#: y = x * reciprocal, corrected twice by what is left of x, unless it is no finite number; see
#: ``ops/kernels/token_rounding.py``.
_CORRECTED_QUOTIENT = (
    "{ .reg .f32 x, p, y, e; .reg .pred f; mul.rn.f32 x, $1, $2; mul.rn.f32 p, x, $3; fma.rn.f32 e, p, $4, x; "
    "fma.rn.f32 y, e, $3, p; fma.rn.f32 e, y, $4, x; fma.rn.f32 y, e, $3, y; abs.f32 e, p; "
    "setp.lt.f32 f, e, 0f7f800000; selp.f32 y, y, p, f; copysign.f32 $0, x, y; }"
)
#: Rounded to even, 0 of NaN, and clamped.
_TO_INT8 = "{ .reg .s32 q; cvt.rni.s32.f32 q, $1; max.s32 q, q, -127; min.s32 $0, q, 127; }"
_ZERO, _ONE = sympy.Integer(0), sympy.Integer(1)

Index = Sequence[Any]


def _lowering(
    tokens: Any, scaling: str, scale: Any = None, maxima: Any = None, expert_offsets: Any = None
) -> Any:
    parsed = parse_scaling(scaling)
    m, k = tokens.get_size()
    width = _width(parsed, k)
    is_given = maxima is not None or expert_offsets is not None
    device = tokens.get_device()
    # A computed scale for each token or group, by one kernel, which starts while the one ahead of it ends.
    is_computed = scale is None and parsed.per != "tensor"
    is_own = device.type == "cuda" and is_computed and stands_alone() and is_only_reader()
    if is_given or is_own or width is None or 0 in (m, k) or no_float8(parsed.dtype, device):
        return call(quantize_tokens, tokens, scaling, scale, maxima, expert_offsets)
    load = tokens.make_loader()

    def token(index: Index) -> Any:
        """The element (row, share, column of the share)."""
        row, share, column = index
        return ops.to_dtype(load([row, share * width + column]), _FLOAT)

    def largest(sizes: Sequence[Any]) -> Any:
        def element(index: Index, column: Index) -> Any:
            return token([*index, *([_ZERO] * (2 - len(index))), *column])

        return _largest_magnitudes(tokens, sizes, [width], element)

    if scale is not None:
        scales = _given(scale, k)
    elif parsed.per == "tensor" and m != 1:
        return call(quantize_tokens, tokens, scaling, None, largest([m]))
    else:
        sizes = [_ONE] if parsed.per == "tensor" else [m, _ONE if parsed.per == "token" else k // width]
        scales = _scales(largest(sizes), LARGEST[parsed.dtype])
    load_scale, is_one = scales.make_loader(), len(scales.get_size()) == 1

    def element(index: Index) -> Any:
        x, divisor = token(index), load_scale([_ZERO] if is_one else index[:2])
        # Given scales are any numbers.
        y = quotient(x, divisor, tokens) if scale is not None else _quotient_by_scale(x, divisor, tokens)
        return _rounded(y, parsed.dtype, tokens)

    # In the loops of the maxima.
    quantized = pointwise(tokens, parsed.dtype, [m, k // width, width], element)
    return flattened(quantized, [m, k]), scales


def _width(scaling: TokenScaling, k: Any) -> Any:
    """Columns that share a scale; None where they don't divide a row's, which are no loops of equal lengths."""
    if scaling.per != "group":
        return k
    if not isinstance(k, (int, sympy.Integer)) or k % min(scaling.group_size, k) != 0:
        return None
    return sympy.Integer(min(scaling.group_size, k))


def _largest_magnitudes(
    like: Any, sizes: Sequence[Any], reduced: Sequence[Any], element: Callable[[Index, Index], Any]
) -> Any:
    """float32 tensor of ``sizes``: the largest magnitude of float32 elements; NaN if one is."""
    if not writes_ptx(like):
        return row_maxima(like, _FLOAT, sizes, reduced, lambda *index: ops.abs(element(*index)))

    # As integers, whose maximum is one instruction, where one that NaN wins is four. Not by abs, after which the sign
    # of NaN is anything.
    def bits(*index: Index) -> Any:
        return instruction("and.b32 $0, $1, 0x7fffffff;", element(*index), dtype=torch.int32)

    load = row_maxima(like, torch.int32, sizes, reduced, bits).make_loader()

    def largest(index: Index) -> Any:
        return ops.to_dtype_bitcast(load(index), _FLOAT, src_dtype=torch.int32)

    return pointwise(like, _FLOAT, sizes, largest)


def _scales(magnitudes: Any, largest: float) -> Any:
    load = magnitudes.make_loader()

    def element(index: Index) -> Any:
        scale = quotient(load(index), ops.constant(largest, _FLOAT), magnitudes)
        return ops.maximum(scale, ops.constant(LEAST_SCALE, _FLOAT))

    return pointwise(magnitudes, _FLOAT, magnitudes.get_size(), element)


def _quotient_by_scale(x: Any, scale: Any, like: Any) -> Any:
    """``quotient`` by a computed scale of tokens, of which those that share it take one reciprocal."""
    if not writes_ptx(like):
        return quotient(x, scale, like)

    def constant(value: float) -> Any:
        return ops.constant(value, _FLOAT)

    factor = ops.where(ops.lt(scale, constant(2.0**-60)), constant(2.0**64), constant(1.0))
    divisor = ops.mul(scale, factor)
    negative = ops.where(ops.eq(scale, constant(float("inf"))), constant(0.0), ops.neg(divisor))
    reciprocal = instruction("rcp.rn.f32 $0, $1;", divisor)
    return instruction(_CORRECTED_QUOTIENT, x, factor, reciprocal, negative)


def _given(scale: Any, k: Any) -> Any:
    """Static scales (1,), copied; or (M, 1)."""
    load = scale.make_loader()
    if len(scale.get_size()) == 1:
        return pointwise(scale, _FLOAT, scale.get_size(), load)
    # The largest of k equal numbers: where it belongs to a reduction over the row, what computes a row's scale is in
    # the kernel that quantizes the row. A copy would be a kernel of its own, as it has other sizes.
    return row_maxima(scale, _FLOAT, scale.get_size(), [k], lambda index, column: load(index))


def _rounded(y: Any, dtype: torch.dtype, like: Any) -> Any:
    """As :func:`compile_moe.quantization.rounding.round_to`.

    Quotients by a computed scale are clamped, too: a scale may come of numbers that inductor rounds where it stores
    them, and loads again to divide them.
    """
    if writes_ptx(like):
        if dtype is torch.int8:
            return ops.to_dtype(instruction(_TO_INT8, y, dtype=torch.int32), dtype, torch.int32)
        # Triton's conversion, cvt.satfinite, clamps.
        return ops.to_dtype(y, dtype, src_dtype=_FLOAT)
    largest = LARGEST[dtype]
    y = ops.minimum(ops.maximum(y, ops.constant(-largest, _FLOAT)), ops.constant(largest, _FLOAT))
    if dtype is torch.int8:
        y = ops.round(ops.where(ops.isnan(y), ops.constant(0.0, _FLOAT), y))
    return ops.to_dtype(y, dtype, src_dtype=_FLOAT)


def register() -> None:
    lower(quantize_tokens, _lowering)
