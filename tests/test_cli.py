"""The command line: the demo's table and its refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.text import Text
from typer.testing import CliRunner

import compile_moe.integrations.transformers as integration
from compile_moe.cli import app
from compile_moe.cli.demo import DemoOptions
from compile_moe.integrations import experts_module
from tests.support.tiny_models import COMMON, tiny_model

transformers = pytest.importorskip("transformers")
integration.register()

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compile_moe", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=580,
    )


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def save(folder: Path) -> Path:
    """A checkpoint of one layer, with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    # Weights without near ties between tokens.
    torch.manual_seed(0)
    tiny_model("qwen3_moe", "eager", num_hidden_layers=1).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "router": 2, "sends": 3, "tokens": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny[red]")


def rows(stdout: str) -> dict[str, list[str]]:
    """First cell of each of the table's rows to the others."""
    lines = [line.strip("│").split("│") for line in stdout.splitlines() if line.startswith("│")]
    return {first.strip(): [cell.strip() for cell in others] for first, *others in lines}


def assert_results(stdout: str, num_tokens: int, num_prompt: int) -> None:
    table = rows(stdout)
    assert table.pop("Greedy tokens") == [str(num_tokens), f"all {num_tokens} equal"]
    match = re.fullmatch(r"(\S+) \(logits up to (\S+)\)", table.pop("Max logit error")[1])
    assert match
    error, largest = map(float, match.groups())
    assert 0 <= error <= 1e-5 * largest
    assert table.pop("Graph breaks") == ["", "0"]
    compiles = re.fullmatch(r"(\d+) \(in \d+ s\)", table.pop("Compiles")[1])
    # One for the prompt and one for single tokens.
    assert compiles and compiles[1] == "2"
    for row in (f"Prefill tokens/s ({num_prompt} tokens)", "Decode tokens/s"):
        assert all(int(speed) > 0 for speed in table.pop(row))
    eager, ours = map(int, table.pop("Kernels in the MoE block"))
    assert 0 < ours < eager
    assert not table


@pytest.mark.slow
def test_demo(checkpoint: Path, tmp_path: Path) -> None:
    """As a user runs it, through inductor."""
    options = ("--device", "cpu", "--max-new-tokens", "6", "--experts", "batched_mm")
    prompt = "a router sends tokens tokens away"
    done = run("demo", "--model", str(checkpoint), "--prompt", prompt, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_results(done.stdout, num_tokens=6, num_prompt=6)
    assert "tiny[red] (0.0 M parameters, float32)" in done.stdout
    assert "experts 'batched_mm'" in done.stdout
    assert "Kernels of one Qwen3MoeSparseMoeBlock for one token" in done.stdout
    assert re.search(r"Compiling the prefill: \d+\.\d s", done.stderr)


def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models through AOTAutograd only, in a fraction of the time; the block by itself through inductor."""
    monkeypatch.setattr(
        torch,
        "compile",
        lambda model, _compile=torch.compile, **options: (
            _compile(model, backend="aot_eager") if "mode" in options else _compile(model, **options)
        ),
    )


@pytest.mark.usefixtures("fresh_dynamo")
def test_demo_without_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    result = invoke("demo", "--device", "cpu", "--max-new-tokens", "4")
    assert result.exit_code == 0, result.output
    assert_results(result.stdout, num_tokens=4, num_prompt=len(DemoOptions.prompt))
    assert "small Qwen3-MoE, random weights, seed 0" in result.stdout


@pytest.mark.parametrize("arguments", [("--help",), ("demo", "--help")])
def test_help(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 0
    text = Text.from_ansi(result.stdout).plain
    expected = [f"--{field.name.replace('_', '-')} " for field in dataclasses.fields(DemoOptions)]
    assert all(option in text for option in (expected if len(arguments) > 1 else ["demo"]))


def refusal(result: Any) -> str:
    """The one line with which a command ends that refuses what it was given."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and result.stderr.endswith(f"{errors[0]}\n"), result.stderr
    return errors[0]


def test_refusal_as_a_process(tmp_path: Path) -> None:
    done = run("demo", "--max-new-tokens", "1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: --max-new-tokens must be at least 2, to have a token to decode, got 1\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device tpu", "--device must be cpu, cuda or cuda:N, got tpu"),
        ("--device meta", "--device must be cpu, cuda or cuda:N, got meta"),
        ("--dtype int8", "--dtype must be float32, bfloat16, float16, got int8"),
        (
            "--mode fast",
            "--mode must be default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs, got fast",
        ),
        ("--max-new-tokens 0", "--max-new-tokens must be at least 2, to have a token to decode, got 0"),
    ],
)
def test_refused_options(arguments: str, message: str) -> None:
    assert refusal(invoke("demo", *arguments.split())) == f"error: {message}"


