"""Weights into a scheme's layout and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compile_moe.ops.problem_size import require_optional_tensors, require_tensors
from compile_moe.ops.quantized_operands import check_quantized_weight
from compile_moe.quant_config import find_scheme
from compile_moe.quantization import QuantizedWeights, Scheme

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def quantize_weights(
    w: Tensor,
    scheme: str,
    *,
    block_shape: Sequence[int] | None = None,
    group_size: int | None = None,
    zero_points: bool = False,
) -> QuantizedWeights:
    """Quantize a stack of expert matrices, rounding to nearest.

    Each file in ``compile_moe/quantization/schemes`` has its formula, which is computed in float32. What shares its
    scale with an infinity or a NaN dequantizes to NaN; a scale is never zero.

    Args:
        w: (E, N, K), floating point, any strides: w1 or w2. Whatever device it is on.
        scheme, block_shape, group_size: as for :class:`compile_moe.FusedMoEQuantConfig`.
        zero_points: asymmetric groups, for int4_w4a16 and for int8_w8a16 with a group_size.

    Returns:
        weight, scale and zero_point (or None). Scales of weight-only integer schemes have w's dtype (float32 for
        float64), those of the others float32, or uint8 exponents.

    Raises:
        ValueError, TypeError: no such scheme, or sizes that don't divide; the message says what is accepted.

    Example:
        >>> import compile_moe, torch
        >>> w1, w2 = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
        >>> q1, q2 = (compile_moe.quantize_weights(w, "int4_w4a16", group_size=16) for w in (w1, w2))
        >>> config = compile_moe.FusedMoEQuantConfig(
        ...     "int4_w4a16", group_size=16, w1_scale=q1.scale, w2_scale=q2.scale
        ... )
        >>> topk_weights, topk_ids = torch.rand(5, 4).topk(2)
        >>> x = torch.randn(5, 32)
        >>> compile_moe.fused_experts(x, q1.weight, q2.weight, topk_weights, topk_ids, quant_config=config).shape
        torch.Size([5, 32])
    """
    require_tensors(w=w)
    found = find_scheme(scheme, block_shape, group_size)
    check_quantizable("w", w, found, zero_points)
    scale_dtype = torch.float32 if w.dtype is torch.float64 else w.dtype
    # One expert at a time: float32 copies of all of them can be more than there is memory.
    experts = [found.quantize(matrix.float(), zero_points, scale_dtype) for matrix in w]
    stacked = (None if parts[0] is None else torch.stack(parts) for parts in zip(*experts, strict=True))
    return QuantizedWeights(*stacked)  # type: ignore[arg-type]


def check_quantizable(name: str, w: Tensor, scheme: Scheme, zero_points: bool = False) -> None:
    """Check that a scheme has weights of w's dtype and sizes; :func:`quantize_weights` and the integrations do."""
    if w.dtype not in _FLOATS:
        raise TypeError(f"{name} must be one of {', '.join(map(str, _FLOATS))}, got {w.dtype}")
    if w.dim() != 3 or 0 in w.shape:
        raise ValueError(f"{name} must be (E, N, K), none of them 0, got {tuple(w.shape)}")
    num_experts, n, k = w.shape
    if k % scheme.column_multiple:
        raise ValueError(
            f"scheme {scheme.text} needs a K that is a multiple of {scheme.column_multiple}, got {name} (E, N, K) = "
            f"{tuple(w.shape)}{scheme.other_columns}"
        )
    if zero_points and scheme.zero_point_shape(num_experts, n, k) is None:
        raise ValueError(f"scheme {scheme.text} has no zero points: zero_points must be False")
    if zero_points and n % scheme.packed_zero_points:
        raise ValueError(
            f"zero points of scheme {scheme.text} need an N that is a multiple of {scheme.packed_zero_points}, got "
            f"{name} (E, N, K) = {tuple(w.shape)}"
        )


def dequantize_weights(
    weight: Tensor,
    scheme: str,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    block_shape: Sequence[int] | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The weights that quantized ones stand for, for layers without a quant_config.

    Args:
        weight, scale, zero_point: in the scheme's layout, as from :func:`quantize_weights`.
        scheme, block_shape, group_size: as for :class:`compile_moe.FusedMoEQuantConfig`.
        dtype: bfloat16, float16, float32 or float64. Computed in float32 or float64 and rounded once.

    Returns:
        (E, N, K) in ``dtype``.

    Raises:
        ValueError, TypeError: operands that are not in the scheme's layout; the message says what is.
    """
    require_tensors(weight=weight, scale=scale)
    require_optional_tensors(zero_point=zero_point)
    found = find_scheme(scheme, block_shape, group_size)
    if dtype not in _FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, _FLOATS))}, got {dtype}")
    if weight.dim() != 3:
        raise ValueError(
            f"weight must be (E, N, K) in the layout of scheme {found.text}, got {tuple(weight.shape)}"
        )
    k = weight.size(2) * found.packed
    scales_of = scale.dtype if scale.dtype in _FLOATS else dtype
    check_quantized_weight("weight", "E, N, K", weight, scale, zero_point, k, found, scales_of)
    compute_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    out = weight.new_empty((weight.size(0), weight.size(1), k), dtype=dtype)
    for e in range(weight.size(0)):
        zeros = None if zero_point is None else zero_point[e]
        out[e] = found.dequantize(weight[e], scale[e], zeros, compute_dtype)
    return out
