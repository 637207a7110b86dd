"""Tiny models of transformers with quantized experts: what their tests share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import compile_moe
import compile_moe.integrations.transformers as integration
from compile_moe.integrations import experts_module
from compile_moe.integrations.experts_module import is_experts, projections
from tests.support.tiny_models import COMMON, assert_close, tiny_model

MXFP4 = "mxfp4_w4a16"
#: Sizes that all schemes divide.
SIZES = {"intermediate_size": 32, "moe_intermediate_size": 32}


def record_schemes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the scheme of each layer that runs; "" where it isn't quantized."""
    schemes: list[str] = []

    def layer(*args: Any, quant_config: Any = None, **kwargs: Any) -> Tensor:
        schemes.append("" if quant_config is None else quant_config.scheme)
        return compile_moe.fused_experts(*args, quant_config=quant_config, **kwargs)

    monkeypatch.setattr(experts_module, "fused_experts", layer)
    return schemes


def prompt(device: str, length: int = 12) -> Tensor:
    # No padding: generate would mask it.
    return torch.randint(1, COMMON["vocab_size"], (2, length), device=device)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_experts(module)]


def make_model(family: str, **options: Any) -> Any:
    return tiny_model(family, **SIZES, **options)


def load(folder: Path, device: str = "cpu", **options: Any) -> Any:
    options = {"experts_implementation": integration.NAME, **options}
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).to(device).eval()


def assert_as_float_experts(
    result: Tensor, model: Any, weights: list[tuple[Tensor, Tensor]], ids: Tensor
) -> None:
    """Against the model with float experts of these weights, (E, N, K) float64."""
    outcomes = []
    for dtype in (torch.float64, torch.float32):
        with_floats = copy.deepcopy(model).to(dtype)
        for experts, stacked in zip(experts_of(with_floats), weights, strict=True):
            for name, w in zip(projections(experts), stacked, strict=True):
                w = w.transpose(1, 2) if experts.is_transposed else w
                setattr(experts, name, nn.Parameter(w.to(dtype), requires_grad=False))
        with_floats.set_experts_implementation("eager")
        outcomes.append(logits(with_floats, ids))
    exact, eager = outcomes
    assert_close(result, eager.to(result.dtype), exact.double())


def dequantized(model: Any) -> list[tuple[Tensor, Tensor]]:
    """w1 and w2 that the quantized experts stand for, (E, N, K) in float64."""
    found = []
    for experts in experts_of(model):
        q = experts.compile_moe_quantization
        sizes = {"block_shape": q.block_shape, "group_size": q.group_size}
        weights = []
        for projection in projections(experts):
            weight, scale, zero_point = (getattr(experts, name) for name in q.names(projection))
            weight = weight.flatten(2)
            weights.append(
                compile_moe.dequantize_weights(
                    weight, q.scheme, scale, zero_point, dtype=torch.float64, **sizes
                )
            )
        found.append((weights[0], weights[1]))
    return found


def assert_compiles_once(model: Any, device: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (7, 2, 40):
        ids = prompt(device, length)
        if length == 7:
            torch._dynamo.mark_dynamic(ids, 1)
        assert_nearly(logits(compiled, ids), logits(model, ids))
    assert counter.frame_count == 1


def assert_generates(model: Any, device: str) -> None:
    """Each token's logits, with a cache, as they follow from the whole sequence so far."""
    ids = prompt(device)
    options = {"do_sample": False, "disable_compile": True, "output_logits": True}
    result = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **options)
    assert torch.equal(result.sequences[:, : ids.size(1)], ids)
    assert len(result.logits) == result.sequences.size(1) - ids.size(1) == 4
    for length, given in enumerate(result.logits, ids.size(1)):
        assert_nearly(given, logits(model, result.sequences[:, :length])[:, -1])
        assert torch.equal(result.sequences[:, length], given.argmax(-1))


def assert_nearly(result: Tensor, expected: Tensor) -> None:
    # A token here and there rounds to its other neighbour.
    assert (result - expected).norm() <= 0.02 * expected.norm()
