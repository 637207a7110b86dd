"""Checkpoints in mxfp4, as those of gpt-oss, loaded by transformers and run by the library."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compile_moe
import compile_moe.integrations.transformers as integration
from compile_moe.integrations.experts_module import projections
from tests.support.quantized_models import (
    MXFP4,
    assert_as_float_experts,
    assert_compiles_once,
    assert_generates,
    dequantized,
    experts_of,
    load,
    logits,
    make_model,
    prompt,
    record_schemes,
)

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
integration.register()


@pytest.fixture(autouse=True)
def forward_only() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def schemes_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return record_schemes(monkeypatch)


def mxfp4_checkpoint(folder: Path, **options: Any) -> dict[str, Tensor]:
    """Write a tiny one, and return its tensors."""
    model = make_model("gpt_oss", **options)
    model.save_pretrained(folder)
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            q = compile_moe.quantize_weights(value.transpose(1, 2), MXFP4)
            state[f"{name}_blocks"] = q.weight.unflatten(2, (-1, 16)).contiguous()
            state[f"{name}_scales"] = q.scale
        else:
            state[name] = value
    safetensors.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return state


def test_mxfp4_checkpoint(device: str, tmp_path: Path, schemes_run: list[str]) -> None:
    state = mxfp4_checkpoint(tmp_path)
    model, ids = load(tmp_path, device), prompt(device)
    result = logits(model, ids)
    assert schemes_run == [MXFP4] * 2
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name].cpu(), value) for name, value in state.items())
    assert_as_float_experts(result, make_model_like(model), dequantized(model), ids)


def make_model_like(model: Any) -> Any:
    """The model with float experts, of any weights."""
    like = make_model(model.config.model_type).to(model.device)
    rest = {
        name: value for name, value in model.state_dict().items() if "_proj_" not in name or "bias" in name
    }
    like.load_state_dict(rest, strict=False)
    return like


def test_mxfp4_checkpoint_is_saved_as_it_was(tmp_path: Path) -> None:
    state = mxfp4_checkpoint(tmp_path)
    load(tmp_path).save_pretrained(tmp_path / "again")
    saved = safetensors.load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], value) for name, value in state.items())
    ids = prompt("cpu")
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(load(tmp_path), ids))


def test_mxfp4_models_are_pickled(tmp_path: Path) -> None:
    mxfp4_checkpoint(tmp_path)
    model, ids = load(tmp_path), prompt("cpu")
    again = pickle.loads(pickle.dumps(model))
    assert again.hf_quantizer.runs_compile_moe
    assert torch.equal(logits(again, ids), logits(model, ids))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(model, ids))


@pytest.mark.usefixtures("fresh_dynamo")
def test_mxfp4_compiles_once_and_generates(device: str, tmp_path: Path) -> None:
    mxfp4_checkpoint(tmp_path, num_hidden_layers=1)
    model = load(tmp_path, device)
    assert_compiles_once(model, device)
    assert_generates(model, device)


def test_mxfp4_of_float_checkpoints(tmp_path: Path, schemes_run: list[str]) -> None:
    """Transformers' quantization while it loads."""
    model, ids = make_model("gpt_oss"), prompt("cpu")
    model.save_pretrained(tmp_path)
    quantized = load(tmp_path, quantization_config=transformers.Mxfp4Config())
    integration.quantize_experts(model, MXFP4)
    assert torch.equal(logits(quantized, ids), logits(model, ids))
    assert set(schemes_run) == {MXFP4}
    quantized.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(load(tmp_path / "quantized"), ids), logits(model, ids))


def test_mxfp4_of_other_classes_is_refused(tmp_path: Path, schemes_run: list[str]) -> None:
    """Their weight conversions would make a checkpoint that nothing loads."""
    make_model("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"for GptOssExperts, got Qwen3MoeExperts at model\.layers\.0.*quantize_experts"
    ):
        load(tmp_path, quantization_config=transformers.Mxfp4Config())
    skipping = transformers.Mxfp4Config(modules_to_not_convert=["model.layers.*.mlp.experts"])
    logits(load(tmp_path, quantization_config=skipping), prompt("cpu"))
    assert schemes_run == [""] * 2


def test_mxfp4_asked_for_dequantized(tmp_path: Path, schemes_run: list[str]) -> None:
    mxfp4_checkpoint(tmp_path)
    config = transformers.Mxfp4Config(dequantize=True)
    model = load(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    assert torch.isfinite(logits(model, prompt("cpu"))).all()
    assert set(schemes_run) == {""}
    for experts, weights in zip(experts_of(model), dequantized(load(tmp_path)), strict=True):
        for name, w in zip(projections(experts), weights, strict=True):
            assert torch.equal(getattr(experts, name).double(), w.transpose(1, 2))


def test_other_experts_implementations_get_transformers_quantizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mxfp4_checkpoint(tmp_path)
    asked = []
    quantizer = "transformers.quantizers.quantizer_mxfp4.Mxfp4HfQuantizer.validate_environment"

    def validate_environment(self: Any, *args: Any, **kwargs: Any) -> None:
        asked.append(kwargs.keys())
        self.quantization_config.dequantize = True

    monkeypatch.setattr(quantizer, validate_environment)
    model = load(tmp_path, experts_implementation="eager")
    assert len(asked) == 1 and "device_map" in asked[0]
    assert all(experts.gate_up_proj.is_floating_point() for experts in experts_of(model))
