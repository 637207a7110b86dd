"""Small unsigned integers in int32 words, as checkpoints pack them, and out of them into the schemes' layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.quantization import QuantizedWeights
from compile_moe.quantization.nibbles import pack_nibbles


def unpack_words(name: str, words: Tensor, bits: int, dim: int) -> Tensor:
    """Unpack int32 words along ``dim``, lowest bits first, into uint8."""
    if words.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, got {words.dtype}")
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    dim %= words.dim()
    spread = shifts.view(-1, *[1] * (words.dim() - dim - 1))
    return ((words.unsqueeze(dim + 1) >> spread) & (2**bits - 1)).to(torch.uint8).flatten(dim, dim + 1)


def check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 (for scheme int4_w4a16) or 8 (int8_w8a16), got {bits}")


def check_experts(name: str, t: Tensor, layout: str, expected: tuple[int, ...]) -> None:
    """Check a tensor of the checkpoint, of all experts, against the shape that the others ask for."""
    if tuple(t.shape) != expected:
        raise ValueError(f"{name} must be {layout} = {expected}, got {tuple(t.shape)}")


def check_stack(name: str, t: Tensor, layout: str) -> None:
    if t.dim() != 3:
        raise ValueError(f"{name} must be {layout}, the experts stacked, got {tuple(t.shape)}")


def check_groups(num_columns: int, num_groups: int, scales: str) -> None:
    if num_groups == 0 or num_columns % num_groups:
        raise ValueError(
            f"{scales} must have a number of groups that divides K = {num_columns}, got {num_groups}"
        )


def check_column_order(name: str, g_idx: Tensor | None, num_experts: int, k: int, num_groups: int) -> None:
    """Check that the groups of columns are in order, which all schemes take for granted."""
    if g_idx is None:
        return
    check_experts(name, g_idx, "(E, K)", (num_experts, k))
    in_order = torch.arange(k, device=g_idx.device) // (k // num_groups)
    if not bool((g_idx == in_order).all()):
        raise ValueError(
            f"{name} must be in order, k // group_size: this checkpoint has its columns in the order of activations "
            "(desc_act, actorder), which no scheme holds; quantize without it, or dequantize the checkpoint"
        )


def in_scheme_layout(q: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> QuantizedWeights:
    """From unsigned integers (E, N, K), scales and zero points (E, N, groups).

    Zero points that are all the bias say nothing, and are left out.
    """
    if zero_point is not None and bool((zero_point == 2 ** (bits - 1)).all()):
        zero_point = None
    if bits == 8:
        return QuantizedWeights(
            q.contiguous(), scale.contiguous(), zero_point if zero_point is None else zero_point.contiguous()
        )
    if zero_point is not None:
        if zero_point.size(1) % 2:
            raise ValueError(f"zero points of int4_w4a16 need an even N, got {zero_point.size(1)}")
        zero_point = pack_nibbles(zero_point, 1)
    return QuantizedWeights(pack_nibbles(q), scale.contiguous(), zero_point)
