"""The ahead-of-time compiler reports resources of every architecture that the kernels claim."""

import pytest
import torch
import triton
import triton.language as tl

from tests.support.aot import CAPABILITIES, compile_ahead


@triton.jit(do_not_specialize=["m"])
def _matmul(
    a_ptr, b_ptr, c_ptr, m, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, k, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * k + (first + inner)[None, :], mask=(rows < m)[:, None], other=0.0)
        b = tl.load(b_ptr + columns[None, :] * k + (first + inner)[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(
        c_ptr + rows[:, None] * n + columns[None, :], acc.to(c_ptr.dtype.element_ty), mask=(rows < m)[:, None]
    )


def _compile(capability, block, num_warps=8, m: int | str = "i32", **options):
    a, b, c = (torch.empty(0, dtype=torch.bfloat16, device="meta") for _ in range(3))
    blocks = {"BLOCK_M": block, "BLOCK_N": block, "BLOCK_K": 64}
    return compile_ahead(
        _matmul, (a, b, c, m, 4096, 2048), blocks, capability=capability, num_warps=num_warps, **options
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_matmul_fits_every_architecture(capability):
    kernel = _compile(capability, 64)
    assert 16 <= kernel.registers <= 255
    assert kernel.spill_stores == kernel.spill_loads == 0
    assert kernel.fits
    assert kernel.has_wgmma == (capability == 90)
    assert kernel.has_tcgen05 == (capability == 100)


def test_shared_memory_over_budget_is_seen():
    kernel = _compile(120, 128, num_stages=5)
    assert kernel.shared > 99 * 1024
    assert not kernel.fits


def test_spills_are_seen():
    kernel = _compile(80, 128, num_warps=2)
    assert kernel.spill_stores > 0
    assert kernel.stack > 0


def test_unspecialized_argument_takes_any_value():
    assert _compile(80, 64, m=1).ptx == _compile(80, 64, m=48).ptx == _compile(80, 64, m="i32").ptx


def test_missing_constant_is_named():
    with pytest.raises(TypeError, match="BLOCK_M"):
        compile_ahead(_matmul, ("*bf16", "*bf16", "*bf16", "i32", "i32", "i32"), {}, capability=80)
