"""A quantized layer of one token through the op that compiled graphs call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compile_moe.ops import quantize_tokens, quantized_one_token_experts
from compile_moe.ops.named_activations import program_text
from compile_moe.quantization import SCHEMES
from tests.support.quantized import Quantized, Variant, make_quantized

#: Every scheme that has them, with its sizes by default, and others.
VARIANTS = {name: Variant(name) for name in sorted(SCHEMES) if SCHEMES[name].decode_registers is not None} | {
    "int4, zero points": Variant("int4_w4a16", zero_points=True),
    "int4, narrow groups": Variant("int4_w4a16", (("group_size", 32),), zero_points=True),
    "int4, wide groups": Variant("int4_w4a16", (("group_size", 512),)),
    "int8, zero points": Variant("int8_w8a16", (("group_size", 64),), zero_points=True),
    "int8, narrow groups": Variant("int8_w8a16", (("group_size", 32),)),
}


#: What differs in the kernels: slots and parts of the depth (4 and 8 with one or two experts), ends of both, epilogues.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one expert": {"E": 2, "topk": 1, "K": 32, "I": 1552},
    "two, deep": {"topk": 2, "K": 32, "I": 784},
    "three": {"topk": 3},
    "eight": {"E": 16, "topk": 8, "K": 96, "I": 384},
    "ten": {"E": 32, "topk": 10, "K": 160, "I": 96},
    "sixteen": {"E": 32, "topk": 16, "K": 64, "I": 96},
    "short": {"K": 32, "I": 32},
    "biased, interleaved": {"biased": True, "activation": "swigluoai", "I": 160},
    "ungated": {"biased": True, "activation": "relu2_no_mul"},
    "mapped": {"mapped": True, "biased": True},
    "skipped": {"skipped": True, "E": 8, "topk": 4},
}


def make(variant: str, case: str, **options: Any) -> Quantized:
    """A layer of one token."""
    sizes = {"M": 1, "E": 8, "topk": 2, "K": 256, "I": 128, "dtype": torch.bfloat16}
    return make_quantized(VARIANTS[variant], **sizes | CASES[case] | options)


def arguments_of(
    quantized: Quantized,
    device: str,
    round_weights: bool = False,
    apply_weights: bool = True,
    **changed: Any,
) -> tuple[Any, ...]:
    """Of the op.

    Args:
        changed: arguments by name, instead of the layer's.
    """
    layer, scales = quantized.layer, quantized.scales
    x, w1, w2, weights, ids = quantized.args
    scheme = quantized.variant.made
    tokens, tokens_scale = x, None
    if scheme.token_scaling is not None:
        tokens, tokens_scale = quantize_tokens(x, scheme.token_scaling.text)
    given = {
        "hidden_states": tokens,
        "hidden_states_scale": tokens_scale,
        "w1": w1,
        "w1_scale": scales["w1_scale"],
        "w1_zp": scales["w1_zp"],
        "w2": w2,
        "w2_scale": scales["w2_scale"],
        "w2_zp": scales["w2_zp"],
        "topk_weights": weights,
        "topk_ids": ids,
        "scheme": scheme.text,
        "out_dtype": x.dtype,
        "expert_map": layer.expert_map,
        "w1_bias": layer.w1_bias,
        "w2_bias": layer.w2_bias,
        "epilogue": program_text(layer.activation),
    } | changed
    tensors = tuple(value.to(device) if isinstance(value, Tensor) else value for value in given.values())
    return *tensors, apply_weights, round_weights


def run_one_token(quantized: Quantized, *args: Any, **options: Any) -> Tensor:
    """On the GPU; the result is on the CPU."""
    result: Tensor = quantized_one_token_experts(*arguments_of(quantized, "cuda", *args, **options))
    return result.cpu()
