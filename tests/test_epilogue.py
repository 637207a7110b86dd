"""The epilogue language: canonical text, parsing, and named activations as programs."""

from __future__ import annotations

import pytest
import torch

from compile_moe.ops.epilogue import VOCABULARY, evaluate_steps, parse
from compile_moe.ops.named_activations import NAMES, program_text, resolve
from tests.support.oracle import ACTIVATIONS


@pytest.mark.parametrize("name", NAMES)
def test_text_round_trips(name: str) -> None:
    text = program_text(name)
    assert parse(text).text() == text
    assert resolve(name) == resolve(text) == text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_named_activations_are_torchs(name: str, dtype: torch.dtype) -> None:
    """One rounding to the dtype, whatever it is, from float32."""
    gate_up = (torch.randn(50, 26) * 6).to(dtype)
    exact = ACTIVATIONS[name](gate_up.double())
    result = parse(program_text(name)).evaluate(gate_up)
    assert result.dtype is dtype
    eps = {torch.float64: 1e-14}.get(dtype, 4 * torch.finfo(dtype).eps)
    # Of the largest value: 1 + erf(x) loses digits where it is small.
    torch.testing.assert_close(result.double(), exact, rtol=eps, atol=eps * exact.abs().max().item())


def test_nan_and_infinity_pass_through() -> None:
    gate_up = torch.tensor([[torch.nan, 1.0, torch.inf, 1.0], [1.0, torch.nan, -torch.inf, 2.0]])
    for name in ("swigluoai", "relu2", "silu"):
        torch.testing.assert_close(
            parse(program_text(name)).evaluate(gate_up), ACTIVATIONS[name](gate_up), equal_nan=True
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with"),
        ("silu", "must begin with"),
        ("sideways; return gate", "must begin with"),
        ("concatenated; t1 = exp(gate); return t1", "step 0"),
        ("concatenated; t0 = exec(gate); return t0", "op must be one of"),
        ("concatenated; t0 = exp(gate, up); return t0", "takes 1 operands"),
        ("ungated; t0 = exp(up); return t0", "operand must be gate or a number|operand must be"),
        ("concatenated; t0 = exp(t0); return t0", "operand must be"),
        ("concatenated; t0 = exp(gate)); return t0", "step 0"),
        ("concatenated; t0 = exp(gate); return t1", "must end with"),
        ("concatenated; t0 = exp(gate); t0", "must end with"),
    ],
)
def test_what_is_no_program_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_source_holds_nothing_but_the_vocabulary() -> None:
    """The text becomes Triton source: only known operations, names and numbers get through the parser."""
    with pytest.raises(ValueError, match="operand"):
        parse("ungated; t0 = exp(__import__); return t0")
    assert (
        parse("ungated; t0 = add(gate, inf); return t0").triton_source()
        == 't0 = (gate + float("inf"))\nreturn t0'
    )


def test_vocabulary_matches_torch() -> None:
    for name, op in VOCABULARY.items():
        operands = ", ".join(["gate", "up", "0.5"][: op.arity])
        steps = "t0 = gt(gate, up); " if op.arity == 3 else ""
        operands = "t0, gate, 0.5" if op.arity == 3 else operands
        last = "t1" if steps else "t0"
        program = parse(f"concatenated; {steps}{last} = {name}({operands}); return {last}")
        x = torch.rand(4, 6, dtype=torch.float64) + 0.1
        arguments = [x[:, :3], x[:, 3:], torch.tensor(0.5, dtype=torch.float64)][: op.arity]
        if op.arity == 3:
            arguments = [x[:, :3] > x[:, 3:], x[:, :3], arguments[2]]
        expected = op.torch_function(*arguments).to(x.dtype)
        torch.testing.assert_close(evaluate_steps(*program.as_tuples(), x), expected)
