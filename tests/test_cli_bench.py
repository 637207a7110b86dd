"""``compile-moe bench``: what it measures on a CPU, what it refuses, and that wrong results are not timed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import compile_moe
from compile_moe.cli import app, bench, measurement, timing
from compile_moe.cli.contestants import CONTESTANTS

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SHAPE = ("--hidden-size", "64", "--intermediate-size", "32", "--topk", "2")


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


def test_quantized_experts(model: str, tmp_path: Path) -> None:
    """Against the same scheme in plain PyTorch; their floor counts their own bytes."""
    file = tmp_path / "numbers.json"
    arguments = ("--contestants", "mxfp4_w4a16,fp8_w8a8_channel,int4_w4a16", "--json", str(file))
    result = run("--model", model, "--tokens", "1,9", "--part", "experts", *arguments)
    assert result.exit_code == 0, result.output
    *measured, missing, _ = json.loads(file.read_text())["measurements"]
    for m in measured:
        assert m["failure"] == "" and m["microseconds"] > 0 and m["error"] < 2e-2
    expected = (2 * (3 * 64 * 32 * (1 / 2 + 1 / 32)) + 2 * 64 * 4) / 1e11 * 1e6
    assert measured[0]["floor"] == pytest.approx(expected)
    assert "multiple of 128" in missing["failure"]


def test_wrong_results_are_not_timed(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import compile_moe.integrations.transformers as integration

    def wrong(self: Any, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        # Eager it is right.
        right = compile_moe.fused_experts(hidden_states, self.gate_up_proj, self.down_proj, *routing[::-1])
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
    def fails(*_: Any, **__: Any) -> float:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(measurement, "seconds_per_call", fails)
    result = run("--model", model, "--tokens", "2", "--contestants", "eager")
    assert result.exit_code == 0 and "out of memory" in result.stdout


def test_a_layer_larger_than_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The others are measured all the same."""
    make_layer, file = bench.make_layer, tmp_path / "numbers.json"

    def make(config: Any, *rest: Any) -> Any:
        if config.num_experts > 8:
            raise torch.OutOfMemoryError("no memory")
        return make_layer(config, *rest)

    monkeypatch.setattr(bench, "make_layer", make)
    result = run(
        *SHAPE, "--num-experts", "8,16", "--tokens", "2", "--contestants", "eager", "--json", str(file)
    )
    assert result.exit_code == 0, result.output
    fits, does_not = json.loads(file.read_text())["measurements"]
    assert (fits["num_experts"], fits["failure"], fits["microseconds"] > 0) == (8, "", True)
    assert (does_not["num_experts"], does_not["failure"], does_not["microseconds"]) == (
        16,
        "out of memory",
        None,
    )


