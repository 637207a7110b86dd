"""The kernels of the batched format, interpreted: against their PyTorch, and in bounds whatever they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compile_moe.ops import (
    batch_tokens,
    gather_gemm,
    quantize_tokens,
    quantized_gather_gemm,
    quantized_scatter_gemm,
    reduce_batch,
    scatter_gemm,
    sort_batch,
    sort_tokens,
)
from compile_moe.ops.named_activations import program_text
from compile_moe.ops.sort_batch import sort_batch_torch
from compile_moe.ops.sort_tokens import sort_tokens_torch
from tests.support.batched import kept
from tests.support.launchers import launch
from tests.support.oracle import CASES, Layer, assert_as_accurate, make_layer
from tests.support.quantized import VARIANTS, make_quantized
from tests.support.quantized import assert_as_accurate as assert_quantized_as_accurate

BATCHES: dict[str, tuple[list[int], int]] = {
    "mixed": ([3, 0, 7, 1], 7),
    "empty": ([0, 0, 0], 4),
    "full": ([5, 5, 5], 5),
    "one-row": ([1, 0, 1], 1),
    "out-of-range": ([9, -3, 2**31 - 1, 2], 4),
    "one-expert": ([2], 300),
    "many-rows": ([1100, 0, 1500], 1500),
    "many-experts": ([i % 3 for i in range(70)], 2),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_sort_batch(batch: str, dtype: torch.dtype) -> None:
    counts, max_num_tokens = BATCHES[batch]
    given = torch.tensor([[n, 99] for n in counts], dtype=dtype)[:, 0]
    for result, expected in zip(
        launch(sort_batch, given, max_num_tokens), sort_batch_torch(given, max_num_tokens), strict=True
    ):
        assert torch.equal(result, expected)


def test_counts_beyond_32_bits() -> None:
    slots, offsets = launch(sort_batch, torch.tensor([2**40, -(2**40), 1]), 2)
    assert offsets.tolist() == [0, 2, 2, 3] and slots.tolist() == [0, 1, 4, 2, 3, 5]


@pytest.mark.parametrize("max_num_tokens", [1, 3, 40])
@pytest.mark.parametrize(
    "case",
    [
        {"M": 0},
        {"M": 1, "topk": 1},
        {"M": 23, "K": 37, "topk": 3, "E": 7, "mapped": True, "skipped": True},
        {"M": 20, "routing": "one"},
        {"M": 9, "K": 1030, "strided": True},
        {"M": 9, "E": 1, "topk": 1, "dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_batch_tokens(case: dict[str, Any], max_num_tokens: int) -> None:
    layer = make_layer(I=4, **case)
    ids = layer.topk_ids
    order = sort_tokens_torch(ids, layer.w1.size(0), layer.expert_map)
    arguments = (layer.hidden_states, *order, ids.size(1), max_num_tokens)
    batch, *rest = launch(batch_tokens, *arguments)
    expected, *others = batch_tokens(*arguments)
    for result, other in zip(rest, others, strict=True):
        assert torch.equal(result, other)
    holds_token = torch.arange(max_num_tokens) < others[1].unsqueeze(1)
    assert torch.equal(batch[holds_token], expected[holds_token])
    assert batch[~holds_token].isnan().all(), "a row without a token was written"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_batch_of_quantized_tokens(dtype: torch.dtype) -> None:
    layer = make_layer(M=9)
    arguments = (layer.hidden_states.to(dtype), *sort_tokens_torch(layer.topk_ids, 5), 2, 18)
    batch, _, counts, _ = launch(batch_tokens, *arguments)
    expected = batch_tokens(*arguments)[0]
    holds_token = torch.arange(18) < counts.unsqueeze(1)
    assert torch.equal(batch.view(torch.uint8)[holds_token], expected.view(torch.uint8)[holds_token])


@pytest.mark.parametrize("apply_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [0, 1, 11])
def test_reduce_batch(m: int, dtype: torch.dtype, apply_weights: bool) -> None:
    batch = torch.randn(4, 1030, 6).to(dtype).transpose(1, 2)  # any strides
    rows = torch.randint(-1, 24, (m, 3), dtype=torch.int32)
    unread = torch.ones(24, dtype=torch.bool)
    unread[rows[rows >= 0].long()] = False
    batch[unread.view(4, 6)] = torch.nan
    arguments = (batch, torch.rand(m, 3), rows, apply_weights)
    result = launch(reduce_batch, *arguments)
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result, reduce_batch(*arguments))


def test_rows_that_are_none_count_nothing() -> None:
    rows = torch.tensor([[2**31 - 1, -(2**31)], [6, -1], [0, 5]], dtype=torch.int32)
    batch = torch.ones(2, 3, 4)
    arguments = (batch, torch.ones(3, 2), rows)
    assert launch(reduce_batch, *arguments)[:, 0].tolist() == [0, 0, 2]
    assert reduce_batch(*arguments)[:, 0].tolist() == [0, 0, 2]


@pytest.mark.parametrize("offsets", [[0, 90, 3, -5], [7, 6, 5, 4], [-(2**31), 2**31 - 1, 2, 99]], ids=str)
def test_batch_tokens_stays_in_bounds_whatever_the_sort_says(offsets: list[int]) -> None:
    layer = make_layer(M=4, E=3)
    slots = torch.tensor([0, -7, 99, 2**31 - 1, 3, 4, 5, 7], dtype=torch.int32)
    launch(batch_tokens, layer.hidden_states, slots, torch.tensor(offsets, dtype=torch.int32), 2, 3)


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 0, 0], [4, 4, 4, 4]], ids=str)
def test_the_gemms_neither_read_nor_write_rows_without_tokens(counts: list[int]) -> None:
    """NaN there would show in the results; what the launchers leave unwritten is NaN."""
    layer = make_layer(E=4, biased=True)
    batch = torch.randn(4, 4, 48)
    given = torch.tensor(counts, dtype=torch.int32)
    holds_token = torch.arange(4) < given.unsqueeze(1)
    batch[~holds_token] = torch.nan
    order = launch(sort_batch, given, 4)
    rows = launch(
        gather_gemm, batch.flatten(0, 1), layer.w1, *order, 1, layer.w1_bias, program_text("silu"), False
    )
    assert rows[sum(counts) :].isnan().all()
    out = launch(scatter_gemm, rows, layer.w2, *order, 16, 1, layer.w2_bias, False).view(4, 4, 48)
    assert out[~holds_token].isnan().all()
    gate_up = torch.einsum("eik,enk->ein", batch, layer.w1) + layer.w1_bias[:, None]
    expected = torch.einsum("ein,ekn->eik", layer.function(gate_up), layer.w2) + layer.w2_bias[:, None]
    torch.testing.assert_close(out[holds_token], expected[holds_token], rtol=1e-4, atol=1e-4)


def dispatched(layer: Layer, tokens: torch.Tensor, scale: torch.Tensor | None, rows: int) -> tuple[Any, ...]:
    """As prepare does: the batch flattened, its scales, each slot's row, and the expert order of the rows."""
    ids = layer.topk_ids
    order = launch(sort_tokens, ids, layer.w1.size(0), layer.expert_map)
    batch, batch_rows, counts, dropped = launch(batch_tokens, tokens, *order, ids.size(1), rows)
    if scale is not None and scale.dim() == 2:
        scale = launch(batch_tokens, scale, *order, ids.size(1), rows)[0].flatten(0, 1)
    assert dropped.tolist() == kept(layer, rows).num_dropped
    return batch.flatten(0, 1), scale, batch_rows, launch(sort_batch, counts, rows)


