"""Numerics of a whole block, compiled and fused, against float64: at most twice the error of plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from tests.support.block import ACTIVATIONS, FusedBlock, assert_block_as_accurate, make_block

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOPKS = (1, 2, 4, 6, 8, 10, 16)
#: Every activation in every dtype; every topk in every dtype.
PAIRS = [(activation, dtype) for activation in ACTIVATIONS for dtype in DTYPES]
CASES = {f"{a}-{d}-topk{TOPKS[i % 7]}": (i, a, DTYPES[d], TOPKS[i % 7]) for i, (a, d) in enumerate(PAIRS)}


@pytest.mark.parametrize("case", CASES)
def test_block(case: str, device: str) -> None:
    index, activation, dtype, topk = CASES[case]
    if device == "cpu" and index // 3 % 3 != index % 3:
        pytest.skip("one dtype an activation: each takes seconds to compile")
    block = make_block(topk=topk, dtype=dtype, device=device, activation=activation)
    with torch.no_grad():
        compiled = torch.compile(FusedBlock(block), fullgraph=True)
        assert_block_as_accurate(compiled(block.hidden_states), block)
