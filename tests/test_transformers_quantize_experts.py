"""Experts of transformers' models, quantized in place."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compile_moe.integrations.transformers as integration
from compile_moe.integrations.experts_module import projections
from tests.support.devices import on_each_device
from tests.support.quantized import ONE_A_SCALING, VARIANTS
from tests.support.quantized_models import (
    MXFP4,
    assert_as_float_experts,
    assert_compiles_once,
    assert_generates,
    dequantized,
    experts_of,
    logits,
    make_model,
    prompt,
    record_schemes,
)
from tests.support.tiny_models import one_layer

transformers = pytest.importorskip("transformers")
integration.register()


@pytest.fixture(autouse=True)
def forward_only() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def schemes_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return record_schemes(monkeypatch)


IN_PLACE = ("qwen3_moe", "gpt_oss", "nemotron_h")


# Every scheme in one family, and in the others those that scale tokens otherwise or have zero points.
@on_each_device(
    "variant,family",
    itertools.product(VARIANTS, IN_PLACE),
    on_cpu=[
        *itertools.product(VARIANTS, ["qwen3_moe"]),
        *itertools.product([*ONE_A_SCALING, "int4_w4a16-group_size16-zp", MXFP4], IN_PLACE[1:]),
    ],
)
def test_quantized_in_place(family: str, variant: str, device: str, schemes_run: list[str]) -> None:
    scheme = VARIANTS[variant]
    model, ids = make_model(family).to(device), prompt(device)
    floats = copy.deepcopy(model)
    integration.quantize_experts(model, scheme.scheme, zero_points=scheme.zero_points, **scheme.options)
    result = logits(model, ids)
    assert len(schemes_run) == len(experts_of(model)) and set(schemes_run) == {scheme.scheme}
    assert torch.isfinite(result).all()
    if scheme.made.token_scaling is None:
        assert_as_float_experts(result, floats, dequantized(model), ids)


@pytest.mark.parametrize("variant", ["int4_w4a16-group_size16-zp", "fp8_w8a8_channel", MXFP4])
def test_state_dict_round_trip(variant: str) -> None:
    scheme, ids = VARIANTS[variant], prompt("cpu")
    models = [make_model("qwen3_moe") for _ in range(2)]
    for model in models:
        integration.quantize_experts(model, scheme.scheme, zero_points=scheme.zero_points, **scheme.options)
    assert not torch.equal(logits(models[0], ids), logits(models[1], ids))
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(logits(models[0], ids), logits(models[1], ids))


def test_saving_is_refused_and_state_dict_does_it(tmp_path: Path) -> None:
    model, ids = make_model("qwen3_moe"), prompt("cpu")
    integration.quantize_experts(model, "int4_w4a16", group_size=16)
    for refused in (model, model.model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=r"state_dict\(\).*load_state_dict.*quantize_experts"):
            refused.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()

    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    integration.quantize_experts(again, "int4_w4a16", group_size=16)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("experts_implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("variant", ["int8_w8a16", MXFP4])
def test_other_implementations_name_what_they_lack(
    variant: str, family: str, experts_implementation: str
) -> None:
    scheme, ids = VARIANTS[variant], prompt("cpu")
    model = make_model(family)
    integration.quantize_experts(model, scheme.scheme, zero_points=scheme.zero_points, **scheme.options)
    expected = logits(model, ids)
    model.set_experts_implementation(experts_implementation)
    projection = projections(experts_of(model)[0])[0]
    with pytest.raises(AttributeError, match=f"Experts' object has no attribute '{projection}'"):
        logits(model, ids)
    model.set_experts_implementation(integration.NAME)
    assert torch.equal(logits(model, ids), expected)


def test_copies_and_pickles() -> None:
    model, ids = make_model("qwen3_moe"), prompt("cpu")
    integration.quantize_experts(model, MXFP4)
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(whole, weights_only=False),
    ):
        assert torch.equal(logits(again, ids), logits(model, ids))
        with pytest.raises(RuntimeError, match="no format for experts"):
            again.save_pretrained("unused")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h"])
def test_quantized_in_place_compiles_once_and_generates(family: str, device: str) -> None:
    model = make_model(family, **one_layer(family)).to(device)
    integration.quantize_experts(model, "int4_w4a16", group_size=16)
    assert_compiles_once(model, device)
    assert_generates(model, device)


def test_bf16_models_with_float32_hidden_states() -> None:
    """A norm may hand over more precision than the weights had."""
    model = make_model("qwen3_moe").to(torch.bfloat16)
    integration.quantize_experts(model, "int4_w4a16", group_size=16)
    experts = experts_of(model)[0]
    hidden_states, (weights, ids) = torch.randn(5, 32), torch.rand(5, 8).topk(2)
    result = experts(hidden_states, ids, weights)
    assert result.dtype is torch.float32
    assert torch.equal(result.bfloat16(), experts(hidden_states.bfloat16(), ids, weights))


def test_what_cannot_be_quantized_in_place() -> None:
    model = make_model("qwen3_moe")
    with pytest.raises(ValueError, match="scheme must be one of"):
        integration.quantize_experts(model, "int3")
    with pytest.raises(ValueError, match="multiple of 12"):
        integration.quantize_experts(model, "int4_w4a16", group_size=12)
    with pytest.raises(ValueError, match="no experts that transformers dispatches"):
        integration.quantize_experts(nn.Linear(2, 2), MXFP4)
    integration.quantize_experts(model, "int8_w8a16")
    with pytest.raises(ValueError, match="Qwen3MoeExperts is quantized already, to int8_w8a16"):
        integration.quantize_experts(model, MXFP4)


@pytest.mark.parametrize(
    ("last_down_proj", "zero_points", "error", "message"),
    [
        (torch.empty(8, 32, 24), False, ValueError, r"multiple of 16, got Qwen3MoeExperts.down_proj"),
        (
            torch.empty(8, 31, 32),
            True,
            ValueError,
            r"N that is a multiple of 2, got Qwen3MoeExperts.down_proj",
        ),
        (torch.empty(8, 32, 32, dtype=torch.int8), False, TypeError, r"down_proj must be .* got torch.int8"),
    ],
)
def test_refused_models_stay_as_they_were(
    last_down_proj: torch.Tensor, zero_points: bool, error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = make_model("qwen3_moe", experts="eager")
    experts_of(model)[-1].down_proj = nn.Parameter(last_down_proj, requires_grad=False)
    before = dict(model.state_dict())
    with pytest.raises(error, match=message):
        integration.quantize_experts(model, "int4_w4a16", group_size=16, zero_points=zero_points)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].data_ptr() == value.data_ptr() for name, value in before.items())
    assert model.config._experts_implementation == "eager"
    model.save_pretrained(tmp_path)
