"""Callables into epilogues: random pointwise expressions, the shapes that models write, and refusals with reasons."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn

from compile_moe.activation_tracing import trace, trace_cached
from compile_moe.ops.epilogue import parse
from compile_moe.ops.graph_to_epilogue import NotPointwise, program_of
from tests.support import pointwise

NUM_COLUMNS = 14


def assert_traced(activation: Callable[[Tensor], Tensor], gate_up: Tensor) -> None:
    """It has a program, which computes in float64 what the callable does."""
    text, reason = trace(activation, None, gate_up.size(1))
    assert reason == ""
    expected = activation(gate_up.clone()).to(gate_up.dtype)
    torch.testing.assert_close(parse(text).evaluate(gate_up), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", pointwise.ALL)
def test_pointwise_functions(name: str) -> None:
    assert_traced(pointwise.ALL[name], torch.randn(50, NUM_COLUMNS, dtype=torch.float64) * 2)


@pytest.mark.parametrize("name", pointwise.ALL)
def test_special_values(name: str) -> None:
    """Every pair of zeros, infinities, NaN, large, small and whole numbers as gate and up."""
    special = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 1e3, -1e3, 1e-5, torch.inf, -torch.inf, torch.nan]
    values = torch.tensor(special, dtype=torch.float64)
    assert_traced(pointwise.ALL[name], torch.cartesian_prod(values, values))


@settings(max_examples=150)
@given(split=st.sampled_from(sorted(pointwise.SPLITS)), expression=pointwise.EXPRESSIONS)
def test_random_expressions(split: str, expression: Any) -> None:
    """A random tree over gate and up."""
    activation = pointwise.activation_of(split, expression)
    if activation(torch.randn(1, NUM_COLUMNS)).isnan().all():
        hypothesis.reject()
    assert_traced(activation, torch.randn(11, NUM_COLUMNS, dtype=torch.float64))


def test_default_device_makes_no_difference() -> None:
    """Constants are read while tracing, which a device without them would prevent."""
    with torch.device("meta"):
        text, reason = trace(lambda x: x * torch.tensor(1.5), None, 8)
    assert (text, reason) == ("ungated; t0 = mul(gate, 1.5); return t0", "")


def test_numbers_outside_float32() -> None:
    """Torch refuses them when the callable runs; a program rounds them."""
    text, _ = trace(lambda x: x.clamp(max=1e300) * 1e-46, None, 4)
    gate_up = torch.randn(3, 4)
    torch.testing.assert_close(parse(text).evaluate(gate_up), gate_up * 0)


BUFFER = torch.ones(4)

REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "softmax": (lambda x: x.softmax(-1), "_softmax.* is not a pointwise operation"),
    "sum": (lambda x: x[:, :4] * x.sum(-1, keepdim=True), "sum.* is not a pointwise operation"),
    "matmul": (lambda x: x @ x.t(), "is not a pointwise operation|transpose|aten.t"),
    "quarters": (lambda x: x[..., :2] * x[..., 2:4], "combines elements 0 and 2 of gate and up"),
    "mixed layouts": (
        lambda x: x[..., ::2] * x.chunk(2, -1)[0],
        "combines elements 1 and 2 of gate and up, which are 4 each and concatenated",
    ),
    "ungated columns": (lambda x: x[:, :3] * 2, r"returns \(7, 3\) for rows of gate and up of 4"),
    "reversed": (lambda x: torch.cat([x[:, 2:4], x[:, :2]], -1), "in another order than gate and up"),
    "half and whole": (lambda x: x.chunk(2, -1)[0] * x.sum(), "is not a pointwise operation"),
    "rows": (lambda x: x[:3] * 2, "selects rows"),
    "one row": (lambda x: x[0] * x, "selects rows"),
    "rows merged": (lambda x: x.view(-1, 4)[::2] * 2, "view.* moves elements between rows"),
    "rows split": (lambda x: torch.cat([x, x])[:7], "concatenates rows"),
    "captured tensor": (lambda x: x[:, :4] * BUFFER.to(x.device), "uses a captured tensor"),
    "captured number": (lambda x: x[:, :4] * BUFFER[0], "uses a captured tensor"),
    "constant": (lambda x: torch.zeros_like(x), "returns 0.0 everywhere"),
    "computed constant": (lambda x: x**0, "returns 1.0 everywhere"),
    "two outputs": (lambda x: x.chunk(2, -1), "must return one tensor"),
    "integers": (lambda x: x.chunk(2, -1)[0].int(), "casts to torch.int32"),
    "large integers": (lambda x: ((x > 0) + 2**25) * x, "add.* computes in torch.int64"),
    "small integers": (lambda x: ((x > 0).to(torch.int8) + 127) * x, "add.* computes in torch.int8"),
    "unsigned integers": (lambda x: -(x > 0).to(torch.uint8) * x, "computes in torch.uint8"),
    "divided integers": (lambda x: ((x > 0) // 2) * x, "floor_divide.* computes in torch.int64"),
    "bits of integers": (lambda x: ((x > 0).int() & 3) * x, "bitwise_and.* works on the bits"),
    "complex": (lambda x: (x * 1j).real, "complex"),
    "numbers of a dtype": (lambda x: x.nan_to_num(), "nan_to_num.* needs posinf and neginf"),
    "fp8": (lambda x: x.to(torch.float8_e4m3fn).to(x.dtype), "casts to torch.float8_e4m3fn"),
    "random": (lambda x: F.dropout(x, 0.5), "is not a pointwise operation|raised"),
    "random slope": (lambda x: F.rrelu(x, training=True), "is not a pointwise operation|random"),
    "data-dependent": (lambda x: x * 2 if x.sum() > 0 else x, "raised"),
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
    assert text == "" and "7 columns, which have no halves" in reason


def test_steps_that_nothing_reads_are_left_out() -> None:
    text, _ = trace(lambda x: x.tanh().chunk(2, -1)[0], None, 8)
    assert text == "concatenated; t0 = tanh(gate); return t0"


def test_masks_become_numbers_where_torch_makes_them() -> None:
    text, _ = trace(lambda x: (x > 0).float() + (x > 1).float(), None, 8)
    assert text == (
        "ungated; t0 = gt(gate, 0.0); t1 = where(t0, 1.0, 0.0); "
        "t2 = gt(gate, 1.0); t3 = where(t2, 1.0, 0.0); t4 = add(t1, t3); return t4"
    )


def test_buffers_are_no_constants() -> None:
    """A graph compiled ahead of time has them as attributes, and they may change; a number in the code can't."""
    x = torch.empty(7, 8, device="meta")
    module = nn.Module()
    module.register_buffer("scale", torch.tensor(1.5))
    graph = fx.Graph(module)
    columns, scale = graph.placeholder("columns"), graph.get_attr("scale")
    product = graph.call_function(torch.ops.aten.mul.Tensor, (columns, scale))
    for node, value in ((columns, x), (scale, module.scale), (product, x)):
        node.meta["val"] = value
    with pytest.raises(NotPointwise, match="scale is a captured tensor"):
        program_of(columns, product)
    scale.replace_all_uses_with(copy := graph.call_function(torch.ops.aten.lift_fresh_copy.default, (scale,)))
    copy.args, copy.meta["val"] = (scale,), module.scale
    product.prepend(copy)
    assert program_of(columns, product).text() == "ungated; t0 = mul(gate, 1.5); return t0"


