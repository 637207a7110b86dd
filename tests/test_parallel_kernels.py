"""What inductor makes of layers over several ranks, on a GPU and a group that are not there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import compile_moe
from compile_moe import (
    FusedMoEModularKernel,
    MoEPrepareAndFinalizeNoEP,
    TensorParallelPrepareAndFinalize,
    TritonExperts,
)
from tests.support.fake_cuda import cuda_empty, generated_kernels

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

E, K, I, TOPK = 64, 2048, 384, 8


@pytest.fixture
def two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def layer_arguments() -> list[Tensor]:
    weights = cuda_empty(E, 2 * I, K), cuda_empty(E, K, I)
    routing = cuda_empty(16, TOPK, dtype=torch.float32), cuda_empty(16, TOPK, dtype=torch.int64)
    return [cuda_empty(16, K), *weights, *routing]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.usefixtures("two_ranks")
def test_tensor_parallel_layer(dynamic: bool) -> None:
    """One kernel before the all-reduce, and one behind it: nothing copies its input or output."""
    kernel = FusedMoEModularKernel(
        TensorParallelPrepareAndFinalize(MoEPrepareAndFinalizeNoEP()), TritonExperts()
    )

    def layer(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, norm: Tensor) -> Tensor:
        return F.rms_norm(x + kernel(x, w1, w2, weights, ids), (K,), norm, 1e-6)

    def make() -> list[Tensor]:
        return [*layer_arguments(), cuda_empty(K)]

    generated = generated_kernels(layer, make, [(0, 0), (3, 0), (4, 0)] if dynamic else [])
    assert generated.op_calls == ["sort_tokens", "gather_gemm", "scatter_gemm", "weight_and_reduce"]
    assert len(generated.triton_kernels) == 1, generated.triton_kernels
    collectives = [call for call in generated.extern_calls if "compile_moe" not in call]
    assert [call.split(".")[3] for call in collectives] == ["all_reduce_", "wait_tensor"], collectives


@pytest.mark.usefixtures("two_ranks")
def test_layer_between_collectives() -> None:
    """Routing that was gathered, a sum that is scattered: finalize has nothing to fuse with."""

    def layer(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        x, weights, ids = (funcol.all_gather_tensor(t, 0, dist.group.WORLD) for t in (x, weights, ids))
        y = compile_moe.fused_experts(x, w1, w2, weights, ids)
        return funcol.reduce_scatter_tensor(y, "sum", 0, dist.group.WORLD)

    generated = generated_kernels(layer, layer_arguments)
    assert "weight_and_reduce" in generated.op_calls and generated.triton_kernels == []


@pytest.mark.usefixtures("two_ranks")
def test_result_that_is_also_all_reduced() -> None:
    """The copy that the all-reduce overwrites is made by the kernel of finalize."""

    def layer(*args: Tensor) -> tuple[Tensor, Tensor]:
        y = compile_moe.fused_experts(*args)
        return y, funcol.all_reduce(y, "sum", dist.group.WORLD)

    generated = generated_kernels(layer, layer_arguments)
    assert "weight_and_reduce" not in generated.op_calls and len(generated.triton_kernels) == 1
