"""The kernels that run on a GPU, as the profiler sees them: of the layer, and of blocks around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import compile_moe
from tests.support.block import Block, FusedBlock, make_block
from tests.support.oracle import make_layer
from tests.support.profiled import on_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo", "no_grad")]


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


#: Kernels behind the router's, or with it.
GEMMS = "gather_gemm", "scatter_gemm", "weight_and_reduce"
ONE_TOKEN = "route_tokens", "rows_kernel", "down_kernel"


class WithSharedExpert(FusedBlock):
    """The block, and an expert that sees every token."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        alike: dict[str, Any] = {"bias": False, "device": self.w1.device, "dtype": self.w1.dtype}
        self.shared_w1, self.shared_w2 = (
            torch.nn.Linear(w.size(2), w.size(1), **alike) for w in (self.w1, self.w2)
        )

    def experts(self, h: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate, up = self.shared_w1(h).chunk(2, -1)
        return super().experts(h, weights, ids) + self.shared_w2(F.silu(gate) * up)


def without_parts_of_gemms(kernels: list[str]) -> list[str]:
    """What a GEMM of cuBLAS does before and after itself is its own; that of one column is a dot, in two kernels."""
    parts = ("Memcpy", "Memset", "splitKreduce", "reduce_1Block")
    return [k for k in kernels if not any(part in k for part in parts)]


@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared-expert"])
def test_kernels_of_a_decode_block(m: int, shared: bool) -> None:
    """RMSNorm and router GEMM; at most five more; and a shared expert's two GEMMs with an activation between."""
    block = make_block(m, 1024, 768, 128, 8, dtype=torch.bfloat16, device="cuda")
    module = WithSharedExpert(block) if shared else FusedBlock(block)
    compiled = torch.compile(module, fullgraph=True)
    for _ in range(2):
        compiled(block.hidden_states)
    kernels = without_parts_of_gemms(on_gpu(lambda: compiled(block.hidden_states)))
    assert len(kernels) <= 2 + 5 + 3 * shared, kernels
    assert sum(name.startswith("triton_") for name in kernels) == 2 + shared, kernels
    for kernel in ONE_TOKEN if m == 1 else GEMMS:
        assert sum(kernel in name for name in kernels) == 1, (kernel, kernels)


#: Blocks as transformers has them, and the kernels besides the norm and the router's GEMM: ours, and what a shared
#: expert adds (four GEMMs, of which one is for its own weight, and its activation).
TRANSFORMERS = {"qwen3-30b-a3b": 4, "gpt-oss-20b": 4, "mixtral-8x7b": 4, "qwen3-30b-a3b-shared": 4 + 5}
#: Ours for one token, where its weights are few enough and rows lie in one piece, and how many of each.
ONE_TOKEN_OF = {
    "qwen3-30b-a3b": dict.fromkeys(ONE_TOKEN, 1),
    "qwen3-30b-a3b-shared": dict.fromkeys(ONE_TOKEN, 1),
}


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("model", TRANSFORMERS)
def test_kernels_of_a_block_of_transformers(model: str, m: int) -> None:
    pytest.importorskip("transformers")
    from compile_moe.cli import moe_layer

    config = moe_layer.configuration(model)
    layer = moe_layer.make_layer(config, "compile_moe", torch.device("cuda"), torch.bfloat16)
    x = torch.randn(m, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    for _ in range(2):
        compiled(x)
    kernels = without_parts_of_gemms(on_gpu(lambda: compiled(x)))
    stages = dict.fromkeys(("route_and_sort", *GEMMS), 1)
    ours = ONE_TOKEN_OF.get(model, stages) if m == 1 else stages
    assert len(kernels) <= 2 + TRANSFORMERS[model], kernels
    for kernel, number in ours.items():
        assert sum(kernel in name for name in kernels) == number, (kernel, kernels)


def test_the_layer_copies_and_fills_nothing() -> None:
    layer = make_layer(M=16, K=128, I=64, E=8, dtype=torch.bfloat16, device="cuda")
    compiled = torch.compile(compile_moe.fused_experts, fullgraph=True)
    for _ in range(2):
        compiled(*layer.args)
    names = on_gpu(lambda: compiled(*layer.args))
    expected = ("sort", "gather_gemm", "scatter_gemm", "weight_and_reduce")
    assert len(names) == 4 and all(e in name for e, name in zip(expected, names, strict=True)), names
