"""``compile-moe explain``: its counts, its activations by name or from a file, what it refuses before it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from typer.testing import CliRunner, Result

import compile_moe
from compile_moe.cli import app
from compile_moe.cli.moe_layer import custom_configuration, make_layer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("--hidden-size", "64", "--intermediate-size", "32", "--num-experts", "8", "--topk", "2")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["explain", "--device", "cpu", *arguments])


def one_line(stdout: str) -> str:
    return " ".join(stdout.split())


def kernels(stdout: str) -> list[str]:
    """Labels of the nodes of the tree's first level, but for the last, which holds the refusals."""
    *labels, last = re.findall(r"^[├└]── (.+)$", stdout, re.MULTILINE)
    assert last == "not fused"
    return labels


def assert_counts(stdout: str) -> None:
    labels = kernels(stdout)
    generated = labels.count("generated kernel")
    behind = len(labels) - labels.index("aten.mm") - 1
    counts = (
        f"{generated} generated kernels, {len(labels) - generated} calls; {behind} of them after the router's"
    )
    assert counts in one_line(stdout)


def test_counts_and_a_named_activation(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    result = run(*SIZES, "--activation", "gelu", "--html", str(file))
    assert result.exit_code == 0, result.output
    assert_counts(result.stdout)
    assert "= erf(" in result.stdout and "sigmoid" not in result.stdout
    assert "Compiled for any number of tokens." in one_line(result.stdout)
    page = file.read_text(encoding="utf-8")
    assert "├── " in page and "= erf(" in page


def test_a_named_activation_of_another_implementation() -> None:
    result = run(*SIZES, "--activation", "gelu", "--experts", "batched_mm", "--static")
    assert result.exit_code == 0, result.output
    assert_counts(result.stdout)
    assert "erf" in result.stdout and "compile_moe." not in result.stdout
    assert "Compiled for 16 tokens only." in one_line(result.stdout)


@pytest.mark.slow
def test_as_a_process(tmp_path: Path) -> None:
    """What a user sees on stderr: nothing of the compiler's."""
    done = subprocess.run(
        [sys.executable, "-m", "compile_moe", "explain", "--device", "cpu", "--tokens", "1", *SIZES],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "1 token, torch.float32, cpu" in done.stdout
    assert "Compiled for 1 token only." in one_line(done.stdout)
    # A torch built for CUDA remarks that there is none.
    assert [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line] == []


def test_the_router_is_one_of_the_products() -> None:
    """A shared expert's products are others."""
    config = custom_configuration(64, 32, 8, 2, shared_intermediate_size=32)
    with FakeTensorMode(shape_env=ShapeEnv()):
        layer = make_layer(config, "compile_moe", torch.device("cpu"), torch.float32)
        explained = compile_moe.explain(layer, torch.empty(16, 64)).kernels
    products = [kernel for kernel in explained if kernel.name == "aten.mm"]
    assert len(products) == 5
    assert sum(kernel.is_router_gemm for kernel in explained) == 1
    router = next(i for i, kernel in enumerate(explained) if kernel.is_router_gemm)
    choice = next(i for i, kernel in enumerate(explained) if kernel.name == "aten.topk")
    assert explained[router] in products and router < choice


def test_ungated_experts(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2}
    transformers.NemotronHConfig(**sizes, n_group=1, topk_group=1).save_pretrained(tmp_path)
    result = run("--model", str(tmp_path), "--activation", "gelu_no_mul")
    assert result.exit_code == 0, result.output
    assert "epilogue, over gate alone" in result.stdout and "= erf(gate" not in result.stdout
    assert "= erf(t0)" in result.stdout


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def gate(x):\n    raise RuntimeError('no\\n[bold]gate')", "RuntimeError: no [bold]gate"),
        (
            "def gate(x):\n    return x",
            "activation must return (S, I) = (2, 32) for gate_up (2, 64), got (2, 64)",
        ),
        ("def gate(x):\n    return None", "activation must return a tensor, got NoneType"),
        ("gate = 3", "has no function gate"),
        ("raise SystemExit(3)", "raised SystemExit: 3"),
        ("def gate(:", "raised SyntaxError"),
    ],
    ids=["raises", "wrong-shape", "no-tensor", "no-function", "exits", "no-python"],
)
def test_refused_activations(body: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(body)
    assert_refused(run(*SIZES, "--activation", f"{file}:gate"), message)


def test_refused_file(tmp_path: Path) -> None:
    assert_refused(run(*SIZES, "--html", str(tmp_path)), f"{tmp_path} can't be written: Is a directory")


def test_not_one_graph() -> None:
    """transformers' eager experts loop over those that were chosen."""
    assert_refused(run(*SIZES, "--experts", "eager"), "this layer doesn't compile as one graph: ")


def assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    errors = result.stderr.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], result.stderr
