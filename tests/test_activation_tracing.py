"""Callables into epilogues: random pointwise expressions, the shapes that models write, and refusals with reasons."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from compile_moe.activation_tracing import trace, trace_cached
from compile_moe.ops.epilogue import parse

UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.sigmoid,
    torch.tanh,
    F.silu,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.relu,
    F.relu6,
    F.softplus,
    F.mish,
    F.elu,
    F.selu,
    F.celu,
    F.leaky_relu,
    F.hardswish,
    F.hardsigmoid,
    F.hardtanh,
    F.logsigmoid,
    F.softsign,
    F.tanhshrink,
    F.softshrink,
    F.hardshrink,
    torch.abs,
    torch.neg,
    torch.square,
    torch.sin,
    torch.cos,
    torch.erf,
    lambda x: x.float().to(x.dtype),
    lambda x: x**3,
    lambda x: (x.abs() + 1) ** -2,
    lambda x: (x.abs() + 0.1).sqrt(),
    lambda x: (x * x + 0.5).rsqrt(),
    lambda x: x.clamp(-1, 2),
    lambda x: x.clamp(max=0.5),
    lambda x: torch.exp(-x.abs()),
    lambda x: torch.log1p(x.abs()),
    lambda x: 1 - x,
    lambda x: 2.5 / (x.abs() + 1),
    lambda x: torch.where(x > 0, x, x * 0.1),
    lambda x: torch.where((x > -1) & (x < 1), 0.0, x),
    lambda x: x * (x > 0.3),
]
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.maximum,
    torch.minimum,
    lambda a, b: torch.add(a, b, alpha=0.5),
    lambda a, b: torch.where(a > b, a, b * 2),
    lambda a, b: a / (b.abs() + 1),
    lambda a, b: torch.rsub(a, b, alpha=2),
    lambda a, b: torch.addcmul(a, a, b, value=0.3),
    lambda a, b: torch.lerp(a, b, 0.25),
]
SPLITS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "chunk": lambda x: x.chunk(2, -1),
    "split": lambda x: x.split(x.size(-1) // 2, dim=-1),
    "split sizes": lambda x: x.split([x.size(-1) // 2, x.size(-1) // 2], dim=1),
    "slices": lambda x: (x[..., : x.size(-1) // 2], x[..., x.size(-1) // 2 :]),
    "interleaved": lambda x: (x[..., ::2], x[..., 1::2]),
    "up first in code": lambda x: tuple(reversed((x[:, 1::2], x[:, 0::2]))),
    "ungated": lambda x: (x, x),
}


@settings(max_examples=150)
@given(data=st.data())
def test_random_expressions(data: st.DataObject) -> None:
    """A random tree over gate and up: traced, evaluated in float64, equal to the callable."""
    split = SPLITS[data.draw(st.sampled_from(sorted(SPLITS)), "split")]
    tree = data.draw(
        st.recursive(
            st.sampled_from(["gate", "up"]),
            lambda inner: st.one_of(
                st.tuples(st.integers(0, len(UNARY) - 1), inner),
                st.tuples(st.integers(0, len(BINARY) - 1), inner, inner),
            ),
            max_leaves=8,
        ),
        "expression",
    )

    def activation(gate_up: Tensor) -> Tensor:
        gate, up = split(gate_up)

        def build(node: Any) -> Tensor:
            if isinstance(node, str):
                return gate if node == "gate" else up
            if len(node) == 2:
                return UNARY[node[0]](build(node[1]))
            return BINARY[node[0]](build(node[1]), build(node[2]))

        return build(tree)

    text, reason = trace(activation, None, 14)
    assert reason == ""
    gate_up = torch.randn(11, 14, dtype=torch.float64)
    torch.testing.assert_close(
        parse(text).evaluate(gate_up), activation(gate_up), rtol=1e-6, atol=1e-6, equal_nan=True
    )


BUFFER = torch.ones(4)

REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "softmax": (lambda x: x.softmax(-1), "_softmax.* is not a pointwise operation"),
    "sum": (lambda x: x[:, :4] * x.sum(-1, keepdim=True), "sum.* is not a pointwise operation"),
    "matmul": (lambda x: x @ x.t(), "is not a pointwise operation|transpose|aten.t"),
    "quarters": (lambda x: x[..., :2] * x[..., 2:4], "uses columns 0:2:1 of 8"),
    "mixed layouts": (lambda x: x[..., ::2] * x.chunk(2, -1)[0], "mixes interleaved and concatenated"),
    "half and whole": (lambda x: x.chunk(2, -1)[0] * x.sum(), "is not a pointwise operation"),
    "rows": (lambda x: x[:3] * 2, "selects rows"),
    "captured tensor": (lambda x: x[:, :4] * BUFFER.to(x.device), "raised|captured"),
    "constant": (lambda x: torch.zeros_like(x), "constant"),
    "two outputs": (lambda x: x.chunk(2, -1), "must return one tensor"),
    "integers": (lambda x: x.chunk(2, -1)[0].int(), "casts to torch.int32"),
    "comparison": (lambda x: x.chunk(2, -1)[0] > 0, "returns torch.bool"),
    "fp8": (lambda x: x.to(torch.float8_e4m3fn).to(x.dtype), "casts to torch.float8_e4m3fn"),
    "random": (lambda x: F.dropout(x, 0.5), "is not a pointwise operation|raised"),
    "data-dependent": (lambda x: x * 2 if x.sum() > 0 else x, "raised"),
    "power": (lambda x: x**1.5, "raises to a power"),
    "raises": (lambda x: 1 / 0, "raised ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_what_stopped_them(name: str) -> None:
    import re

    function, pattern = REFUSED[name]
    text, reason = trace(function, None, 8)
    assert text == ""
    assert re.search(pattern, reason), reason


def test_odd_columns_are_no_halves() -> None:
    text, reason = trace(lambda x: x[..., :3] * x[..., 4:], None, 7)
    assert text == "" and "neither halves" in reason


LIMITS = {"gate": 1.0}
BOUNDS = types.ModuleType("bounds")


def limited_by_a_dict(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate.clamp(max=LIMITS["gate"]) * up


def limited_by_a_module(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate.clamp(max=BOUNDS.limit) * up


@pytest.mark.parametrize("function", [limited_by_a_dict, limited_by_a_module])
def test_changed_numbers_are_traced_anew(function: Callable[[Tensor], Tensor]) -> None:
    for limit in (1.0, 7.0):
        LIMITS["gate"] = BOUNDS.limit = limit
        text, _ = trace_cached(function, None, 8)
        assert f"minimum(gate, {limit})" in text
