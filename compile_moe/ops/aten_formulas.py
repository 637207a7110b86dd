"""Pointwise operations of aten as steps of an epilogue.

A formula takes a :class:`StepBuilder` and the operation's arguments, with values in the place of tensors. It need not
ask what kind its operands are: the builder promotes booleans as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from compile_moe.ops.epilogue_builder import StepBuilder, Value

aten = torch.ops.aten


class NotPointwise(Exception):
    """A graph has no form as an epilogue; the message says why."""


Formula = Callable[..., Value]


def _same(op: str) -> Formula:
    def formula(e: StepBuilder, *operands: Value) -> Value:
        return e(op, *operands)

    return formula


def _add(e: StepBuilder, a: Value, b: Value, alpha: float = 1) -> Value:
    return e("add", a, b if alpha == 1 else e("mul", b, alpha))


def _sub(e: StepBuilder, a: Value, b: Value, alpha: float = 1) -> Value:
    return e("sub", a, b if alpha == 1 else e("mul", b, alpha))


def _rsub(e: StepBuilder, a: Value, b: Value, alpha: float = 1) -> Value:
    return _sub(e, b, a, alpha)


def _addcmul(e: StepBuilder, base: Value, a: Value, b: Value, *, value: float = 1) -> Value:
    return _add(e, base, e("mul", a, b), value)


def _addcdiv(e: StepBuilder, base: Value, a: Value, b: Value, *, value: float = 1) -> Value:
    return _add(e, base, e("div", a, b), value)


def _lerp(e: StepBuilder, a: Value, b: Value, weight: Value) -> Value:
    difference = e("sub", b, a)
    from_a = e("add", a, e("mul", weight, difference))
    from_b = e("sub", b, e("mul", difference, e("sub", 1.0, weight)))
    return e("where", e("lt", e("abs", weight), 0.5), from_a, from_b)


def _div(e: StepBuilder, a: Value, b: Value, *, rounding_mode: str | None) -> Value:
    if rounding_mode == "floor":
        return _floor_divide(e, a, b)
    quotient = e("div", a, b)
    return quotient if rounding_mode is None else e("trunc", quotient)


def _xor(e: StepBuilder, a: Value, b: Value) -> Value:
    return e("logical_and", e("logical_or", a, b), e("logical_not", e("logical_and", a, b)))


def _fmod_and_sign_differs(e: StepBuilder, a: Value, b: Value) -> tuple[Value, Value]:
    rest = e("fmod", a, b)
    differs = _xor(e, e("lt", rest, 0.0), e("lt", b, 0.0))
    return rest, e("logical_and", e("ne", rest, 0.0), differs)


def _remainder(e: StepBuilder, a: Value, b: Value) -> Value:
    rest, sign_differs = _fmod_and_sign_differs(e, a, b)
    return e("where", sign_differs, e("add", rest, b), rest)


def _floor_divide(e: StepBuilder, a: Value, b: Value) -> Value:
    """As torch's kernels do it: the quotient's rounding moves no exact result to the integer above."""
    rest, sign_differs = _fmod_and_sign_differs(e, a, b)
    exact = e("div", e("sub", a, rest), b)
    exact = e("where", sign_differs, e("sub", exact, 1.0), exact)
    floor = e("floor", exact)
    floor = e("where", e("gt", e("sub", exact, floor), 0.5), e("add", floor, 1.0), floor)
    quotient = e("div", a, b)
    floor = e("where", e("eq", exact, 0.0), e("copysign", 0.0, quotient), floor)
    return e("where", e("eq", b, 0.0), quotient, floor)


#: Up to here inductor multiplies for an integer power too.
_MOST_MULTIPLIED = 31


def _pow(e: StepBuilder, base: Value, exponent: Value) -> Value:
    if isinstance(exponent, str):
        if base == 1:
            return 1.0
        return e("exp2", exponent) if base == 2 else e("pow", base, exponent)
    exponent = float(exponent)
    if exponent == 0:
        return 1.0
    if abs(exponent) == 0.5:
        return e("sqrt" if exponent > 0 else "rsqrt", base)
    if not exponent.is_integer() or abs(exponent) > _MOST_MULTIPLIED:
        return e("pow", base, exponent)
    power = _integer_power(e, base, int(abs(exponent)))
    return e("reciprocal", power) if exponent < 0 else power


def _integer_power(e: StepBuilder, base: Value, exponent: int) -> Value:
    if exponent == 1:
        return base
    half = _integer_power(e, base, exponent // 2)
    square = e("mul", half, half)
    return e("mul", square, base) if exponent % 2 else square


def _clamp(e: StepBuilder, x: Value, min: Value | None = None, max: Value | None = None) -> Value:
    if min is not None:
        x = e("maximum", x, min)
    return x if max is None else e("minimum", x, max)


def _isnan(e: StepBuilder, x: Value) -> Value:
    return e("ne", x, x)


def _fmax(e: StepBuilder, a: Value, b: Value, op: str = "maximum") -> Value:
    return e("where", _isnan(e, a), b, e("where", _isnan(e, b), a, e(op, a, b)))


def _fmin(e: StepBuilder, a: Value, b: Value) -> Value:
    return _fmax(e, a, b, "minimum")


def _sign(e: StepBuilder, x: Value) -> Value:
    return e("where", e("gt", x, 0.0), 1.0, e("where", e("lt", x, 0.0), -1.0, 0.0))


def _round(e: StepBuilder, x: Value, *, decimals: int) -> Value:
    scale = 10.0 ** abs(decimals)
    there, back = ("mul", "div") if decimals > 0 else ("div", "mul")
    return e(back, e("round", e(there, x, scale)), scale)


def _silu(e: StepBuilder, x: Value) -> Value:
    return e("mul", x, e("sigmoid", x))


def glu(e: StepBuilder, a: Value, b: Value) -> Value:
    """Of the two halves that ``aten.glu`` takes as one tensor."""
    return e("mul", a, e("sigmoid", b))


def _nan_to_num(
    e: StepBuilder,
    x: Value,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> Value:
    if posinf is None or neginf is None:
        raise NotPointwise("needs posinf and neginf: without them it gives numbers of a dtype")
    finite = e("where", e("eq", x, -math.inf), neginf, e("where", e("eq", x, math.inf), posinf, x))
    return e("where", _isnan(e, x), nan or 0.0, finite)


def _rrelu(
    e: StepBuilder,
    x: Value,
    noise: Value,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: None = None,
) -> Value:
    if training:
        raise NotPointwise("draws random numbers in training")
    return e("where", e("gt", x, 0.0), x, e("mul", x, (lower + upper) / 2))


def where(e: StepBuilder, condition: Value, a: Value, b: Value) -> Value:
    return e("where", condition, a, b)


_OF_THE_SAME_NAME = (
    *("neg", "abs", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal"),
    *(
        "sigmoid",
        "erf",
        "erfc",
        "erfinv",
        "lgamma",
        "sin",
        "cos",
        "tan",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
    ),
    *("tanh", "asinh", "acosh", "atanh", "floor", "ceil", "trunc", "round", "logical_and", "logical_or"),
    *("logical_not", "maximum", "minimum", "atan2", "hypot"),
)
_OF_THE_SAME_NAME_WITH_SCALARS = ("mul", "div", "fmod", "copysign", "lt", "le", "gt", "ge", "eq", "ne")

FORMULAS: dict[Any, Formula] = {
    **{getattr(aten, name).default: _same(name) for name in _OF_THE_SAME_NAME},
    **{
        getattr(getattr(aten, name), overload): _same(name)
        for name in _OF_THE_SAME_NAME_WITH_SCALARS
        for overload in ("Tensor", "Scalar")
    },
    **{getattr(aten.add, overload): _add for overload in ("Tensor", "Scalar")},
    **{getattr(aten.sub, overload): _sub for overload in ("Tensor", "Scalar")},
    **{getattr(aten.rsub, overload): _rsub for overload in ("Tensor", "Scalar")},
    **{getattr(aten.lerp, overload): _lerp for overload in ("Tensor", "Scalar")},
    **{getattr(aten.div, overload): _div for overload in ("Tensor_mode", "Scalar_mode")},
    **{getattr(aten.remainder, o): _remainder for o in ("Tensor", "Scalar", "Scalar_Tensor")},
    **{getattr(aten.pow, o): _pow for o in ("Tensor_Tensor", "Tensor_Scalar", "Scalar")},
    **{getattr(aten.clamp, overload): _clamp for overload in ("default", "Tensor")},
    **{getattr(aten.clamp_min, overload): _same("maximum") for overload in ("default", "Tensor")},
    **{getattr(aten.clamp_max, overload): _same("minimum") for overload in ("default", "Tensor")},
    **{getattr(aten.where, o): where for o in ("self", "ScalarOther", "ScalarSelf", "Scalar")},
    aten.addcmul.default: _addcmul,
    aten.addcdiv.default: _addcdiv,
    aten.floor_divide.default: _floor_divide,
    aten.floor_divide.Scalar: _floor_divide,
    aten.fmax.default: _fmax,
    aten.fmin.default: _fmin,
    aten.logical_xor.default: _xor,
    aten.round.decimals: _round,
    aten.sign.default: _sign,
    aten.sgn.default: _sign,
    aten.isnan.default: _isnan,
    aten.isinf.default: lambda e, x: e("eq", e("abs", x), math.inf),
    aten.signbit.default: lambda e, x: e("lt", e("copysign", 1.0, x), 0.0),
    aten.frac.default: lambda e, x: e("sub", x, e("trunc", x)),
    aten.square.default: lambda e, x: e("mul", x, x),
    aten.relu.default: lambda e, x: e("maximum", x, 0.0),
    aten.silu.default: _silu,
    aten.nan_to_num.default: _nan_to_num,
    aten.rrelu_with_noise.default: _rrelu,
}
#: On integers they work bit by bit, which no number of an epilogue can.
BITWISE: dict[Any, Formula] = {
    aten.bitwise_not.default: _same("logical_not"),
    **{getattr(aten.bitwise_and, o): _same("logical_and") for o in ("Tensor", "Scalar")},
    **{getattr(aten.bitwise_or, o): _same("logical_or") for o in ("Tensor", "Scalar")},
    **{getattr(aten.bitwise_xor, o): _xor for o in ("Tensor", "Scalar")},
}
