"""compressed-tensors checkpoints (llm-compressor), format "pack-quantized".

Stored for a matrix of N rows and K columns, with b bits: weight_packed (N, K b / 32) int32, words along K;
weight_scale (N, groups), one group where scales are per channel; weight_zero_point (ceil(N b / 32), groups) int32,
words along N, or none. Lowest bits come first; integers and zero points carry a bias of 2^(b-1).

Formats "float-quantized" and "int-quantized" store what schemes fp8_w8a8_* and int8_w8a8_channel do: their weights
and scales need no repacking, but for a scale (E, 1) per tensor, which is (E,) here.
"""

from __future__ import annotations

from torch import Tensor

from compile_moe.checkpoints.words import (
    check_bits,
    check_column_order,
    check_experts,
    check_groups,
    check_stack,
    in_scheme_layout,
    unpack_words,
)
from compile_moe.ops.problem_size import require_optional_tensors, require_tensors
from compile_moe.quantization import QuantizedWeights


def repack_compressed_tensors(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    *,
    bits: int = 4,
) -> QuantizedWeights:
    """Repack a compressed-tensors checkpoint's tensors for scheme int4_w4a16 or, with 8 bits, int8_w8a16.

    The group size, which the config needs, is K over the groups of the scales. Scales per channel, which are one group
    a row, are those of int8_w8a16 without a group size as ``scale.squeeze(-1)``; int4_w4a16 has none.

    Args:
        weight_packed: (E, N, K * bits / 32) int32, the experts stacked. weight_scale: (E, N, groups).
        weight_zero_point: (E, ceil(N * bits / 32), groups) int32, or None for symmetric weights.
        weight_g_idx: (E, K), or None; columns must be in order.

    Returns:
        weight, scale and zero_point (None if all of them are the bias).

    Raises:
        ValueError, TypeError: tensors that don't fit together, or columns in the order of activations (actorder).
    """
    require_tensors(weight_packed=weight_packed, weight_scale=weight_scale)
    require_optional_tensors(weight_zero_point=weight_zero_point, weight_g_idx=weight_g_idx)
    check_bits(bits)
    check_stack("weight_packed", weight_packed, "(E, N, K * bits / 32)")
    check_stack("weight_scale", weight_scale, "(E, N, groups)")
    q = unpack_words("weight_packed", weight_packed, bits, 2)
    num_experts, n, k = q.shape
    groups = weight_scale.size(2)
    check_groups(k, groups, "weight_scale (E, N, groups)")
    check_experts("weight_scale", weight_scale, "(E, N, groups)", (num_experts, n, groups))
    zero_point = None
    if weight_zero_point is not None:
        expected = (num_experts, -(-n * bits // 32), groups)
        check_experts("weight_zero_point", weight_zero_point, "(E, ceil(N * bits / 32), groups)", expected)
        zero_point = unpack_words("weight_zero_point", weight_zero_point, bits, 1)[:, :n]
    check_column_order("weight_g_idx", weight_g_idx, num_experts, k, groups)
    return in_scheme_layout(q, weight_scale, zero_point, bits)
