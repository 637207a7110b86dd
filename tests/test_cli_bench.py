"""``compile-moe bench``: what it measures on a CPU, what it refuses, and that wrong results are not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from compile_moe.cli import app, bench, timing

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the configuration of a model, without weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    transformers.Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, num_hidden_layers=1
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: timing.Ceilings(1e12, 1e11))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "--device", "cpu", *arguments], env={"COLUMNS": "200"})


def test_a_block(model: str, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    result = run(
        "--model", model, "--tokens", "1,5", "--contestants", "compile_moe,eager", "--json", str(file)
    )
    assert result.exit_code == 0, result.output
    numbers = json.loads(file.read_text())
    assert (numbers["part"], numbers["dtype"], numbers["device"]) == ("block", "float32", "CPU")
    measured = numbers["measurements"]
    assert [(m["contestant"], m["tokens"]) for m in measured] == [
        ("compile_moe", 1),
        ("compile_moe", 5),
        ("eager", 1),
        ("eager", 5),
    ]
    for m in measured:
        assert m["microseconds"] > 0 and m["error"] < 1e-5 and m["failure"] == "" and m["floor"] is None
    # The table goes by tokens; times are relative to ours.
    lines = [line.split("│") for line in result.stdout.splitlines() if "│" in line]
    assert [(line[1].strip(), line[2].strip()) for line in lines] == [
        ("1", "compile_moe"),
        ("1", "eager"),
        ("5", "compile_moe"),
        ("5", "eager"),
    ]
    assert lines[0][4].strip() == "1.00"


def test_floor_of_the_experts(model: str, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    result = run("--model", model, "--tokens", "1", "--part", "experts", "--json", str(file))
    assert result.exit_code == 0, result.output
    ours, grouped_mm = json.loads(file.read_text())["measurements"]
    # One token: two experts of 3 · 64 · 32 weights, 64 numbers in and out, 4 bytes each, at 0.1 TB/s.
    expected = (2 * 3 * 64 * 32 + 2 * 64) * 4 / 1e11 * 1e6
    assert ours["floor"] == grouped_mm["floor"] == pytest.approx(expected)


def test_wrong_results_are_not_timed(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import compile_moe.integrations.transformers as integration

    def wrong(self: Any, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        # Eager it is right.
        right = integration.fused_experts(hidden_states, self.gate_up_proj, self.down_proj, *routing[::-1])
        return right * 1.01 if torch.compiler.is_compiling() else right

    monkeypatch.setattr(integration, "experts_forward", wrong)
    integration.register()
    try:
        results = [
            run("--model", model, "--tokens", "2", "--contestants", "compile_moe", "--part", part)
            for part in bench.PARTS
        ]
    finally:
        monkeypatch.undo()
        integration.register()
    for result in results:
        assert result.exit_code == 0 and "wrong result, by 1.0e-02" in result.stdout, result.stdout


def test_a_contestant_that_fails(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> float:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench, "seconds_per_call", fails)
    result = run("--model", model, "--tokens", "2", "--contestants", "eager")
    assert result.exit_code == 0 and "out of memory" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--contestants", "vllm"],
            "--contestants must be of compile_moe, grouped_mm, batched_mm, eager, got vllm",
        ),
        (["--part", "attention"], "--part must be of block, experts, got attention"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--tokens", "many"], "must be numbers separated by commas, got many"),
        (["--model", "no-such-model"], "--model must be qwen3-30b-a3b,"),
        (["--dtype", "int8"], "--dtype must be float32, bfloat16, float16, got int8"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_refusals(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_file_that_cannot_be_written(model: str, tmp_path: Path) -> None:
    result = run("--model", model, "--json", str(tmp_path / "no-such-folder" / "numbers.json"))
    assert result.exit_code == 2 and "can't be written: No such file or directory" in result.output


def test_median_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second for each of two calls, but for one slow repetition."""
    seconds = iter([1.0, 9.0, 1.0, 1.0])
    monkeypatch.setattr(timing, "_time", lambda *_: next(seconds))
    done: list[int] = []
    calls = [lambda: done.append(0), lambda: done.append(1)]
    assert timing.seconds_per_call(calls, torch.device("cpu"), False) == 0.5
    assert done == [0, 1]


def test_ceilings() -> None:
    flops, bandwidth = timing.measure_ceilings(torch.device("cpu"), torch.float32)
    assert flops > 1e8 and bandwidth > 1e8


@pytest.mark.gpu
@pytest.mark.parametrize("part", bench.PARTS)
def test_on_a_gpu(model: str, part: str, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    arguments = ["--model", model, "--tokens", "1,300", "--part", part, "--json", str(file)]
    result = CliRunner().invoke(app, ["bench", "--contestants", "compile_moe,grouped_mm", *arguments])
    assert result.exit_code == 0, result.output
    for m in json.loads(file.read_text())["measurements"]:
        assert m["failure"] == "" and m["microseconds"] > 0 and m["memory"] > 0, m
        ours = m["contestant"] == "compile_moe"
        assert any("gather_gemm" in kernel for kernel in m["kernels"]) is ours, m