LIMITS = {"gate": 1.0}
BOUNDS = types.ModuleType("bounds")


def limited_by_a_dict(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate.clamp(max=LIMITS["gate"]) * up


def limited_by_a_module(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate.clamp(max=BOUNDS.limit) * up


NESTED = {"limits": {"gate": [1.0]}}


def limited_by_a_nested_dict(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate.clamp(max=NESTED["limits"]["gate"][0]) * up


def limit() -> float:
    return LIMITS["gate"]


def limited_by_a_helper(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate.clamp(max=limit()) * up


class LimitedByItsConfiguration(nn.Module):
    """As the experts of transformers read theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(text=types.SimpleNamespace(limit=1.0))

    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate.clamp(max=self.config.text.limit) * up


class LimitedByAnyName(LimitedByItsConfiguration):
    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate.clamp(max=getattr(self.config.text, "_".join(["limit"]))) * up


class LimitedThroughItsMethods(LimitedByItsConfiguration):
    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate.clamp(max=self.bound()) * up

    def bound(self) -> float:
        return self.of_text

    @property
    def of_text(self) -> float:
        return (lambda: (lambda: self.config.text.limit)())()


LIMITED_THROUGH_METHODS = LimitedThroughItsMethods()
LIMITED_BY_ANY_NAME = LimitedByAnyName()
LIMITED_MODULE = LimitedByItsConfiguration()


@pytest.mark.parametrize(
    ("function", "owner"),
    [
        (limited_by_a_dict, None),
        (limited_by_a_module, None),
        (limited_by_a_nested_dict, None),
        (limited_by_a_helper, None),
        (LIMITED_MODULE, None),
        (LIMITED_BY_ANY_NAME, None),
        (LIMITED_THROUGH_METHODS, None),
        (LimitedThroughItsMethods.forward, LIMITED_THROUGH_METHODS),
        (LimitedByItsConfiguration.forward, LIMITED_MODULE),
        (functools.partial(LimitedByItsConfiguration.forward, LIMITED_MODULE), None),
    ],
    ids=[
        "dict",
        "module",
        "nested dict",
        "helper",
        "nn.Module",
        "any name",
        "methods",
        "method through methods",
        "bound method",
        "partial",
    ],
)
def test_changed_numbers_are_traced_anew(function: Callable[..., Tensor], owner: Any) -> None:
    for limit in (1.0, 7.0):
        LIMITS["gate"] = BOUNDS.limit = NESTED["limits"]["gate"][0] = limit
        for module in (LIMITED_MODULE, LIMITED_BY_ANY_NAME, LIMITED_THROUGH_METHODS):
            module.config.text.limit = limit
        text, _ = trace_cached(function, owner, 8)
        assert f"minimum(gate, {limit})" in text
