"""GPTQ checkpoints (AutoGPTQ, GPTQModel).

Stored for a matrix of N rows and K columns, with b bits: qweight (K b / 32, N) int32, words along K; scales
(K / group_size, N); qzeros (K / group_size, N b / 32) int32, words along N; g_idx (K,), the group of each column.
Lowest bits come first. Format "gptq" stores zero points minus one, "gptq_v2" as they are.
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

_SUBTRACTED = {"gptq": 1, "gptq_v2": 0}


def repack_gptq(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None = None,
    g_idx: Tensor | None = None,
    *,
    bits: int = 4,
    checkpoint_format: str = "gptq",
) -> QuantizedWeights:
    """Repack a GPTQ checkpoint's tensors for scheme int4_w4a16 or, with 8 bits, int8_w8a16.

    The group size, which the config needs, is K over the groups of the scales.

    Args:
        qweight: (E, K * bits / 32, N) int32, the experts stacked. scales: (E, K / group_size, N).
        qzeros: (E, K / group_size, N * bits / 32) int32, or None for symmetric weights.
        g_idx: (E, K), or None; columns must be in order.
        checkpoint_format: "gptq" or "gptq_v2", from the checkpoint's quantization config. Some checkpoints say "gptq"
            and are "gptq_v2": symmetric ones then come out with zero points one above the bias, instead of none.

    Returns:
        weight, scale and zero_point (None if all of them are the bias).

    Raises:
        ValueError, TypeError: tensors that don't fit together, or columns in the order of activations (desc_act).
    """
    require_tensors(qweight=qweight, scales=scales)
    require_optional_tensors(qzeros=qzeros, g_idx=g_idx)
    check_bits(bits)
    if checkpoint_format not in _SUBTRACTED:
        raise ValueError(
            f"checkpoint_format must be one of {', '.join(_SUBTRACTED)}, got {checkpoint_format!r}"
        )
    check_stack("qweight", qweight, "(E, K * bits / 32, N)")
    check_stack("scales", scales, "(E, K / group_size, N)")
    q = unpack_words("qweight", qweight, bits, 1).transpose(1, 2)
    num_experts, n, k = q.shape
    groups = scales.size(1)
    check_groups(k, groups, "scales (E, K / group_size, N)")
    check_experts("scales", scales, "(E, K / group_size, N)", (num_experts, groups, n))
    zero_point = None
    if qzeros is not None:
        check_experts(
            "qzeros", qzeros, "(E, K / group_size, N * bits / 32)", (num_experts, groups, n * bits // 32)
        )
        zero_point = unpack_words("qzeros", qzeros, bits, 2).transpose(1, 2)
        zero_point = (zero_point + _SUBTRACTED[checkpoint_format]) & (2**bits - 1)
    check_column_order("g_idx", g_idx, num_experts, k, groups)
    return in_scheme_layout(q, scales.transpose(1, 2), zero_point, bits)
