"""Tiny models of transformers that its FP8 quantizer loaded, through the library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compile_moe.integrations.transformers as integration
from tests.support.quantized_models import (
    assert_compiles_once,
    assert_generates,
    experts_of,
    load,
    logits,
    make_model,
    prompt,
    record_schemes,
)

transformers = pytest.importorskip("transformers")
integration.register()

FP8_BLOCK = (8, 16)
#: Linear layers that stay as they are: transformers runs FP8 ones with kernels from its hub.
LINEARS = ["model.layers.*.self_attn", "lm_head"]


@pytest.fixture(autouse=True)
def forward_only() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def schemes_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return record_schemes(monkeypatch)


@pytest.fixture
def fp8_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers asks for a GPU, since its kernels need one, and for a package that the experts don't need."""
    quantizer = "transformers.quantizers.quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer"
    monkeypatch.setattr(f"{quantizer}.validate_environment", lambda self, *args, **kwargs: None)


def fp8_model(folder: Path, family: str, device: str, **options: Any) -> Any:
    """A model whose experts transformers quantizes while it loads it."""
    make_model(family).save_pretrained(folder)
    options = {"weight_block_size": FP8_BLOCK, "modules_to_not_convert": LINEARS, **options}
    config = transformers.FineGrainedFP8Config(**options)
    return load(folder, device, quantization_config=config)


def plain_fp8(module: Any, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """FP8Experts in plain PyTorch and float64: dequantized weights, quantized tokens."""
    w1, w2 = dequantized(module, "gate_up_proj"), dequantized(module, "down_proj")
    a1_scales, a2_scales = [None] * w1.size(0), [None] * w1.size(0)
    if module.activation_scheme == "static":
        # Tokens are quantized once, before they reach their experts: by the largest scale.
        a1_scales = [module.gate_up_proj_activation_scale.max()] * w1.size(0)
        a2_scales = list(module.down_proj_activation_scale.flatten())
    out = torch.zeros_like(hidden_states, dtype=torch.float64)
    for e in range(w1.size(0)):
        token, slot = torch.where(ids == e)
        gate_up = in_fp8(module, hidden_states[token], a1_scales[e]) @ w1[e].t()
        y = in_fp8(module, module._apply_gate(gate_up), a2_scales[e]) @ w2[e].t()
        out.index_add_(0, token, y * weights[token, slot, None].double())
    return out


def dequantized(module: Any, name: str) -> Tensor:
    weight, scale = getattr(module, name).double(), getattr(module, f"{name}_scale_inv").double()
    rows, columns = module.block_size or (weight.size(1) // scale.size(1), weight.size(2))
    return weight * scale.repeat_interleave(rows, 1).repeat_interleave(columns, 2)


def in_fp8(module: Any, tokens: Tensor, scale: Tensor | None) -> Tensor:
    """What tokens are once quantized: by a given scale, or each by its own, or each block of a token."""
    columns = module.block_size[1] if module.block_size else tokens.size(-1)
    groups = tokens.float().unflatten(-1, (-1, columns))
    if scale is None:
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=2.0**-126) / 448
    quantized = (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (quantized.double() * scale.double()).flatten(-2)


@contextlib.contextmanager
def each_fp8_layer_checked(model: Any) -> Iterator[list[None]]:
    """Compares what each experts module gives with plain PyTorch on the same input."""
    checked: list[None] = []

    def check(module: Any, args: tuple[Tensor, ...], result: Tensor) -> None:
        expected = plain_fp8(module, *args)
        difference = (result.double() - expected).norm() / expected.norm()
        # A number here and there rounds to its other neighbour.
        assert difference < 0.02, f"differs from plain PyTorch by {difference:.3e}"
        checked.append(None)

    handles = [module.register_forward_hook(check) for module in experts_of(model)]
    yield checked
    for handle in handles:
        handle.remove()


@pytest.mark.usefixtures("fp8_on_cpu")
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_fp8(family: str, scale_fmt: str, device: str, tmp_path: Path, schemes_run: list[str]) -> None:
    quantized = fp8_model(tmp_path, family, device, scale_fmt=scale_fmt)
    ids = prompt(device)
    with each_fp8_layer_checked(quantized) as checked:
        result = logits(quantized, ids)
    assert len(checked) == len(schemes_run) == 2 and set(schemes_run) == {"fp8_w8a8_block"}
    assert torch.isfinite(result).all()
    for experts in experts_of(quantized):
        assert experts.gate_up_proj.dtype is torch.float8_e4m3fn
    quantized.save_pretrained(tmp_path / "fp8")
    assert torch.equal(logits(load(tmp_path / "fp8", device), ids), result)


@pytest.mark.usefixtures("fp8_on_cpu")
@pytest.mark.parametrize("activation_scheme", ["dynamic", "static"])
def test_fp8_with_one_scale_an_expert(
    activation_scheme: str, device: str, tmp_path: Path, schemes_run: list[str]
) -> None:
    quantized = fp8_model(
        tmp_path, "qwen3_moe", device, weight_block_size=None, activation_scheme=activation_scheme
    )
    scheme = "fp8_w8a8_channel"
    if activation_scheme == "static":
        scheme = "fp8_w8a8_tensor"
        # As a checkpoint would have them: each expert its own, so small that tokens are clamped. Other scales would
        # give other results.
        for experts in experts_of(quantized):
            experts.gate_up_proj_activation_scale.copy_(torch.linspace(0.005, 0.002, 8))
            experts.down_proj_activation_scale.copy_(torch.linspace(0.001, 0.02, 8))
    ids = prompt(device)
    with each_fp8_layer_checked(quantized) as checked:
        result = logits(quantized, ids)
    assert schemes_run == [scheme] * len(checked) and len(checked) == 2
    assert torch.isfinite(result).all()


@pytest.mark.usefixtures("fp8_on_cpu", "fresh_dynamo")
def test_fp8_compiles_once_and_generates(device: str, tmp_path: Path) -> None:
    quantized = fp8_model(tmp_path, "qwen3_moe", device)
    assert_compiles_once(quantized, device)
    assert_generates(quantized, device)
