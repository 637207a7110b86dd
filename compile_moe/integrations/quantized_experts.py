"""Experts modules of transformers that hold their weights in one of our schemes.

Parameters of a projection P (gate_up_proj or up_proj, and down_proj), in the layout that the README's table gives:

| Scheme | Weights | Scales | Zero points |
|---|---|---|---|
| mxfp4_w4a16, as gpt-oss' checkpoints have them | P_blocks, (E, N, K / 32, 16) | P_scales | |
| the others | P_quantized | P_scale | P_zero_point, if there are any |

Only our implementation runs them. None is called P: with another ``experts_implementation`` the module says which
attribute it lacks, and can't take stored integers for weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compile_moe.dtensor_weights import as_sharded
from compile_moe.integrations.experts_module import Operands, float_weights, parts_of, projections
from compile_moe.quant_config import FusedMoEQuantConfig, find_scheme
from compile_moe.quantization import QuantizedWeights
from compile_moe.quantize_weights import check_quantizable, quantize_weights

_MXFP4 = "mxfp4_w4a16"
_ATTRIBUTE = "compile_moe_quantization"


@dataclass(frozen=True)
class ExpertsQuantization:
    """How a module's experts are quantized: arguments of :class:`compile_moe.FusedMoEQuantConfig`."""

    scheme: str
    block_shape: Sequence[int] | None = None
    group_size: int | None = None

    def names(self, projection: str) -> tuple[str, str, str]:
        """Parameters that hold weights, scales and zero points."""
        weight, scale = ("_blocks", "_scales") if self.scheme == _MXFP4 else ("_quantized", "_scale")
        return f"{projection}{weight}", f"{projection}{scale}", f"{projection}_zero_point"


def quantization_of(module: Any) -> ExpertsQuantization | None:
    """How :func:`quantize_module` or :func:`declare_module` left a module."""
    return getattr(module, _ATTRIBUTE, None)


def check_module(module: Any, quantization: ExpertsQuantization, zero_points: bool = False) -> None:
    """Check that a module has float weights which the scheme can hold; what changes a module does so first."""
    held = quantization_of(module)
    if held is not None:
        raise ValueError(
            f"{type(module).__name__} is quantized already, to {held.scheme}: quantize a model with float weights"
        )
    if parts_of(module) is not None:
        raise ValueError(
            f"{type(module).__name__} is parallelized: how tokens travel is settled; quantize a model before "
            "compile_moe.parallelize"
        )
    scheme = find_scheme(quantization.scheme, quantization.block_shape, quantization.group_size)
    for projection, w in zip(projections(module), float_weights(module), strict=True):
        check_quantizable(f"{type(module).__name__}.{projection}", w, scheme, zero_points)


def quantize_module(module: Any, quantization: ExpertsQuantization, zero_points: bool = False) -> None:
    """Replace a module's float weights by quantized ones."""
    check_module(module, quantization, zero_points)
    quantized = [
        quantize_weights(
            w.detach(),
            quantization.scheme,
            block_shape=quantization.block_shape,
            group_size=quantization.group_size,
            zero_points=zero_points,
        )
        for w in float_weights(module)
    ]
    for projection, weights in zip(projections(module), quantized, strict=True):
        _set_weights(module, quantization, projection, weights)


def declare_module(module: Any, quantization: ExpertsQuantization) -> None:
    """Replace a module's float weights by uninitialised quantized ones, without zero points, on the same device."""
    check_module(module, quantization)
    scheme = find_scheme(quantization.scheme, quantization.block_shape, quantization.group_size)
    for projection, w in zip(projections(module), float_weights(module), strict=True):
        weight = w.new_empty(scheme.weight_shape(*w.shape), dtype=scheme.weight_dtype)
        scale = w.new_empty(scheme.scale_shape(*w.shape), dtype=scheme.scale_dtype or w.dtype)
        _set_weights(module, quantization, projection, QuantizedWeights(weight, scale))


def _set_weights(
    module: Any, quantization: ExpertsQuantization, projection: str, weights: QuantizedWeights
) -> None:
    if quantization.scheme == _MXFP4:
        weights = weights._replace(weight=weights.weight.unflatten(2, (-1, 16)))
    # Whether results are summed over ranks, transformers sees by DTensors.
    weights = QuantizedWeights(*(as_sharded(tensor, getattr(module, projection)) for tensor in weights))
    delattr(module, projection)
    for name, tensor in zip(quantization.names(projection), weights, strict=True):
        module.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
    setattr(module, _ATTRIBUTE, quantization)


def quantized_operands(module: Any, quantization: ExpertsQuantization, hidden_states: Tensor) -> Operands:
    """A quantized module's weights, with its scales in a config."""
    q1, q2 = (_weights(module, quantization, projection) for projection in projections(module))
    config = FusedMoEQuantConfig(
        quantization.scheme,
        block_shape=quantization.block_shape,
        group_size=quantization.group_size,
        w1_scale=q1.scale,
        w2_scale=q2.scale,
        w1_zp=q1.zero_point,
        w2_zp=q2.zero_point,
    )
    return Operands(q1.weight, q2.weight, config, _token_dtype(module, q1.scale, hidden_states))


def _weights(module: Any, quantization: ExpertsQuantization, projection: str) -> QuantizedWeights:
    weight, scale, zero_point = (getattr(module, name) for name in quantization.names(projection))
    return QuantizedWeights(weight.flatten(2) if quantization.scheme == _MXFP4 else weight, scale, zero_point)


def _token_dtype(module: Any, scale: Tensor, hidden_states: Tensor) -> torch.dtype:
    """The dtype that the weights had, where something still has it."""
    if module.has_bias:
        return getattr(module, f"{projections(module)[1]}_bias").dtype
    return scale.dtype if scale.dtype in (torch.bfloat16, torch.float16) else hidden_states.dtype
