"""Epilogues: gated activations as short canonical programs, the ``str`` argument that the GEMM op carries.

A program is one line of text. It names how gate and up lie in the N columns of a row, then computes, step by
step, one output element from one gate and one up element:

    concatenated; t0 = sigmoid(gate); t1 = mul(gate, t0); t2 = mul(t1, up); return t2

Layouts: ``concatenated`` (gate columns 0..I-1, then up), ``interleaved`` (gate at even columns, up at odd),
``ungated`` (every column is a ``gate``; I = N). The empty text is no epilogue: columns pass through. Operands are
gate, up, earlier steps and float literals. Everything is computed in float32 (float64 for float64 input), but
comparisons, which give booleans: only logical operations and the condition of ``where`` take these, and nothing else.

One text serves all: the CPU evaluates it with torch functions, the Triton kernels get it as source, and the
inductor lowering replays it, so a compiled kernel is a function of its text alone.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["concatenated", "interleaved", "ungated"]
Operand = str | float
#: Layout, steps and result as nested tuples of strings and numbers: a constant that dynamo can hold.
ProgramTuples = tuple[Layout, tuple[tuple[str, tuple[Operand, ...]], ...], str]


@dataclass(frozen=True)
class PointwiseOp:
    """One operation of the vocabulary: its torch function and its Triton text over {0}, {1}, {2}.

    Its first ``num_booleans`` operands are booleans, the others numbers; so is its result, by ``gives_boolean``.
    """

    arity: int
    torch_function: Callable[..., Tensor]
    triton: str
    num_booleans: int = 0
    gives_boolean: bool = False


def _compares(function: Callable[..., Tensor], triton: str) -> PointwiseOp:
    return PointwiseOp(2, function, triton, gives_boolean=True)


def _combines(arity: int, function: Callable[..., Tensor], triton: str) -> PointwiseOp:
    return PointwiseOp(arity, function, triton, num_booleans=arity, gives_boolean=True)


def _libdevice(name: str, arity: int = 1) -> PointwiseOp:
    """What torch has under the name of CUDA's function, which torch and inductor call as well."""
    operands = ", ".join(f"{{{i}}}" for i in range(arity))
    return PointwiseOp(arity, getattr(torch, name), f"libdevice.{name}({operands})")


_MAXIMUM = "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_MINIMUM = "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"

#: tl.sigmoid in six instructions less, which take no care of denormals: as an exponential one makes no difference
#: beside 1, and below -87.3, where the result would be one, it is 0.
_SIGMOID = "libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-{0}))"

VOCABULARY: dict[str, PointwiseOp] = {
    "add": PointwiseOp(2, torch.add, "({0} + {1})"),
    "sub": PointwiseOp(2, torch.sub, "({0} - {1})"),
    "mul": PointwiseOp(2, torch.mul, "({0} * {1})"),
    "div": PointwiseOp(2, torch.div, "({0} / {1})"),
    "neg": PointwiseOp(1, torch.neg, "(-{0})"),
    "abs": PointwiseOp(1, torch.abs, "tl.abs({0})"),
    "maximum": PointwiseOp(2, torch.maximum, _MAXIMUM),
    "minimum": PointwiseOp(2, torch.minimum, _MINIMUM),
    "exp": PointwiseOp(1, torch.exp, "tl.exp({0})"),
    "exp2": PointwiseOp(1, torch.exp2, "tl.exp2({0})"),
    "log": PointwiseOp(1, torch.log, "tl.log({0})"),
    "sqrt": PointwiseOp(1, torch.sqrt, "tl.sqrt_rn({0})"),
    "rsqrt": PointwiseOp(1, torch.rsqrt, "tl.rsqrt({0})"),
    "reciprocal": PointwiseOp(1, torch.reciprocal, "(1.0 / {0})"),
    "sigmoid": PointwiseOp(1, torch.sigmoid, _SIGMOID),
    "erf": PointwiseOp(1, torch.erf, "tl.erf({0})"),
    "sin": PointwiseOp(1, torch.sin, "tl.sin({0})"),
    "cos": PointwiseOp(1, torch.cos, "tl.cos({0})"),
    # Halves to even, as torch does; libdevice.round takes them away from zero.
    "round": PointwiseOp(1, torch.round, "libdevice.nearbyint({0})"),
    **{
        name: _libdevice(name)
        for name in (
            *("expm1", "log1p", "log2", "log10", "erfc", "erfinv", "lgamma", "floor", "ceil", "trunc"),
            *("tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh"),
        )
    },
    **{name: _libdevice(name, 2) for name in ("pow", "fmod", "atan2", "hypot", "copysign")},
    "lt": _compares(torch.lt, "({0} < {1})"),
    "le": _compares(torch.le, "({0} <= {1})"),
    "gt": _compares(torch.gt, "({0} > {1})"),
    "ge": _compares(torch.ge, "({0} >= {1})"),
    "eq": _compares(torch.eq, "({0} == {1})"),
    "ne": _compares(torch.ne, "({0} != {1})"),
    "logical_and": _combines(2, torch.logical_and, "({0} & {1})"),
    "logical_or": _combines(2, torch.logical_or, "({0} | {1})"),
    "logical_not": _combines(1, torch.logical_not, "({0} == 0)"),
    "where": PointwiseOp(3, torch.where, "tl.where({0}, {1}, {2})", num_booleans=1),
}


@dataclass(frozen=True)
class Step:
    op: str
    operands: tuple[Operand, ...]


