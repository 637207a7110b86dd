"""How a layer is quantized: the scheme, its sizes and its scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from compile_moe.graph_constants import constant_in_graphs
from compile_moe.ops.problem_size import require_optional_tensors
from compile_moe.quantization import Scheme, make_scheme, parse_scheme


@dataclass(frozen=True, eq=False)
class FusedMoEQuantConfig:
    """Quantization of both GEMMs of a layer.

    Args:
        scheme: "fp8_w8a8_tensor", "fp8_w8a8_channel", "fp8_w8a8_block", "int8_w8a8_channel", "int8_w8a16",
            "int4_w4a16" or "mxfp4_w4a16"; each file in ``compile_moe/quantization/schemes`` has its layouts and its
            formula.
        block_shape: rows and columns that share a scale, fp8_w8a8_block only (default 128 x 128).
        group_size: columns that share a scale, int4_w4a16 (default 128) and int8_w8a16 (default: all) only.
        w1_scale, w2_scale, w1_zp, w2_zp: scales and zero points of the weights, unless the layer's call has them.
        a1_scale, a2_scale: static scales of the tokens before GEMM 1 and between the GEMMs, fp8_w8a8_tensor only:
            float32, one for all, or (E,). Of several a1_scales tokens take the largest, since they are quantized
            once, before they reach their experts. None: computed from the tokens.

    Raises:
        ValueError, TypeError: no such scheme, or sizes or scales that it doesn't have.
    """

    scheme: str
    block_shape: Sequence[int] | None = None
    group_size: int | None = None
    w1_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    w1_zp: Tensor | None = None
    w2_zp: Tensor | None = None
    a1_scale: Tensor | None = None
    a2_scale: Tensor | None = None
    #: What the scheme is, worked out once: sizes that vary among layers would be symbols in a graph.
    facts: SchemeFacts = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require_optional_tensors(
            w1_scale=self.w1_scale,
            w2_scale=self.w2_scale,
            w1_zp=self.w1_zp,
            w2_zp=self.w2_zp,
            a1_scale=self.a1_scale,
            a2_scale=self.a2_scale,
        )
        block_shape = _block(self.block_shape)
        facts = SchemeFacts(*_facts(self.scheme, block_shape, self.group_size))
        object.__setattr__(self, "facts", facts)
        check_zero_points(facts, self.w1_zp, self.w2_zp, complete=False)
        check_static_scale(facts, "a1_scale", self.a1_scale)
        check_static_scale(facts, "a2_scale", self.a2_scale)


class SchemeFacts(NamedTuple):
    """What the parts of a layer need to know of its scheme, as constants of a graph."""

    text: str
    #: Text of the token scaling; "" where tokens aren't quantized.
    scaling: str
    #: Columns that an element of the weights holds.
    packed: int
    has_zero_points: bool
    scale_layout: str

    @property
    def per_tensor(self) -> bool:
        return self.scaling.endswith("per tensor")


def find_scheme(name: str, block_shape: Sequence[int] | None, group_size: int | None) -> Scheme:
    """The scheme that a caller names, with its sizes."""
    return make_scheme(name, block_shape=_block(block_shape), group_size=group_size)


def _block(block_shape: Sequence[int] | None) -> tuple[int, ...] | None:
    if block_shape is None:
        return None
    if not hasattr(block_shape, "__iter__"):
        raise TypeError(f"block_shape must be two ints, rows and columns, got {block_shape!r}")
    return tuple(block_shape)


@constant_in_graphs
def _facts(
    name: str, block_shape: tuple[int, ...] | None, group_size: int | None
) -> tuple[str, str, int, bool, str]:
    scheme = parse_scheme(find_scheme(name, block_shape, group_size).text)
    scaling = scheme.token_scaling
    return (
        scheme.text,
        "" if scaling is None else scaling.text,
        scheme.packed,
        scheme.zero_point_shape(1, 1, 1) is not None,
        scheme.scale_layout,
    )


def require_quant_config(quant_config: object) -> None:
    if quant_config is not None and not isinstance(quant_config, FusedMoEQuantConfig):
        raise TypeError(
            "quant_config must be a compile_moe.FusedMoEQuantConfig, or None for an unquantized layer, got "
            f"{quant_config!r}"
        )


def refuse_scales(class_name: str, **scales: Tensor | None) -> None:
    """Raise ValueError naming the scales and zero points that an unquantized layer was given."""
    given = [name for name, value in scales.items() if value is not None]
    if given:
        raise ValueError(
            f"{class_name} without a quant_config runs unquantized layers and takes no {', '.join(given)}; pass None, "
            "or construct it with a compile_moe.FusedMoEQuantConfig"
        )


def given_once(name: str, given: Tensor | None, configured: Tensor | None) -> Tensor | None:
    """A scale that the call may give, or the config.

    Raises:
        ValueError: if both do, and differently.
    """
    require_optional_tensors(**{name: given})
    if given is None or given is configured:
        return configured
    if configured is not None:
        raise ValueError(
            f"{name} of the call and {name} of the quant_config are two tensors; give one of them, or the same"
        )
    return given


def check_zero_points(
    facts: SchemeFacts, w1_zp: Tensor | None, w2_zp: Tensor | None, complete: bool = True
) -> None:
    """Raise ValueError for zero points that the scheme doesn't have or, if ``complete``, for one alone."""
    given = [name for name, value in (("w1_zp", w1_zp), ("w2_zp", w2_zp)) if value is not None]
    if given and not facts.has_zero_points:
        raise ValueError(f"scheme {facts.text} has no zero points: {' and '.join(given)} must be None")
    if complete and len(given) == 1:
        raise ValueError(f"w1_zp and w2_zp must be given both or neither, got {given[0]} only")


def check_static_scale(
    facts: SchemeFacts, name: str, scale: Tensor | None, num_experts: int | None = None
) -> None:
    """Check a static scale of tokens: whether the scheme has it, its dtype and its shape."""
    if scale is None:
        return
    if not facts.scaling:
        raise ValueError(f"scheme {facts.text} doesn't quantize tokens: {name} must be None")
    if not facts.per_tensor:
        raise ValueError(
            f"scheme {facts.text} computes the scales of its tokens ({facts.scaling}): {name} must be None"
        )
    if scale.dtype is not torch.float32:
        raise TypeError(f"{name} must be float32, got {scale.dtype}")
    sizes = "(E,)" if num_experts is None else f"(E,) = ({num_experts},)"
    fits = scale.dim() <= 1 and scale.numel() > 0
    if num_experts is not None:
        fits = fits and scale.numel() in (1, num_experts)
    if not fits:
        raise ValueError(f"{name} must hold one scale, (), (1,) or {sizes}, got {tuple(scale.shape)}")