# With room for all tokens, and for two of an expert.
@pytest.mark.parametrize(
    ("case", "rows"),
    [
        *((case, 2) for case in ("M0", "M1", "odd", "skipped-mapped", "all-on-one", "biased")),
        *(("odd", 40), ("all-on-one", 40)),
    ],
)
def test_layer(case: str, rows: int) -> None:
    """Through the launchers, as the ops call them on CUDA; all that they leave unwritten is NaN."""
    layer = make_layer(**CASES[case], dtype=torch.bfloat16)
    batch, _, batch_rows, order = dispatched(layer, layer.hidden_states, None, rows)
    epilogue = program_text(layer.activation)
    between = launch(gather_gemm, batch, layer.w1, *order, 1, layer.w1_bias, epilogue)
    out = launch(scatter_gemm, between, layer.w2, *order, len(batch), 1, layer.w2_bias)
    out = out.view(-1, rows, out.size(-1))
    result = launch(reduce_batch, out, layer.topk_weights, batch_rows)
    assert_as_accurate(result, kept(layer, rows).layer)


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantized_layer(variant: str) -> None:
    rows = 5
    q = make_quantized(VARIANTS[variant], **CASES["odd"] | {"M": 20, "E": 3, "topk": 2})
    layer, scheme = q.layer, q.variant.made
    tokens, scale, scaling = layer.hidden_states, None, scheme.token_scaling
    if scaling is not None:
        tokens, scale = launch(quantize_tokens, tokens, scaling.text)
    batch, scale, batch_rows, order = dispatched(layer, tokens, scale, rows)
    common = (scheme.text, torch.float32)
    epilogue = program_text(layer.activation)
    between = launch(quantized_gather_gemm, batch, scale, *q.q1, *order, 1, *common, None, epilogue)
    scale = None
    if scaling is not None:
        between, scale = launch(quantize_tokens, between, scaling.text, None, None, order[1])
    out = launch(quantized_scatter_gemm, between, scale, *q.q2, *order, len(batch), 1, *common)
    result = launch(reduce_batch, out.view(-1, rows, out.size(-1)), layer.topk_weights, batch_rows)
    q.layer = kept(layer, rows).layer
    assert_quantized_as_accurate(result, q)
