"""Checkpoints of other tools, written here number by number from their formats, repacked without loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import compile_moe

E, N, K, G = 2, 16, 64, 32


def word(values: list[int], bits: int) -> int:
    """int32 of unsigned integers, lowest bits first."""
    number = sum(v << bits * i for i, v in enumerate(values))
    return number - 2**32 if number >= 2**31 else number


def packed(values: Tensor, bits: int, dim: int, order: list[int] | None = None) -> Tensor:
    """int32 words along ``dim`` of (E, rows, columns)."""
    per_word = 32 // bits
    moved = values.movedim(dim, -1).reshape(-1, per_word)
    order = order or list(range(per_word))
    words = [word([int(row[i]) for i in order], bits) for row in moved]
    shape = [*values.movedim(dim, -1).shape[:-1], -1]
    return torch.tensor(words, dtype=torch.int32).reshape(shape).movedim(-1, dim).contiguous()


def numbers(bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers (E, N, K), scales and zero points (E, N, K / G)."""
    q = torch.randint(0, 2**bits, (E, N, K))
    scale = torch.rand(E, N, K // G).half() + 0.5
    return q, scale, torch.randint(0, 2**bits, (E, N, K // G))


def expected(q: Tensor, scale: Tensor, zero: Tensor | int) -> Tensor:
    zeros = zero if isinstance(zero, int) else zero.repeat_interleave(G, 2)
    return (q - zeros).double() * scale.double().repeat_interleave(G, 2)


def dequantized(result: Any, bits: int) -> Tensor:
    scheme = "int4_w4a16" if bits == 4 else "int8_w8a16"
    return compile_moe.dequantize_weights(
        result.weight, scheme, *result[1:], group_size=G, dtype=torch.float64
    )


IN_ORDER = (torch.arange(K) // G).expand(E, K)
FORMATS = {"gptq": 1, "gptq_v2": 0}


@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(bits: int, checkpoint_format: str) -> None:
    q, scale, zero = numbers(bits)
    # A zero point of 0 wraps around where 1 is subtracted.
    zero[0, 0, 0] = 0
    stored = (zero - FORMATS[checkpoint_format]) % 2**bits
    result = compile_moe.repack_gptq(
        packed(q.transpose(1, 2), bits, 1),
        scale.transpose(1, 2).contiguous(),
        packed(stored.transpose(1, 2), bits, 2),
        IN_ORDER,
        bits=bits,
        checkpoint_format=checkpoint_format,
    )
    assert torch.equal(dequantized(result, bits), expected(q, scale, zero))


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_gptq_has_no_zero_points(bits: int) -> None:
    q, scale, _ = numbers(bits)
    bias = 2 ** (bits - 1)
    args = packed(q.transpose(1, 2), bits, 1), scale.transpose(1, 2).contiguous()
    zeros = packed(torch.full((E, K // G, N), bias - 1), bits, 2)
    for result in (
        compile_moe.repack_gptq(*args, zeros, bits=bits),
        compile_moe.repack_gptq(*args, bits=bits),
    ):
        assert result.zero_point is None
        assert torch.equal(dequantized(result, bits), expected(q, scale, bias))


def test_awq() -> None:
    q, scale, zero = numbers(4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    result = compile_moe.repack_awq(
        packed(q.transpose(1, 2), 4, 2, order),
        scale.transpose(1, 2).contiguous(),
        packed(zero.transpose(1, 2), 4, 2, order),
    )
    assert torch.equal(dequantized(result, 4), expected(q, scale, zero))


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors(bits: int, zero_points: bool) -> None:
    q, scale, zero = numbers(bits)
    stored = packed(zero, bits, 1) if zero_points else None
    result = compile_moe.repack_compressed_tensors(packed(q, bits, 2), scale, stored, IN_ORDER, bits=bits)
    bias = 2 ** (bits - 1)
    assert torch.equal(dequantized(result, bits), expected(q, scale, zero if zero_points else bias))


def test_compressed_tensors_pads_its_words_of_zero_points() -> None:
    q, scale, zero = (t[:, :14] for t in numbers(4))
    words = packed(torch.nn.functional.pad(zero, (0, 0, 0, 2)), 4, 1)
    result = compile_moe.repack_compressed_tensors(packed(q, 4, 2), scale, words)
    assert torch.equal(dequantized(result, 4), expected(q, scale, zero))


def test_compressed_tensors_per_channel() -> None:
    q, scale, _ = numbers(8)
    result = compile_moe.repack_compressed_tensors(packed(q, 8, 2), scale[..., :1], bits=8)
    back = compile_moe.dequantize_weights(
        result.weight, "int8_w8a16", result.scale.squeeze(-1), dtype=torch.float64
    )
    assert torch.equal(back, (q - 128).double() * scale[..., :1].double())


def test_gate_and_up_of_a_checkpoint_run_in_a_layer() -> None:
    """Projections are repacked one by one and concatenated: in every layout, rows come first."""
    parts = [numbers(4) for _ in range(2)]
    repacked = [
        compile_moe.repack_compressed_tensors(packed(q, 4, 2), s, packed(z, 4, 1)) for q, s, z in parts
    ]
    w1, w1_scale, w1_zp = (torch.cat(pair, 1) for pair in zip(*repacked, strict=True))
    down = compile_moe.quantize_weights(
        torch.randn(E, K, N * 2).half(), "int4_w4a16", group_size=G, zero_points=True
    )
    config = compile_moe.FusedMoEQuantConfig(
        "int4_w4a16", group_size=G, w1_scale=w1_scale, w1_zp=w1_zp, w2_scale=down.scale, w2_zp=down.zero_point
    )
    # I = 32: as many rows of gate and of up.
    w1, w1_scale, w1_zp = (torch.cat([t, t], 1) for t in (w1, w1_scale, w1_zp))
    config = compile_moe.FusedMoEQuantConfig(
        "int4_w4a16", group_size=G, w1_scale=w1_scale, w1_zp=w1_zp, w2_scale=down.scale, w2_zp=down.zero_point
    )
    x, weights, ids = torch.randn(3, K).half() / 64, torch.rand(3, 2), torch.randint(0, E, (3, 2))
    result = compile_moe.fused_experts(x, w1, down.weight, weights, ids, quant_config=config)
    full = [
        compile_moe.dequantize_weights(*a, group_size=G, dtype=torch.float16)
        for a in ((w1, "int4_w4a16", w1_scale, w1_zp), (down.weight, "int4_w4a16", *down[1:]))
    ]
    torch.testing.assert_close(
        result, compile_moe.fused_experts(x, *full, weights, ids), rtol=2e-2, atol=2e-2
    )


def gptq(**changes: Any) -> Any:
    q, scale, zero = numbers(4)
    arguments: dict[str, Any] = {
        "qweight": packed(q.transpose(1, 2), 4, 1),
        "scales": scale.transpose(1, 2).contiguous(),
        "qzeros": packed(zero.transpose(1, 2), 4, 2),
        "g_idx": IN_ORDER,
    }
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return compile_moe.repack_gptq(**arguments)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"bits": 3}, ValueError, r"bits must be 4 .* or 8 .*got 3"),
        ({"checkpoint_format": "v3"}, ValueError, r"one of gptq, gptq_v2, got 'v3'"),
        ({"qweight": lambda t: t.float()}, TypeError, r"qweight must be int32, got torch.float32"),
        (
            {"qweight": lambda t: t[0]},
            ValueError,
            r"qweight must be \(E, K \* bits / 32, N\), .*got \(8, 16\)",
        ),
        ({"scales": lambda t: t[:, :, :8]}, ValueError, r"scales must be .* = \(2, 2, 16\), got \(2, 2, 8\)"),
        ({"scales": lambda t: t.repeat(1, 3, 1)[:, :3]}, ValueError, r"divides K = 64, got 3"),
        ({"qzeros": lambda t: t[:, :1]}, ValueError, r"qzeros must be .* = \(2, 2, 2\), got \(2, 1, 2\)"),
        ({"g_idx": lambda t: t.flip(1)}, ValueError, r"g_idx must be in order.*desc_act.*dequantize"),
        ({"g_idx": lambda t: t[0]}, ValueError, r"g_idx must be \(E, K\) = \(2, 64\), got \(64,\)"),
        ({"qzeros": 3}, TypeError, r"qzeros must be a tensor or None, got int"),
    ],
)
def test_wrong_checkpoint(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        gptq(**changes)


def test_wrong_awq_and_compressed_tensors() -> None:
    q, scale, _ = numbers(4)
    words = packed(q, 4, 2)
    with pytest.raises(
        ValueError, match=r"qzeros must be \(E, K / group_size, N / 8\) = \(2, 2, 2\), got \(2, 16, 8\)"
    ):
        compile_moe.repack_awq(packed(q.transpose(1, 2), 4, 2), scale.transpose(1, 2), words)
    with pytest.raises(
        ValueError, match=r"weight_scale must be \(E, N, groups\) = \(2, 16, 2\), got \(2, 8, 2\)"
    ):
        compile_moe.repack_compressed_tensors(words, scale[:, :8])
    with pytest.raises(ValueError, match=r"weight_g_idx must be in order.*actorder"):
        compile_moe.repack_compressed_tensors(words, scale, None, IN_ORDER.flip(1))