def test_an_own_shape_over_numbers_of_experts(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    arguments = ["--num-experts", "4,16", "--tokens", "3", "--part", "experts", "--contestants", "eager"]
    result = run(*SHAPE, *arguments, "--json", str(file))
    assert result.exit_code == 0, result.output
    numbers = json.loads(file.read_text())
    assert numbers["model"] == "hidden size 64, intermediate size 32, topk 2"
    few, many = numbers["measurements"]
    assert (few["num_experts"], many["num_experts"]) == (4, 16)
    # The same arithmetic; more bytes where the same choices hit more experts.
    assert few["work"]["flops"] == many["work"]["flops"] == 2 * 3 * 2 * 3 * 64 * 32
    assert few["work"]["num_bytes"] < many["work"]["num_bytes"]
    lines = [line.split("│") for line in result.stdout.splitlines() if "│" in line]
    assert [[cell.strip() for cell in line[1:4]] for line in lines] == [
        ["4", "3", "eager"],
        ["16", "3", "eager"],
    ]


def test_peers_that_are_not_installed(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    arguments = ["--num-experts", "4", "--tokens", "1,2", "--part", "experts", "--json", str(file)]
    result = run(*SHAPE, *arguments, "--contestants", "eager,vllm,sonicmoe,scattermoe,triton_kernels")
    assert result.exit_code == 0, result.output
    measured = json.loads(file.read_text())["measurements"]
    assert all((m["failure"] == "") is (m["contestant"] == "eager") for m in measured)
    assert result.stdout.count("vllm: not installed; install it by: pip install vllm") == 1
    rows = [line.split("│") for line in result.stdout.splitlines() if "│" in line]
    assert [row[3].strip() for row in rows if row[2].strip() == "vllm"] == ["not installed"] * 2


def test_one_wrong_token_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of experts whose routing is given, every token counts."""
    import transformers

    def wrong(self: Any, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden_states)
        for token in range(hidden_states.size(0)):
            for expert, weight in zip(*(r[token] for r in routing), strict=True):
                gate_up = self._apply_gate(self.gate_up_proj[expert] @ hidden_states[token])
                result[token] += weight * (self.down_proj[expert] @ gate_up)
        result[-1] *= 1.01
        return result

    interface = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS
    monkeypatch.setitem(interface._local_mapping, "grouped_mm", wrong)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    arguments = [*SHAPE, "--num-experts", "4", "--tokens", "9", "--contestants", "grouped_mm"]
    result = run(*arguments, "--part", "experts")
    assert result.exit_code == 0 and "wrong result, by 1.0e-02" in result.stdout, result.stdout


def test_peak_is_over_inputs_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = iter([1000, 1064])  # before, and with a result of 64 bytes
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1300)
    assert measurement.peak(lambda: None, torch.device("cuda")) == 300 - 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--contestants", "tutel"],
            f"--contestants must be of {', '.join(CONTESTANTS)}, got tutel",
        ),
        (
            ["--contestants", "eager,vllm"],
            "--contestants vllm: these compute the experts alone; add --part experts",
        ),
        (
            ["--num-experts", "8"],
            "a shape of your own needs --hidden-size, --intermediate-size, --num-experts,",
        ),
        (["--num-experts", "8,x"], "must be numbers separated by commas, got 8,x"),
        ([*SHAPE, "--num-experts", "8,1"], "--topk must be at most --num-experts, got 2 of 1"),
        (["--model", "qwen3-30b-a3b", *SHAPE], "--model or a shape of your own, not both; got --hidden-size"),
        (["--host"], "--host needs a CUDA device"),
        (["--plot", "times.pdf"], "--plot must name a file that ends in .png or .svg, got times.pdf"),
        (
            [*SHAPE, "--num-experts", "8,16", "--tokens", "1,2", "--plot", "times.png"],
            "--plot draws over --tokens or over --num-experts, got 2 and 2 numbers; give one number of either",
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


@pytest.mark.parametrize(("option", "name"), [("--json", "numbers.json"), ("--plot", "times.svg")])
def test_file_that_cannot_be_written(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, name: str
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("refused too late"))
    file = tmp_path / "no-such-folder" / name
    result = run("--model", model, option, str(file))
    assert result.exit_code == 2
    assert f"{option} {file} can't be written: No such file or directory" in result.output


@pytest.mark.gpu
@pytest.mark.parametrize("part", bench.PARTS)
def test_on_a_gpu(model: str, part: str, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    arguments = ["--model", model, "--tokens", "1,300", "--part", part, "--json", str(file)]
    result = CliRunner().invoke(app, ["bench", "--contestants", "compile_moe,grouped_mm", *arguments])
    assert result.exit_code == 0, result.output
    for m in json.loads(file.read_text())["measurements"]:
        assert m["failure"] == "" and m["microseconds"] > 0 and m["memory"] > 0 and m["replayed"], m
        ours = m["contestant"] == "compile_moe"
        first = "rows_kernel" if m["tokens"] == 1 else "gather_gemm"
        assert any(first in kernel for kernel in m["kernels"]) is ours, m


def test_an_interruption_keeps_what_was_measured(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = measurement.Bench.measure

    def measure_until_terminated(self: measurement.Bench, *arguments: Any) -> Any:
        if arguments[2] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, *arguments)

    monkeypatch.setattr(measurement.Bench, "measure", measure_until_terminated)
    file = tmp_path / "numbers.json"
    result = run("--model", model, "--tokens", "1,5", "--contestants", "eager", "--json", str(file))
    assert result.exit_code == 130
    assert "eager, E 8, 1 tokens: " in result.stderr and "Interrupted" in result.stdout
    numbers = json.loads(file.read_text())
    assert [m["tokens"] for m in numbers["measurements"]] == [1] and not numbers["complete"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
