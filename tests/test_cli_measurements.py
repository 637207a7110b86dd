"""What the demo compares and counts: its model, generations, kernels, and the table's lines."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import compile_moe.integrations.transformers as integration
from compile_moe.cli import kernel_count
from compile_moe.cli.demo import Compilation, Results, _table
from compile_moe.cli.generation import Comparison, Difference, Generation, Generator, Speed, compare
from compile_moe.cli.language_model import choose_device, choose_dtype, encode, load, moe_block
from compile_moe.cli.refusal import Refusal
from tests.support.tiny_models import COMMON, FAMILIES, tiny_model

pytest.importorskip("transformers")
integration.register()

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forward_only() -> Any:
    with torch.no_grad():
        yield


# A prompt of 3 tokens and 4 generated ones: 6 rows of logits, the first two of which choose nothing.
LOGITS = torch.tensor(
    [
        [9.0, 0.0, 0.0],
        [0.0, 9.0, 0.0],
        [1.0, 3.0, 2.0],
        [4.0, 1.0, -12.0],
        [0.0, 0.5, 0.75],
        [80.0, 0.0, 0.0],
    ]
)


def test_equal_generations() -> None:
    generation = Generation([1, 0, 2, 0], LOGITS)
    assert compare(generation, Generation([1, 0, 2, 0], LOGITS.clone())) == Comparison(None, 0.0, 80.0)


def test_logits_that_differ_under_equal_tokens() -> None:
    for row, error in ((0, 0.25), (5, 0.5)):
        other = LOGITS.clone()
        other[row, 1] -= error
        comparison = compare(Generation([1, 0, 2, 0], LOGITS), Generation([1, 0, 2, 0], other))
        assert comparison == Comparison(None, error, 80.0)


def test_logits_after_the_first_different_token_are_left_out() -> None:
    other = LOGITS.clone()
    # The row that chose differently counts, the one after it does not.
    other[4] = torch.tensor([0.0, 1.0, 0.75])
    other[5] = -1000.0
    comparison = compare(Generation([1, 0, 2, 0], LOGITS), Generation([1, 0, 1, 2], other))
    assert comparison == Comparison(Difference(2, (2, 1), 0.25), 0.5, 12.0)


def test_first_token_differs() -> None:
    other = LOGITS.clone()
    other[2:] = torch.tensor([1.0, 2.5, 3.0])
    comparison = compare(Generation([1, 0, 2, 0], LOGITS), Generation([2, 2, 2, 2], other))
    assert comparison == Comparison(Difference(0, (1, 2), 1.0), 1.0, 9.0)


def test_table_of_tokens_that_differ() -> None:
    results = Results(
        Comparison(Difference(2, (5, 7), 0.0012), 0.5, 3.0),
        4,
        Compilation(1, 3, 9.6),
        (Speed(10.4, 2), Speed(30, 4)),
        (9, 3),
    )
    out = io.StringIO()
    Console(file=out, width=110).print(_table(results, "eager", 6, "Block", CPU))
    lines = [line.strip("│").split("│") for line in out.getvalue().splitlines() if line.startswith("│")]
    assert {first.strip(): [cell.strip() for cell in others] for first, *others in lines} == {
        "Greedy tokens": ["4", "differ from token 3 on: 7 for 5, logits 1.2e-03 apart"],
        "Max logit error": ["", "5.0e-01 (logits up to 3.0e+00)"],
        "Graph breaks": ["", "1"],
        "Compiles": ["", "3 (in 10 s)"],
        "Prefill tokens/s (6 tokens)": ["10", "30"],
        "Decode tokens/s": ["2", "4"],
        "Kernels in the MoE block": ["9", "3"],
    }


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_generation(family: str) -> None:
    # Without the padding token, which transformers' generate() would mask.
    model, prompt = tiny_model(family), torch.randint(1, COMMON["vocab_size"], (1, 5))
    generator = Generator(model, prompt, 4)
    generation = generator.generate(model)
    assert len(generation.tokens) == 4
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    assert generation.tokens == model.generate(prompt, **options)[0, 5:].tolist()
    # Row by row what the whole sequence gives without a cache.
    whole = torch.cat((prompt, torch.tensor([generation.tokens])), 1)
    logits = model(whole[:, :-1], use_cache=False).logits[0]
    torch.testing.assert_close(generation.logits, logits, rtol=1e-4, atol=1e-4)
    again = generator.generate(model)
    assert again.tokens == generation.tokens and torch.equal(again.logits, generation.logits)
    assert min(generator.speed(model)) > 0


def test_small_model() -> None:
    models = [load(None, "eager", CPU, torch.float32, seed).model for seed in (0, 0, 1)]
    first, again, other = (nn.utils.parameters_to_vector(model.parameters()) for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not models[0].training
    language_model = load(None, "eager", CPU, torch.bfloat16, 0)
    assert language_model.model.dtype is torch.bfloat16
    # Bytes of UTF-8 where there is no tokenizer.
    assert encode(language_model, "aé", 2).tolist() == [[97, 195, 169]]
    encode(language_model, "a" * 2046, 2)
    with pytest.raises(Refusal, match="2047 tokens and --max-new-tokens 2 exceed the model's 2048"):
        encode(language_model, "a" * 2047, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_moe_block(family: str) -> None:
    model = tiny_model(family)
    name, block = moe_block(model)
    # DeepSeek's first layer is dense, and Nemotron's holds attention.
    assert ".1." in name if family in ("deepseek_v3", "nemotron_h") else ".0." in name
    assert model.get_submodule(name) is block
    calls = []
    block.register_forward_hook(lambda *_: calls.append(1))
    model(torch.zeros(1, 3, dtype=torch.int64))
    assert calls == [1]


def test_device_and_dtype() -> None:
    gpu = torch.cuda.is_available()
    assert choose_device(None).type == ("cuda" if gpu else "cpu")
    assert choose_device("cpu") == CPU
    assert choose_dtype(None, CPU) is torch.float32
    assert choose_dtype(None, torch.device("cuda")) is torch.bfloat16
    assert choose_dtype("float16", CPU) is torch.float16


X, W = torch.randn(4, 6), torch.randn(6, 6)


def in_a_region() -> None:
    with torch.profiler.record_function("my region"):
        (X @ W).relu()


@pytest.mark.parametrize(
    ("call", "number"),
    [
        pytest.param(lambda: None, 0, id="nothing"),
        pytest.param(lambda: torch.nn.functional.linear(X, W), 1, id="nested"),
        pytest.param(lambda: (X @ W).relu() + 1, 3, id="three"),
        pytest.param(in_a_region, 2, id="region"),
        pytest.param(lambda: (X.t(), X[1:, 2:], X.view(-1), X.split(2), X.chunk(2, -1), X[0]), 0, id="views"),
        pytest.param(lambda: (X.reshape(6, 4), X.to(X.dtype), X.contiguous()), 0, id="nothing-to-copy"),
        pytest.param(lambda: (X.t().reshape(-1), X.bfloat16(), X.t().contiguous()), 3, id="copies"),
        pytest.param(lambda: (torch.empty(3), X.new_empty(3), torch.empty_like(X)), 0, id="allocations"),
        pytest.param(lambda: (X.sum().item(), bool(X.amax() > 0)), 3, id="reads"),
    ],
)
def test_count(call: Callable[[], Any], number: int) -> None:
    assert kernel_count.count(call, CPU) == number


class Gated(nn.Module):
    """A chain of pointwise operators, and one of the library's operators."""

    def forward(self, gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        rows = torch.nn.functional.silu(gate) * up + 1
        return torch.ops.compile_moe.weight_and_reduce(rows.view(*weights.shape, -1), weights)


@pytest.mark.usefixtures("fresh_dynamo")
def test_count_of_a_compiled_module() -> None:
    inputs = torch.randn(6, 16), torch.rand(3, 2)
    module = Gated()
    compiled = kernel_count.compile_for_count(module, CPU)
    torch.testing.assert_close(compiled(*inputs), module(*inputs))
    # silu, mul, add, reduce; compiled, they are one or two loops.
    assert kernel_count.count(lambda: module(*inputs), CPU) == 4
    assert 1 <= kernel_count.count(lambda: compiled(*inputs), CPU) <= 2


@pytest.mark.gpu
def test_count_on_a_gpu() -> None:
    x = X.cuda()
    device = torch.device("cuda")
    call = lambda: ((x.sin() + 1).t(), x.clone(), x.cpu())
    call()
    assert kernel_count.count(call, device) == 2
