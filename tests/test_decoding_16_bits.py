"""Every stored byte decoded to 16 bits is what the scheme's ``decode`` says, and so are zero points and scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from compile_moe.ops.kernels.quantized.arithmetic import difference, times
from compile_moe.quantization import SCHEMES

FAST = [name for name in sorted(SCHEMES) if SCHEMES[name].decode_16_bits is not None]


def test_schemes_that_leave_tokens_have_it() -> None:
    assert [name for name in sorted(SCHEMES) if SCHEMES[name].decode is not None] == FAST


@triton.jit
def nibbles_kernel(codes_ptr, fast_ptr, slow_ptr, decode_16_bits: tl.constexpr, decode: tl.constexpr):
    i = tl.arange(0, 256)
    codes = tl.load(codes_ptr + i)
    low, high = decode_16_bits(codes, fast_ptr.dtype.element_ty)
    tl.store(fast_ptr + i, low)
    tl.store(fast_ptr + 256 + i, high)
    tl.store(slow_ptr + i, decode(codes & 15))
    tl.store(slow_ptr + 256 + i, decode(codes >> 4))


@triton.jit
def bytes_kernel(codes_ptr, fast_ptr, slow_ptr, decode_16_bits: tl.constexpr, decode: tl.constexpr):
    i = tl.arange(0, 256)
    codes = tl.load(codes_ptr + i)
    tl.store(fast_ptr + i, decode_16_bits(codes, fast_ptr.dtype.element_ty))
    tl.store(slow_ptr + i, decode(codes))


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, difference_ptr, product_ptr):
    i = tl.arange(0, 1024)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(difference_ptr + i, difference(a, b))
    tl.store(product_ptr + i, times(a, b))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAST)
def test_every_byte(name: str, dtype: torch.dtype) -> None:
    scheme: Any = SCHEMES[name]
    if scheme.powers_of_two and dtype is not torch.bfloat16:
        pytest.skip("bfloat16 only, which has the range of the scales")
    codes = torch.arange(256, device="cuda").to(torch.uint8)
    fast = torch.full((scheme.packed, 256), torch.nan, device="cuda", dtype=dtype)
    slow = torch.full((scheme.packed, 256), torch.nan, device="cuda")
    kernel: Any = nibbles_kernel if scheme.packed == 2 else bytes_kernel
    kernel[(1,)](codes, fast, slow, scheme.decode_16_bits, scheme.decode)
    assert torch.equal(fast.float(), slow)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_rounds_once(dtype: torch.dtype) -> None:
    """As float32 does, denormals, infinities and NaN included."""
    a, b = (
        torch.randn(1024, device="cuda").mul(2.0 ** torch.randint(-8, 8, (1024,), device="cuda"))
        for _ in "ab"
    )
    a, b = a.to(dtype), b.to(dtype)
    smallest = torch.finfo(dtype).smallest_normal
    a[:6] = torch.tensor([0, -0.0, smallest / 4, torch.inf, torch.nan, 3], dtype=dtype)
    b[:6] = torch.tensor([-1, 2, 2, -1, 1, smallest / 4], dtype=dtype)
    found = [torch.empty_like(a) for _ in range(2)]
    kernel: Any = arithmetic_kernel
    kernel[(1,)](a, b, *found)
    for result, expected in zip(found, (a.float() - b.float(), a.float() * b.float()), strict=True):
        torch.testing.assert_close(result, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
