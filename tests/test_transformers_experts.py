"""Experts classes of Hugging Face transformers, each run by the library and by its own forward."""

from __future__ import annotations

import contextlib
import copy
import importlib
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compile_moe.integrations.transformers as integration
from compile_moe.activations import resolve_activation
from tests.support.tiny_models import Float64Throughout, assert_close

transformers = pytest.importorskip("transformers")
integration.register()


@pytest.fixture(autouse=True)
def forward_only() -> Any:
    with torch.no_grad():
        yield


def experts_classes() -> list[tuple[str, str]]:
    """(module, class) of every class that transformers dispatches by experts_implementation."""
    decorated = re.compile(r"^@use_experts_implementation.*\nclass (\w+)\(", re.MULTILINE)
    folder = Path(transformers.__file__).parent / "models"
    return [
        (f"transformers.models.{path.parent.name}.{path.stem}", name)
        for path in sorted(folder.glob("*/modeling_*.py"))
        for name in decorated.findall(path.read_text())
    ]


def make_experts(module: str, name: str, dtype: torch.dtype = torch.float32) -> Any:
    sizes = dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 20)
    sizes |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6)
    # Limits that clamp some of the values.
    config = types.SimpleNamespace(
        **sizes,
        hidden_size=24,
        moe_hidden_size=24,
        moe_latent_size=None,
        hidden_act="silu",
        hidden_activation="gelu_pytorch_tanh",
        mlp_hidden_act="relu2",
        swiglu_limit=0.7,
        swiglu_alpha=1.5,
        mlp_gate_softcap=0.9,
        mlp_up_softcap=0.9,
        post_norm_eps=1e-5,
        _experts_implementation=integration.NAME,
    )
    try:
        experts = getattr(importlib.import_module(module), name)(config)
    except AttributeError as error:
        pytest.skip(
            f"transformers {transformers.__version__} has a class that needs more of its config: {error}"
        )
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype)


def routed(experts: nn.Module, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states, top_k_index, top_k_weights; nobody goes to the last expert."""
    weights, ids = torch.rand(tokens, 5).topk(2)
    dtype = next(experts.parameters()).dtype
    return torch.randn(tokens, 24).to(dtype), ids, weights.to(dtype)


def eager_forward(
    experts: Any, hidden_states: Tensor, ids: Tensor, weights: Tensor, dtype: torch.dtype
) -> Tensor:
    """The class's own forward in ``dtype``."""
    own = copy.deepcopy(experts).to(dtype)
    own.config._experts_implementation = "eager"
    with Float64Throughout() if dtype is torch.float64 else contextlib.nullcontext():
        return own(hidden_states.to(dtype), ids, weights.to(dtype)).to(dtype)


@pytest.mark.parametrize(("module", "name"), experts_classes(), ids=lambda part: part.rpartition(".")[2])
def test_every_experts_class(module: str, name: str) -> None:
    experts = make_experts(module, name)
    for tokens in (9, 1, 0):
        arguments = routed(experts, tokens)
        exact = eager_forward(experts, *arguments, torch.float64)
        assert_close(experts(*arguments), eager_forward(experts, *arguments, torch.float32), exact)
    w1 = experts.gate_up_proj if experts.has_gate else experts.up_proj
    activation = experts._apply_gate if experts.has_gate else experts.act_fn
    resolved = resolve_activation(activation, w1.size(2 if experts.is_transposed else 1), w1)
    assert resolved.function is None, f"not fused: {resolved.reason}"


MODELS = "transformers.models"
LAYOUTS = [
    (f"{MODELS}.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts"),
    (f"{MODELS}.gpt_oss.modeling_gpt_oss", "GptOssExperts"),
    (f"{MODELS}.nemotron_h.modeling_nemotron_h", "NemotronHExperts"),
]
each_layout = pytest.mark.parametrize(
    ("module", "name"), LAYOUTS, ids=["plain", "transposed-biased", "ungated"]
)


@each_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_experts_in_low_precision(module: str, name: str, dtype: torch.dtype) -> None:
    experts = make_experts(module, name, dtype)
    arguments = routed(experts, 33)
    exact = eager_forward(experts, *arguments, torch.float64)
    assert_close(experts(*arguments), eager_forward(experts, *arguments, dtype), exact)


@each_layout
def test_id_num_experts_skips_its_slot(module: str, name: str) -> None:
    """Under expert parallelism the router hands out that id, with weight 0, for experts of other ranks."""
    experts = make_experts(module, name)
    hidden_states, ids, weights = routed(experts)
    elsewhere = torch.rand(ids.shape) < 0.5
    weights = weights.masked_fill(elsewhere, 0)
    exact = eager_forward(experts, hidden_states, ids, weights, torch.float64)
    eager = eager_forward(experts, hidden_states, ids, weights, torch.float32)
    assert_close(experts(hidden_states, ids.masked_fill(elsewhere, 6), weights), eager, exact)


@each_layout
def test_hidden_states_of_higher_precision(module: str, name: str) -> None:
    experts = make_experts(module, name, torch.bfloat16)
    hidden_states, ids, weights = routed(experts)
    result = experts(hidden_states.float(), ids, weights.float())
    assert result.dtype is torch.float32
    torch.testing.assert_close(result, experts(hidden_states, ids, weights).float(), rtol=2e-2, atol=2e-2)


def test_quantized_and_missing_weights_are_refused() -> None:
    experts = make_experts(*LAYOUTS[0])
    arguments = routed(experts)
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"Qwen3MoeExperts.down_proj must be bfloat16, .* got torch.int8"):
        experts(*arguments)
    experts.gate_up_proj = None
    with pytest.raises(TypeError, match=r"Qwen3MoeExperts.gate_up_proj must be a tensor, got NoneType"):
        experts(*arguments)
