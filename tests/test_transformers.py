"""Experts of Hugging Face transformers with the library's experts: whole tiny models, and how the library gets in."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import compile_moe
import compile_moe.integrations.transformers as integration
from compile_moe.integrations import experts_module
from tests.support.devices import on_each_device
from tests.support.tiny_models import COMMON, FAMILIES, ChoiceMargins, assert_close, one_layer, tiny_model

transformers = pytest.importorskip("transformers")
integration.register()

GREEDY = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}


@pytest.fixture(autouse=True)
def forward_only() -> Any:
    with torch.no_grad():
        yield


def prompt(device: str, batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(COMMON["vocab_size"], (batch, length), device=device)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def with_experts(model: Any, experts: str, dtype: torch.dtype | None = None) -> Any:
    model = copy.deepcopy(model).to(dtype)
    model.set_experts_implementation(experts)
    return model


def assert_model_close(result: Tensor, model: Any, ids: Tensor, peer: Any = None) -> None:
    with ChoiceMargins() as margins:
        exact = logits(with_experts(model, "eager", torch.float64), ids).double()
    assert margins.smallest < 1, "saw no choice of experts"
    try:
        assert_close(result, logits(with_experts(model, "eager") if peer is None else peer, ids), exact)
    except AssertionError:
        # One token of some ten thousand has other experts in float32, ours or not.
        if margins.smallest > 1e-5:
            raise
        pytest.skip(f"a choice of experts nearly tied, by {margins.smallest:.1e}")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(family).to(device), prompt(device)
    calls = []
    monkeypatch.setattr(
        experts_module,
        "fused_experts",
        lambda *args, **kwargs: calls.append(0) or compile_moe.fused_experts(*args, **kwargs),
    )
    result = logits(model, ids)
    experts = [module for module in model.modules() if hasattr(module, "is_transposed")]
    assert len(calls) == len(experts) > 0
    assert_model_close(result, model, ids)


# To the library mixtral and olmoe are what qwen3_moe is: a softmax, and experts with the same layout.
DIFFERENT = on_each_device(
    "family",
    [(family,) for family in FAMILIES],
    on_cpu=[("qwen3_moe",), ("deepseek_v3",), ("gpt_oss",), ("nemotron_h",)],
)


@pytest.mark.usefixtures("fresh_dynamo")
@DIFFERENT
def test_logits_in_one_graph(family: str, device: str) -> None:
    model, ids = tiny_model(family).to(device), prompt(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_model_close(logits(compiled, ids), model, ids)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_logits_through_inductor(family: str, device: str) -> None:
    if family == "qwen3_moe" and device == "cpu":
        pytest.skip("tests/test_cli.py runs the demo, which compares them")
    model, ids = tiny_model(family, num_hidden_layers=1).to(device), prompt(device)
    compiled = torch.compile(model, fullgraph=True)
    # Inductor's own roundings, in attention and norms, are in both.
    peer = torch.compile(with_experts(model, "batched_mm"), fullgraph=True)
    assert_model_close(logits(compiled, ids), model, ids, peer)


@pytest.mark.usefixtures("fresh_dynamo")
@DIFFERENT
def test_one_compile_for_all_prompt_lengths(family: str, device: str) -> None:
    model = tiny_model(family, **one_layer(family)).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    prompts = [prompt(device, length=length) for length in (7, 2, 100)]
    torch._dynamo.mark_dynamic(prompts[0], 1)
    peer = None
    if device == "cuda":
        # What aot_eager makes of attention and norms is in both.
        peer = torch.compile(with_experts(model, "batched_mm"), fullgraph=True, backend="aot_eager")
    for ids in prompts:
        assert_model_close(logits(compiled, ids), model, ids, peer)
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family: str, device: str) -> None:
    """On a GPU transformers compiles the decoding step by itself, with CUDA graphs."""
    model, ids = tiny_model(family).to(device), prompt(device)
    expected = with_experts(model, "eager").generate(ids, **GREEDY, disable_compile=True)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


@pytest.mark.usefixtures("fresh_dynamo")
@DIFFERENT
def test_generate_with_compiled_decoding(family: str, device: str) -> None:
    model, ids = tiny_model(family).to(device), prompt(device)
    expected = with_experts(model, "eager").generate(ids, **GREEDY, disable_compile=True)
    compile_config = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    assert torch.equal(model.generate(ids, **GREEDY, compile_config=compile_config), expected)
    assert hasattr(model, "_compiled_call")


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_in_bf16_differs_at_near_ties_only(family: str, device: str) -> None:
    # Roundings decide routing ties as well: a seed of its own keeps the comparison on one side of them.
    torch.manual_seed(0)
    model, ids = tiny_model(family).to(device, torch.bfloat16), prompt(device, 4)
    eager, exact = with_experts(model, "eager"), with_experts(model, "eager", torch.float64)
    expected = eager.generate(ids, **GREEDY, disable_compile=True)
    given = model.generate(ids, **GREEDY, disable_compile=True)
    true_logits = logits(exact, expected).double()
    error = (logits(eager, expected).double() - true_logits).abs().max()
    for row in range(len(ids)):
        different = (expected[row] != given[row]).nonzero()
        if not len(different):
            continue
        first = int(different[0])
        chosen = true_logits[row, first - 1]
        gap = (chosen[expected[row, first]] - chosen[given[row, first]]).abs()
        assert gap <= 3 * error, f"token {first} of row {row}: gap {gap:.3e}, eager's error {error:.3e}"


def test_every_way_to_choose_it(tmp_path: Path) -> None:
    integration.register()  # again: changes nothing
    model = tiny_model("qwen3_moe", "eager")
    model.set_experts_implementation(integration.NAME)
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.from_pretrained(tmp_path, experts_implementation=integration.NAME)
    ids = prompt("cpu")
    for loaded in (
        model,
        auto.from_pretrained(tmp_path, experts_implementation=integration.NAME),
        auto.from_config(config),
        auto.from_config(config, experts_implementation={"": integration.NAME}),
    ):
        assert loaded.config._experts_implementation == integration.NAME
        assert torch.isfinite(logits(loaded, ids)).all()


@pytest.mark.parametrize(
    "found", [None, types.ModuleType("transformers.integrations.moe")], ids=["missing", "old"]
)
def test_transformers_missing_or_old(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", found)
    with pytest.raises(ImportError, match=r"pip install 'compile-moe\[transformers\]'"):
        integration.register()


def test_import_does_not_load_transformers() -> None:
    code = "import sys, compile_moe.integrations.transformers; assert 'transformers' not in sys.modules"
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