@dataclass(frozen=True)
class Program:
    """A parsed epilogue: step i is named ``t<i>``; ``result`` names a step or an input."""

    layout: Layout
    steps: tuple[Step, ...]
    result: str

    @property
    def gated(self) -> bool:
        return self.layout != "ungated"

    def text(self) -> str:
        """Canonical text; equal programs have equal texts."""
        lines = [
            f"t{i} = {step.op}({', '.join(_operand_text(o) for o in step.operands)})"
            for i, step in enumerate(self.steps)
        ]
        return "; ".join([self.layout, *lines, f"return {self.result}"])

    def evaluate(self, gate_up: Tensor) -> Tensor:
        """Apply the program to (..., N); see :func:`evaluate_steps`."""
        return evaluate_steps(*self.as_tuples(), gate_up)

    def as_tuples(self) -> ProgramTuples:
        """The arguments of :func:`evaluate_steps`."""
        return self.layout, tuple((step.op, step.operands) for step in self.steps), self.result

    def triton_source(self) -> str:
        """Body lines of a Triton function of (gate, up), float32 in and out."""
        lines = [
            f"t{i} = {VOCABULARY[step.op].triton.format(*map(_triton_operand, step.operands))}"
            for i, step in enumerate(self.steps)
        ]
        return "\n".join([*lines, f"return {self.result}"])

    def columns_out(self, n: int) -> int:
        """I for N: half of it where gated."""
        return n // 2 if self.gated else n


def _operand_text(operand: Operand) -> str:
    return operand if isinstance(operand, str) else repr(float(operand))


def _triton_operand(operand: Operand) -> str:
    if isinstance(operand, str):
        return operand
    # Triton takes a literal outside the normal numbers of float32 as float64, and whatever meets it too.
    value = float(operand)
    if abs(value) > _LARGEST:
        value = math.copysign(math.inf, value)
    if not math.isfinite(value):
        return f'float("{value!r}")'
    # A cast, and not tl.full, which wants a layout in Gluon.
    return f"tl.cast({value!r}, tl.float32)" if 0 < abs(value) < _SMALLEST_NORMAL else repr(value)


_LARGEST = torch.finfo(torch.float32).max
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_STEP = re.compile(r"t(\d+) = (\w+)\(([^()]*)\)")


@functools.cache
def parse(text: str) -> Program:
    """Parse a program's text.

    Raises:
        ValueError: naming the part that is no program.
    """
    layout, *steps, last = [part.strip() for part in text.split(";")] if ";" in text else [text, ""]
    if layout not in ("concatenated", "interleaved", "ungated"):
        raise ValueError(
            f"epilogue must begin with concatenated, interleaved or ungated, got {layout!r} in {text!r}"
        )
    names = {"gate"} if layout == "ungated" else {"gate", "up"}
    booleans: set[str] = set()
    parsed = []
    for i, line in enumerate(steps):
        match = _STEP.fullmatch(line)
        if match is None or int(match[1]) != i:
            raise ValueError(f"epilogue step {i} must read 't{i} = op(operand, ...)', got {line!r}")
        if match[2] not in VOCABULARY:
            raise ValueError(f"epilogue op must be one of {', '.join(VOCABULARY)}, got {match[2]!r}")
        operands = tuple(_parse_operand(o.strip(), names, line) for o in match[3].split(","))
        if len(operands) != VOCABULARY[match[2]].arity:
            raise ValueError(f"{match[2]} takes {VOCABULARY[match[2]].arity} operands, got {line!r}")
        _check_kinds(VOCABULARY[match[2]], operands, booleans, line)
        parsed.append(Step(match[2], operands))
        names.add(f"t{i}")
        if VOCABULARY[match[2]].gives_boolean:
            booleans.add(f"t{i}")
    result = last.removeprefix("return ")
    if result == last or result not in names:
        raise ValueError(f"epilogue must end with 'return <gate, up or a step>', got {last!r}")
    if result in booleans:
        raise ValueError(f"epilogue must return a number, got the boolean {result} of {text!r}")
    return Program(layout, tuple(parsed), result)  # type: ignore[arg-type]


def _check_kinds(op: PointwiseOp, operands: tuple[Operand, ...], booleans: set[str], line: str) -> None:
    for i, operand in enumerate(operands):
        if (operand in booleans) != (i < op.num_booleans):
            wanted = "a boolean, which a comparison gives" if i < op.num_booleans else "a number"
            raise ValueError(f"operand {i} must be {wanted}, got {operand!r} in {line!r}")


def _parse_operand(text: str, names: set[str], line: str) -> Operand:
    if text in names:
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"epilogue operand must be {', '.join(sorted(names))} or a number, got {text!r} in {line!r}"
        ) from None


TORCH_FUNCTIONS = {name: op.torch_function for name, op in VOCABULARY.items()}


def evaluate_steps(
    layout: Layout, steps: tuple[tuple[str, tuple[Operand, ...]], ...], result: str, gate_up: Tensor
) -> Tensor:
    """Apply a program to (..., N) in float32 (float64 for float64), rounding once to the input's dtype. Traceable."""
    compute_dtype = torch.float64 if gate_up.dtype is torch.float64 else torch.float32
    columns = gate_up.to(compute_dtype)
    if layout == "ungated":
        values = {"gate": columns}
    elif layout == "interleaved":
        values = {"gate": columns[..., 0::2], "up": columns[..., 1::2]}
    else:
        half = gate_up.size(-1) // 2
        values = {"gate": columns[..., :half], "up": columns[..., half:]}
    for i, (op, operands) in enumerate(steps):
        values[f"t{i}"] = TORCH_FUNCTIONS[op](
            *(
                values[o]
                if isinstance(o, str)
                # By way of float64, which rounds what float32 can't hold instead of refusing it.
                else torch.full((), o, dtype=torch.float64, device=gate_up.device).to(compute_dtype)
                for o in operands
            )
        )
    return values[result].to(gate_up.dtype)
