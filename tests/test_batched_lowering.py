"""What inductor makes of the batched format: finalize fuses with its neighbours, and the kernels of a layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compile_moe import (
    BatchedPrepareAndFinalize,
    BatchedTritonExperts,
    FusedMoEModularKernel,
    FusedMoEQuantConfig,
)
from compile_moe.ops import reduce_batch
from tests.support.fake_cuda import cuda_empty, generated_kernels
from tests.support.quantized import Variant

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

E, ROWS, K, I = 64, 32, 2048, 768


def finalize_block(
    batch: Tensor, weights: Tensor, rows: Tensor, shared: Tensor, residual: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor]:
    h = reduce_batch(batch, weights, rows) + shared + residual
    return h, F.rms_norm(h, norm_weight.shape, norm_weight, 1e-6)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("topk", [1, 2, 8, 10])
def test_finalize_residual_and_norm_are_one_kernel(topk: int, dynamic: bool) -> None:
    def make() -> list[Tensor]:
        routing = cuda_empty(32, topk, dtype=torch.float32), cuda_empty(32, topk, dtype=torch.int32)
        return [cuda_empty(E, ROWS, K), *routing, cuda_empty(32, K), cuda_empty(32, K), cuda_empty(K)]

    dims = [(i, 0) for i in range(1, 5)] if dynamic else []
    generated = generated_kernels(finalize_block, make, dims)
    assert generated.extern_calls == generated.op_calls == []
    assert len(generated.triton_kernels) == 1, generated.triton_kernels


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_kernels_of_a_layer(dynamic: bool) -> None:
    """No buffers, no copies, no filling of rows; the counter costs nothing."""
    parts = BatchedPrepareAndFinalize(ROWS)
    kernel = FusedMoEModularKernel(parts, BatchedTritonExperts(ROWS))

    def layer(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, norm: Tensor) -> Tensor:
        return F.rms_norm(x + kernel(x, w1, w2, weights, ids), (K,), norm, 1e-6)

    def make() -> list[Tensor]:
        weights = cuda_empty(E, 2 * I, K), cuda_empty(E, K, I)
        routing = cuda_empty(16, 8, dtype=torch.float32), cuda_empty(16, 8, dtype=torch.int64)
        return [cuda_empty(16, K), *weights, *routing, cuda_empty(K)]

    generated = generated_kernels(layer, make, [(0, 0), (3, 0), (4, 0)] if dynamic else [])
    assert generated.op_calls == [
        "sort_tokens",
        "batch_tokens",
        "sort_batch",
        "gather_gemm",
        "scatter_gemm",
    ]
    assert len(generated.extern_calls) == 5, generated.extern_calls
    assert len(generated.triton_kernels) == 1, generated.triton_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("apply_weights", [True, False])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_finalize_numerics(strided: bool, apply_weights: bool, dtype: torch.dtype) -> None:
    """Compiled and fused with a neighbour, against the op: NaN in rows that no slot names doesn't get through."""
    batch = torch.randn(4, 6, 48).to(dtype)
    rows = torch.randint(-1, 24, (9, 3), dtype=torch.int32)
    rows[0] = -1
    unnamed = torch.ones(24, dtype=torch.bool)
    unnamed[rows[rows >= 0].long()] = False
    batch[unnamed.view(4, 6)] = torch.nan
    if strided:
        batch = batch.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    weights = torch.rand(9, 3)
    eager = reduce_batch(batch, weights, rows, apply_weights)
    assert torch.isfinite(eager).all() and (eager[0] == 0).all()
    compiled = torch.compile(lambda *given: reduce_batch(*given, apply_weights) * 2)(batch, weights, rows)
    torch.testing.assert_close(compiled, eager * 2)


@pytest.mark.parametrize("scheme", ["fp8_w8a8_block", "int8_w8a8_channel", "int4_w4a16"])
def test_kernels_of_a_quantized_layer(scheme: str) -> None:
    """Tokens are quantized before they are copied, in the kernel of the norm where that can be."""
    made = Variant(scheme).made
    num_rows = 16

    def layer(x: Tensor, norm: Tensor, weights: Tensor, ids: Tensor, *experts: Tensor) -> Tensor:
        w1, w2, w1_scale, w2_scale = experts
        config = FusedMoEQuantConfig(scheme, w1_scale=w1_scale, w2_scale=w2_scale)
        parts = BatchedPrepareAndFinalize(num_rows, quant_config=config)
        kernel = FusedMoEModularKernel(parts, BatchedTritonExperts(num_rows, quant_config=config))
        return x + kernel(F.rms_norm(x, (K,), norm, 1e-6), w1, w2, weights, ids)

    def make() -> list[Tensor]:
        sizes = (E, 2 * I, K), (E, K, I)
        experts = [cuda_empty(*made.weight_shape(*size), dtype=made.weight_dtype) for size in sizes]
        scales = [cuda_empty(*made.scale_shape(*size), dtype=torch.float32) for size in sizes]
        routing = cuda_empty(32, 8, dtype=torch.float32), cuda_empty(32, 8, dtype=torch.int64)
        return [cuda_empty(32, K), cuda_empty(K), *routing, *experts, *scales]

    generated = generated_kernels(layer, make, [(0, 0), (2, 0), (3, 0)])
    quantizes = made.token_scaling is not None
    assert generated.op_calls == [
        "sort_tokens",
        *["batch_tokens"] * (2 if quantizes else 1),
        "sort_batch",
        "quantized_gather_gemm",
        *["quantize_tokens"] * quantizes,
        "quantized_scatter_gemm",
    ]
    most = 3 if scheme == "fp8_w8a8_block" else 2
    assert len(generated.triton_kernels) <= most, generated.triton_kernels
