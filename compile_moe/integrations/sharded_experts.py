"""Experts modules of transformers that hold one rank's experts and exchange tokens with the other ranks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from compile_moe.dtensor_weights import own_experts
from compile_moe.integrations.experts_module import (
    PARTS,
    float_weights,
    parts_of,
    refuse_save_pretrained,
)
from compile_moe.integrations.fp8_experts import fp8_experts_forward, fp8_operands, is_fp8
from compile_moe.integrations.quantized_experts import quantization_of, quantized_operands
from compile_moe.integrations.transformers import experts_forward
from compile_moe.quant_config import FusedMoEQuantConfig


def num_experts_of(module: Any) -> int:
    """Experts that a module holds, on all ranks if its weights are DTensors."""
    return next(module.parameters(recurse=False)).size(0)


def check_module(name: str, module: Any) -> FusedMoEQuantConfig | None:
    """Check that a module can be cut by expert, and say how its tokens are quantized; changes nothing."""
    where = f"{type(module).__name__} at {name}" if name else type(module).__name__
    if parts_of(module) is not None:
        raise ValueError(f"{where} is parallelized already: call parallelize once for each model")
    if "forward" in vars(module):
        raise ValueError(
            f"{where} has a forward of its own, as transformers' expert-parallel plan (distributed_config) or "
            "accelerate's hooks (device_map) put in: load the model without these, and parallelize it then"
        )
    sizes = {key: tuple(weight.shape) for key, weight in module.named_parameters(recurse=False)}
    sizes |= {key: tuple(buffer.shape) for key, buffer in module.named_buffers(recurse=False)}
    if len({size[:1] for size in sizes.values()}) != 1:
        raise NotImplementedError(
            f"{where} must hold tensors whose first dimension are its experts, got "
            f"{', '.join(f'{key} {size}' for key, size in sizes.items()) or 'none'}; give this rank's weights to "
            "compile_moe.FusedMoEModularKernel yourself, or choose transformers' expert-parallel plan"
        )
    config = _quant_config(module)
    if config is None:
        return None
    if config.a1_scale is not None:
        raise NotImplementedError(
            f"{where} has static scales of its tokens, each expert's its own, and a token is quantized once, before it "
            "is sent; load the model with FineGrainedFP8Config(dequantize=True), and quantize it by "
            "compile_moe.integrations.transformers.quantize_experts(model, 'fp8_w8a8_channel')"
        )
    # Only the scheme: weights may be replaced later, and prepare sees no scales.
    return FusedMoEQuantConfig(config.scheme, config.block_shape, config.group_size)


def shard_module(module: Any, parts: Any) -> None:
    """Keep the experts of ``parts``' placement, and let the module's forward send tokens to theirs."""
    for tensors in (module._parameters, module._buffers):
        for name, held in tensors.items():
            if held is not None:
                own = own_experts(held, parts)
                is_parameter = isinstance(held, nn.Parameter)
                tensors[name] = nn.Parameter(own, requires_grad=held.requires_grad) if is_parameter else own
    setattr(module, PARTS, parts)
    # Not by experts_implementation: any other would take global ids for those of the experts that are here.
    module.forward = functools.partial(fp8_experts_forward if is_fp8(module) else experts_forward, module)
    module.register_load_state_dict_pre_hook(_take_own_experts)


def refuse_saving(model: nn.Module) -> None:
    """Let save_pretrained raise."""
    refuse_save_pretrained(model, _save_pretrained)


def _quant_config(module: Any) -> FusedMoEQuantConfig | None:
    tokens = torch.empty(0, device="meta")
    quantization = quantization_of(module)
    if quantization is not None:
        return quantized_operands(module, quantization, tokens).quant_config
    if is_fp8(module):
        return fp8_operands(module, tokens).quant_config
    float_weights(module, any_layout=True)
    return None


def _take_own_experts(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of the whole model's experts, this rank's; what has as many experts as this rank is taken for its own."""
    parts = parts_of(module)
    for name, held in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        given = state_dict.get(prefix + name)
        is_whole = isinstance(given, Tensor) and given.dim() > 0 and given.size(0) == parts.num_experts
        if is_whole and held.size(0) != parts.num_experts:
            state_dict[prefix + name] = own_experts(given, parts)


def _save_pretrained(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "save_pretrained would write one rank's experts as if they were the model: save the model before "
        "compile_moe.parallelize, or each rank's model.state_dict() by torch.save, to be given to load_state_dict of a "
        "model that was parallelized alike"
    )
