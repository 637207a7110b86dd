"""The MoE layer of a model between its two norms, in the model's own classes: what is explained and timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import compile_moe.integrations.transformers as integration
from compile_moe.cli.language_model import Block, moe_block, one_line
from compile_moe.cli.refusal import Refusal

_QWEN3 = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
#: Configurations by name: a class of transformers, and what differs from its defaults.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": ("Qwen3MoeConfig", _QWEN3),
    "qwen3-30b-a3b-shared": ("Qwen2MoeConfig", {**_QWEN3, "shared_expert_intermediate_size": 768}),
    "gpt-oss-120b": ("GptOssConfig", {"num_local_experts": 128}),
    "gpt-oss-20b": ("GptOssConfig", {"num_local_experts": 32}),
    "mixtral-8x7b": ("MixtralConfig", {}),
    "deepseek-v3": ("DeepseekV3Config", {}),
}


class MoELayer(nn.Module):
    """RMSNorm, a model's MoE block, residual add, the next layer's RMSNorm; hidden_states (M, K) to the sum and the
    normalised sum, both (M, K).
    """

    def __init__(self, moe: nn.Module, hidden_size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.moe = moe
        self.norm, self.next_norm = (nn.RMSNorm(hidden_size, eps, dtype=dtype) for _ in range(2))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        y = self.moe(self.norm(hidden_states)[None])
        # Some blocks return what their router computed, too.
        hidden_states = hidden_states + (y[0] if isinstance(y, tuple) else y)[0]
        return hidden_states, self.next_norm(hidden_states)


def configuration(model: str) -> Any:
    """The configuration named ``model``, or that of the checkpoint in the folder ``model``; of its text part.

    Raises:
        Refusal: no transformers, no such name or folder, no configuration that transformers knows.
    """
    try:
        integration.register()
    except ImportError as error:
        raise Refusal(one_line(error)) from error
    import transformers

    if model in MODELS:
        name, options = MODELS[model]
        return getattr(transformers, name)(**options)
    if not (Path(model) / "config.json").is_file():
        raise Refusal(
            f"--model must be {', '.join(MODELS)}, or a folder with a config.json, got {model}; a shape of your own "
            "goes with --hidden-size and its like"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            model, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a damaged file, an unknown class
        raise Refusal(
            f"transformers can't read {model}: {type(error).__name__}: {one_line(error)}"
        ) from error
    return config.get_text_config()


def custom_configuration(
    hidden_size: int, intermediate_size: int, num_experts: int, topk: int, shared_intermediate_size: int = 0
) -> Any:
    """A configuration of Qwen's classes for a shape: softmax over all experts, renormalised weights, silu.

    Raises:
        Refusal: no transformers, or sizes that don't fit together.
    """
    sizes = {
        "--hidden-size": hidden_size,
        "--intermediate-size": intermediate_size,
        "--num-experts": num_experts,
        "--topk": topk,
    }
    for option, size in sizes.items():
        if size < 1:
            raise Refusal(f"{option} must be at least 1, got {size}")
    if topk > num_experts:
        raise Refusal(f"--topk must be at most --num-experts, got {topk} of {num_experts}")
    if shared_intermediate_size < 0:
        raise Refusal(
            f"--shared-intermediate-size must be at least 0 (no shared expert), got {shared_intermediate_size}"
        )
    try:
        integration.register()
    except ImportError as error:
        raise Refusal(one_line(error)) from error
    import transformers

    options = {
        "hidden_size": hidden_size,
        "moe_intermediate_size": intermediate_size,
        "num_experts": num_experts,
        "num_experts_per_tok": topk,
        "norm_topk_prob": True,
    }
    if shared_intermediate_size:
        return transformers.Qwen2MoeConfig(
            **options, shared_expert_intermediate_size=shared_intermediate_size
        )
    return transformers.Qwen3MoeConfig(**options)


def make_layer(
    config: Any, experts: str, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> MoELayer:
    """The first MoE layer of a model, with random weights on ``device``; nothing else of the model is allocated.

    Args:
        config: of a causal language model of transformers.
        experts: what transformers calls experts_implementation.

    Raises:
        Refusal: not a Mixture-of-Experts model, or no such experts.
    """
    import transformers

    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, experts_implementation=experts
            )
    except Exception as error:  # unknown experts, a config that its class doesn't take
        raise Refusal(
            f"transformers can't make this model: {type(error).__name__}: {one_line(error)}"
        ) from error
    block: Block = moe_block(model)
    hidden_size: int = config.hidden_size
    eps = getattr(config, "rms_norm_eps", 1e-6)
    layer = MoELayer(block.module, hidden_size, eps, dtype).eval()
    # Not to_empty(): it can't make fake tensors of meta ones.
    for module in layer.modules():
        for name, t in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            parameter = isinstance(t, nn.Parameter)
            fresh = torch.empty(t.shape, dtype=t.dtype, device=device)
            setattr(module, name, nn.Parameter(fresh, requires_grad=False) if parameter else fresh)
    _fill(layer, hidden_size, device, seed)
    return layer


def _fill(layer: MoELayer, hidden_size: int, device: torch.device, seed: int) -> None:
    """As at the start of a training: outputs of the order of 1, choices spread over all experts."""
    fake = torch._guards.detect_fake_mode() is not None
    generator = None if fake else torch.Generator(device).manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if name.startswith(("norm", "next_norm")):
            parameter.fill_(1)
        else:
            parameter.normal_(0, hidden_size**-0.5, generator=generator)
    for buffer in layer.buffers():
        buffer.zero_()


def experts_of(layer: MoELayer) -> Any:
    """The module that transformers dispatches by experts_implementation."""
    return next(m for m in layer.modules() if hasattr(m, "has_gate") and hasattr(m, "is_transposed"))


def columns_of(experts: Any) -> tuple[int, int]:
    """(N, I): the columns that an activation of these experts takes and gives."""
    w1, w2 = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
    return (w1.size(2), w2.size(1)) if experts.is_transposed else (w1.size(1), w2.size(2))


def set_activation(layer: MoELayer, activation: Any) -> None:
    """Let the experts compute ``activation`` (gate_up (..., N) to (..., I)) in place of their own."""
    experts = experts_of(layer)
    if experts.has_gate:
        # Not setattr: a module would become a submodule, and the class's own method be found first.
        experts.__dict__["_apply_gate"] = activation
    else:
        del experts.act_fn  # a module, whose place a function can't take
        experts.act_fn = activation
