"""The epilogue language: canonical text, parsing, and named activations as programs."""

from __future__ import annotations

import pytest
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import jit

from compile_moe.ops.epilogue import VOCABULARY, Program, evaluate_steps, parse
from compile_moe.ops.kernels import act_and_mul
from compile_moe.ops.kernels.epilogue import build_epilogue, epilogue, with_globals
from compile_moe.ops.named_activations import NAMES, program_text, resolve
from tests.support.aot import compile_ahead
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
        ("ungated; t0 = gt(gate, 0); t1 = add(t0, gate); return t1", "operand 0 must be a number, got 't0'"),
        ("ungated; t0 = where(gate, 1, 0); return t0", "operand 0 must be a boolean, .* got 'gate'"),
        ("ungated; t0 = logical_not(1); return t0", "operand 0 must be a boolean"),
        ("ungated; t0 = gt(gate, 0); return t0", "must return a number, got the boolean t0"),
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


def program_with(op: str, *numbers: str) -> Program:
    """A program of one operation, which compares gate and up where it needs a boolean."""
    kind = VOCABULARY[op]
    operands = [*["t0"] * kind.num_booleans, *numbers][: kind.arity]
    steps = f"t0 = gt(gate, up); t1 = {op}({', '.join(operands)})"
    steps, last = (f"{steps}; t2 = where(t1, 1.0, 0.0)", "t2") if kind.gives_boolean else (steps, "t1")
    return parse(f"concatenated; {steps}; return {last}")


@pytest.mark.parametrize("op", VOCABULARY)
def test_vocabulary_matches_torch(op: str) -> None:
    x = torch.rand(40, 6, dtype=torch.float64) + 0.1
    gate, up = x[:, :3], x[:, 3:]
    kind = VOCABULARY[op]
    operands = [*[gate > up] * kind.num_booleans, gate, up][: kind.arity]
    expected = kind.torch_function(*operands).to(x.dtype)
    result = evaluate_steps(*program_with(op, "gate", "up").as_tuples(), x)
    torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.parametrize("numbers", ["columns", "literals"])
@pytest.mark.parametrize("op", VOCABULARY)
def test_vocabulary_compiles_for_a_gpu(op: str, numbers: str) -> None:
    """Whatever literals it meets, in float32: its Triton text would spread any float64."""
    operands = {
        "columns": ("gate", "up"),
        "literals": ("gate", "1e-40") if op != "where" else ("1e+300", "nan"),
    }
    program = program_with(op, *operands[numbers])
    out, gate_up = (torch.empty(5, n, dtype=torch.bfloat16, device="meta") for n in (32, 64))
    launch = act_and_mul.launch_for(out, gate_up, program.triton_source(), program.layout)
    options = dict(launch.options)
    compiler = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    compiled = compile_ahead(launch.kernel, launch.args, options, capability=90, **compiler)
    # CUDA's own functions reduce large angles in float64.
    assert op in ("sin", "cos", "tan") or ".f64" not in compiled.ptx


def columns_kernel(out_ptr, x_ptr):
    i = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    x = gl.load(x_ptr + i)
    gl.store(out_ptr + i, epilogue(x, x))


@pytest.mark.parametrize("op", ["mul", "pow", "maximum", "where"])
def test_literals_compile_in_gluon(op: str) -> None:
    program = program_with(op, "gate", "1e-40")
    kernel = jit(with_globals(columns_kernel, {"epilogue": build_epilogue(program.triton_source())}))
    out, x = (torch.empty(128, device="meta") for _ in range(2))
    assert ".f64" not in compile_ahead(kernel, (out, x), capability=90).ptx
