"""AWQ checkpoints (AutoAWQ, version "gemm", 4 bits).

Stored for a matrix of N rows and K columns: qweight (K, N / 8) int32, words along N; scales (K / group_size, N);
qzeros (K / group_size, N / 8) int32. A word's nibbles, lowest first, are of rows 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
"""

from __future__ import annotations

from torch import Tensor

from compile_moe.checkpoints.words import (
    check_experts,
    check_groups,
    check_stack,
    in_scheme_layout,
    unpack_words,
)
from compile_moe.ops.problem_size import require_tensors
from compile_moe.quantization import QuantizedWeights

#: Where each of a word's eight rows lies in it.
_NIBBLE_OF_ROW = [0, 4, 1, 5, 2, 6, 3, 7]


def repack_awq(qweight: Tensor, scales: Tensor, qzeros: Tensor) -> QuantizedWeights:
    """Repack an AWQ checkpoint's tensors for scheme int4_w4a16.

    The group size, which the config needs, is K over the groups of the scales.

    Args:
        qweight: (E, K, N / 8) int32, the experts stacked. scales: (E, K / group_size, N).
        qzeros: (E, K / group_size, N / 8) int32.

    Returns:
        weight, scale and zero_point (None if all of them are the bias).

    Raises:
        ValueError, TypeError: tensors that don't fit together.
    """
    require_tensors(qweight=qweight, scales=scales, qzeros=qzeros)
    check_stack("qweight", qweight, "(E, K, N / 8)")
    check_stack("scales", scales, "(E, K / group_size, N)")
    num_experts, k, num_words = qweight.shape
    groups = scales.size(1)
    check_groups(k, groups, "scales (E, K / group_size, N)")
    check_experts("scales", scales, "(E, K / group_size, N)", (num_experts, groups, 8 * num_words))
    check_experts("qzeros", qzeros, "(E, K / group_size, N / 8)", (num_experts, groups, num_words))
    q, zero_point = (_unpack(name, t) for name, t in (("qweight", qweight), ("qzeros", qzeros)))
    return in_scheme_layout(q, scales.transpose(1, 2), zero_point, 4)


def _unpack(name: str, words: Tensor) -> Tensor:
    """(E, N, rows) from words (E, rows, N / 8)."""
    nibbles = unpack_words(name, words, 4, 2).unflatten(2, (-1, 8))
    return nibbles[..., _NIBBLE_OF_ROW].flatten(2).transpose(1, 2)
