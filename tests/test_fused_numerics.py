"""Numerics of a whole block, compiled and fused, against float64: at most twice the error of plain PyTorch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.block import ACTIVATIONS, Block, FusedBlock, assert_block_as_accurate, make_block
from tests.support.devices import on_each_device

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOPKS = (1, 2, 4, 6, 8, 10, 16)


class Blocks(torch.nn.Module):
    """One block for every topk on the same tokens and weights: one compilation for all."""

    def __init__(self, block: Block, topks: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(FusedBlock(replace(block, topk=topk)) for topk in topks)

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [block(x) for block in self.blocks]


@on_each_device(
    "activation,dtype",
    itertools.product(ACTIVATIONS, DTYPES),
    # Each activation in one dtype, and silu in all.
    on_cpu=dict.fromkeys(
        [*zip(ACTIVATIONS, itertools.cycle(["bf16", "fp32"])), *itertools.product(["silu"], DTYPES)]
    ),
)
def test_every_topk(activation: str, dtype: str, device: str) -> None:
    block = make_block(dtype=DTYPES[dtype], device=device, activation=activation)
    # Compiling for a CPU is slow: there all of them with one activation, which knows nothing of topk, in float32, which
    # sees how often a term is added.
    topks = TOPKS if device == "cuda" or (activation, dtype) == ("silu", "fp32") else (1, 6)
    with torch.no_grad():
        compiled = torch.compile(Blocks(block, topks), fullgraph=True)
        for topk, results in zip(topks, compiled(block.hidden_states), strict=True):
            assert_block_as_accurate(results, replace(block, topk=topk))