def test_refused_cuda_device() -> None:
    count = torch.cuda.device_count()
    message = refusal(invoke("demo", "--device", f"cuda:{count}"))
    if count:
        assert message == f"error: --device cuda:{count}, but there are {count} CUDA devices, counted from 0"
    else:
        assert message.startswith(
            f"error: --device cuda:0, but torch {torch.__version__} sees no CUDA device"
        )


def test_not_a_number() -> None:
    result = invoke("demo", "--max-new-tokens", "few")
    assert result.exit_code == 2
    assert "--max-new-tokens" in Text.from_ansi(result.stderr).plain


def test_unknown_experts() -> None:
    message = refusal(invoke("demo", "--experts", "fastest"))
    assert "fastest" in message and integration.NAME in message


def test_refused_prompts(checkpoint: Path) -> None:
    for model in ([], ["--model", checkpoint]):
        message = refusal(invoke("demo", *model, "--prompt", ""))
        assert message == "error: --prompt must hold at least one token, got an empty one"
    message = refusal(invoke("demo", "--model", checkpoint, "--prompt", "a " * 50, "--max-new-tokens", "15"))
    assert message == ("error: --prompt of 50 tokens and --max-new-tokens 15 exceed the model's 64 positions")


def test_no_folder(tmp_path: Path) -> None:
    # Long, and what rich would take for markup: the message stays one line and names it.
    path = tmp_path / f"[red]{'x' * 150}"
    message = "error: --model must be a folder with a checkpoint, but"
    assert refusal(invoke("demo", "--model", path)) == f"{message} {path} is no folder"
    path.mkdir()
    assert refusal(invoke("demo", "--model", path)) == f"{message} {path} holds no config.json"


def broken(folder: Path, damage: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if damage == "damaged":
        (folder / "model.safetensors").write_bytes(b"not a header" * 4)
    elif damage == "no-weights":
        (folder / "model.safetensors").unlink()
    elif damage == "other-sizes":
        config["hidden_size"] *= 2
    elif damage == "unknown":
        config["model_type"] = "nobody's"
    elif damage == "own-code":
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
        }
    elif damage == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("damaged", "SafetensorError"),
        ("no-weights", "no file named model.safetensors"),
        ("other-sizes", "RuntimeError"),
        ("unknown", "nobody's"),
        ("own-code", "custom code"),
        ("tokenizer", "KeyError"),
    ],
)
def test_checkpoint_that_transformers_cannot_load(damage: str, message: str, tmp_path: Path) -> None:
    broken(save(tmp_path), damage)
    line = refusal(invoke("demo", "--model", tmp_path))
    assert line.startswith("error: transformers can't load this model: ") and message in line


def test_checkpoint_that_lacks_weights(tmp_path: Path) -> None:
    config = json.loads((save(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "layer_types": None}))
    line = refusal(invoke("demo", "--model", tmp_path))
    assert re.search(r"--model must hold all weights, but .* lacks \d+, such as model.layers.1.", line)


def test_model_without_experts(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**COMMON)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    line = refusal(invoke("demo", "--model", tmp_path))
    assert line.startswith("error: LlamaForCausalLM holds no experts that transformers dispatches")
    assert line.endswith("give a Mixture-of-Experts model")


@pytest.mark.parametrize("error", [NotImplementedError, TypeError, ValueError])
def test_experts_that_the_library_refuses(
    error: type[Exception], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error("weights are quantized;\n  load them dequantized")

    monkeypatch.setattr(experts_module, "fused_experts", refuse)
    line = refusal(invoke("demo", "--model", checkpoint, "--device", "cpu", "--max-new-tokens", "2"))
    assert line == "error: weights are quantized; load them dequantized"


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    assert "pip install 'compile-moe[transformers]'" in refusal(invoke("demo"))
