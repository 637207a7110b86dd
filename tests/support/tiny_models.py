"""Tiny language models of transformers, and the tolerance of the library's experts against transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import compile_moe.integrations.transformers as integration

#: Tiny configurations, one for each family: the class, and what it has beyond the common part.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "olmoe": ("OlmoeConfig", {"num_experts": 8, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "head_dim": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 16}),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "num_hidden_layers": None,
            "layers_block_type": ["full_attention", "moe"] * 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_shared_expert_intermediate_size": 24,
        },
    ),
}
COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    # Large enough for the experts to decide the tokens.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def one_layer(family: str) -> dict[str, Any]:
    """Options of :func:`tiny_model` for a single layer with experts."""
    if family == "nemotron_h":
        return {"layers_block_type": ["full_attention", "moe"]}
    return {"num_hidden_layers": 1} | ({"first_k_dense_replace": 0} if family == "deepseek_v3" else {})


def tiny_model(family: str, experts: str = integration.NAME, **options: Any) -> Any:
    """A randomly initialised model of a family, its configuration changed by ``options``."""
    import transformers

    name, own = FAMILIES[family]
    config = getattr(transformers, name)(**{**COMMON, **own, **options})
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation=experts).eval()


class Float64Throughout(TorchFunctionMode):
    """Turns every cast to float32 into one to float64: some classes compute in float32 whatever they are given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


class ChoiceMargins(TorchFunctionMode):
    """How near to a tie the choices of experts are that are made under it, relative to the largest score."""

    smallest = float("inf")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, Tensor.topk):
            scores, chosen = args[0], result[0]
            k = chosen.size(-1)
            if k < scores.size(-1) and scores.numel():
                ordered = scores.sort(-1, descending=True).values
                margin = (ordered[..., k - 1] - ordered[..., k]).min() / scores.abs().max()
                self.smallest = min(self.smallest, margin.item())
        return result


def assert_close(result: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Against float64, at most twice the error of transformers' own experts, plus two roundings."""
    assert result.dtype == eager.dtype and result.shape == eager.shape
    if not exact.numel():
        return
    error = (result.double() - exact).norm()
    bound = 2 * ((eager.double() - exact).norm() + torch.finfo(result.dtype).eps * exact.abs().max())
    assert error <= bound, f"error {error:.3e} exceeds {bound:.3e}"
