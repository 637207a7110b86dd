"""Checks of quantized operands."""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.problem_size import (
    check_device,
    check_float_dtype,
    check_weight,
    require,
    require_optional_tensors,
    require_type,
    shape,
)
from compile_moe.quantization import Scheme, TokenScaling


def check_compute_dtype(out_dtype: torch.dtype, reference: Tensor) -> None:
    check_float_dtype("out_dtype: a result", reference.new_empty((0,), dtype=out_dtype))


def check_tokens(
    name: str, scale_name: str, tokens: Tensor, scale: Tensor | None, scheme: Scheme, out_dtype: torch.dtype
) -> None:
    """Check the left operand (rows, columns) of a quantized GEMM and its scales."""
    require(tokens.dim() == 2, lambda: f"{name} must be 2-dimensional, got {shape(tokens)}")
    scaling = scheme.token_scaling
    if scaling is None:
        require_type(
            tokens.dtype is out_dtype,
            lambda: f"{name} must be {out_dtype} for scheme {scheme.text}, got {tokens.dtype}",
        )
        require(
            scale is None,
            lambda: f"scheme {scheme.text} doesn't quantize tokens: {scale_name} must be None, got a tensor",
        )
        return
    require_type(
        tokens.dtype is scaling.dtype,
        lambda: (
            f"{name} must be {scaling.dtype} for scheme {scheme.text}, got {tokens.dtype}; quantize it, as "
            "MoEPrepareAndFinalizeNoEP(quant_config=...) does"
        ),
    )
    if scale is None:
        raise ValueError(
            f"{scale_name} is missing: scheme {scheme.text} needs the scales of {name}, as quantize_tokens returns them"
        )
    check_token_scale(scale_name, scale, scaling, tokens)


def check_token_scale(name: str, scale: Tensor, scaling: TokenScaling, tokens: Tensor) -> None:
    """Check the scales of tokens (rows, columns)."""
    m, k = tokens.shape
    require_type(
        scale.dtype is torch.float32, lambda: f"{name} must be float32 ({scaling.text}), got {scale.dtype}"
    )
    check_device("the tokens", tokens, **{name: scale})
    if scaling.per == "tensor" and scale.dim() == 1:
        require(
            scale.size(0) == 1,
            lambda: f"{name} must be (1,) or {(m, 1)} ({scaling.text}), got {shape(scale)}",
        )
        return
    columns = 1 if scaling.per == "tensor" else scaling.scale_shape(m, k)[1]
    either = "(1,) or " if scaling.per == "tensor" else ""
    require(
        scale.dim() == 2 and scale.size(1) == columns and scale.size(0) == m,
        lambda: f"{name} must be {either}{(m, columns)} ({scaling.text}), got {shape(scale)}",
    )


def check_quantized_weight(
    name: str,
    sizes: str,
    w: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    num_columns: int,
    scheme: Scheme,
    act_dtype: torch.dtype,
) -> None:
    """Check a stack of expert matrices in a scheme's layout, of ``num_columns`` columns when it is unpacked.

    Args:
        sizes: how the three sizes are called, "E, N, K".
        act_dtype: dtype of the activations.
    """
    check_weight(name, f"({sizes})", w)
    num_experts, n = w.size(0), w.size(1)
    sized = (num_experts, n, num_columns)
    require(
        num_columns % scheme.column_multiple == 0,
        lambda: (
            f"scheme {scheme.text} needs columns of {name} ({sizes}) that are a multiple of "
            f"{scheme.column_multiple}, got {sized}{scheme.other_columns}"
        ),
    )
    expected = scheme.weight_shape(*sized)
    require_type(
        w.dtype is scheme.weight_dtype,
        lambda: f"{name} must be {scheme.weight_dtype} for scheme {scheme.text}, got {w.dtype}",
    )
    require(
        tuple(w.shape) == expected,
        lambda: f"{name} must be {expected} for ({sizes}) = {sized} in scheme {scheme.text}, got {shape(w)}",
    )
    dtypes = (act_dtype, torch.float32) if scheme.scale_dtype is None else (scheme.scale_dtype,)
    _check_companion(
        f"{name}_scale", scale, scheme.scale_shape(*sized), dtypes, f"({sizes}) = {sized}", scheme, w
    )
    if zero_point is None:
        return
    shape_of_zeros = scheme.zero_point_shape(*sized)
    if shape_of_zeros is None:
        raise ValueError(
            f"scheme {scheme.text} has no zero points: {name}_zp must be None, got {shape(zero_point)}"
        )
    require(
        n % scheme.packed_zero_points == 0,
        lambda: (
            f"{name}_zp of scheme {scheme.text} packs {scheme.packed_zero_points} rows: {name} ({sizes}) must have a "
            f"multiple of them, got {sized}"
        ),
    )
    _check_companion(
        f"{name}_zp", zero_point, shape_of_zeros, (torch.uint8,), f"({sizes}) = {sized}", scheme, w
    )


def _check_companion(
    name: str,
    given: Tensor | None,
    expected: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    sizes: str,
    scheme: Scheme,
    w: Tensor,
) -> None:
    wanted = f"{expected}, {' or '.join(dict.fromkeys(str(d) for d in dtypes))} for {sizes} in scheme {scheme.text}"
    if given is None:
        raise ValueError(f"{name} is missing: it must be {wanted}")
    require_optional_tensors(**{name: given})
    require_type(given.dtype in dtypes, lambda: f"{name} must be {wanted}, got {given.dtype}")
    require(tuple(given.shape) == expected, lambda: f"{name} must be {wanted}, got {shape(given)}")
    check_device("the weights", w, **{name: given})


def check_output_bias(name: str, bias: Tensor | None, layout: str, w: Tensor, out_dtype: torch.dtype) -> None:
    if bias is None:
        return
    require_type(
        bias.dtype is out_dtype,
        lambda: f"{name} must have the activations' dtype, {out_dtype}, got {bias.dtype}",
    )
    require(
        tuple(bias.shape) == tuple(w.shape[:2]),
        lambda: f"{name} must be {layout} = {shape(w)[:2]}, got {shape(bias)}",
    )
    check_device("the weights", w, **{name: bias})
