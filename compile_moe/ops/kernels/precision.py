"""Precision of float32 dot products; 16-bit operands have exact products, and are summed by the tensor cores."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

Precision = Literal["16-bit", "ieee", "tf32"]


def dot_precision(dtype: torch.dtype) -> Precision:
    """How :func:`accumulate` multiplies: TF32 for float32 only where torch's own CUDA GEMMs may use it."""
    if dtype is not torch.float32:
        return "16-bit"
    # Not allow_tf32, which raises once the user has set this one; this one follows that.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def accumulate(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``, all in float32."""
    if PRECISION == "ieee":
        # Each product sums from zero: one long chain of additions, as tl.dot(a, b, acc) makes it, loses more digits.
        # An fma, because Triton turns an addition back into that chain.
        return tl.fma(tl.dot(a, b, input_precision="ieee"), tl.full(acc.shape, 1.0, tl.float32), acc)
    elif PRECISION == "tf32":
        # The tensor cores cut the operands off; cuBLAS rounds them first.
        return tl.dot(_round_to_tf32(a), _round_to_tf32(b), acc, input_precision="tf32")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _round_to_tf32(x):
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )
