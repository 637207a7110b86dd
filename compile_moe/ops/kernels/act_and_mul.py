"""Activation of gate/up columns, one program a block of outputs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.epilogue import epilogue, with_epilogue
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key

BLOCK = 1024


def act_and_mul_kernel(
    out_ptr,  # (R, num_columns), contiguous
    x_ptr,  # (R, N)
    num_columns,
    stride_xr,
    stride_xn,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    x_ptr += row * stride_xr
    if LAYOUT == "ungated":
        gate = tl.load(x_ptr + column * stride_xn, mask=mask, other=0.0).to(tl.float32)
        y = epilogue(gate, gate)
    else:
        if LAYOUT == "interleaved":
            gate_column = column * 2
            up_column = column * 2 + 1
        else:
            gate_column = column
            up_column = column + num_columns
        gate = tl.load(x_ptr + gate_column * stride_xn, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + up_column * stride_xn, mask=mask, other=0.0).to(tl.float32)
        y = epilogue(gate, up)
    tl.store(out_ptr + row * num_columns + column, y.to(out_ptr.dtype.element_ty), mask=mask)


def launch_for(out: Tensor, gate_up: Tensor, epilogue_body: str, layout: str) -> Launch:
    num_rows, num_columns = out.shape
    # The stride of a dimension of size 1 means nothing, but would select another specialization.
    stride_xr = gate_up.stride(0) if num_rows > 1 else gate_up.size(1)
    args = (out, gate_up, num_columns, stride_xr, gate_up.stride(1))
    block = min(BLOCK, triton.next_power_of_2(max(num_columns, 1)))
    options = {"LAYOUT": layout, "BLOCK": block, "num_warps": 4}
    kernel = with_epilogue(act_and_mul_kernel, epilogue_body)
    return Launch(kernel, (num_rows, triton.cdiv(num_columns, block)), args, options)


def act_and_mul(out: Tensor, gate_up: Tensor, epilogue_body: str, layout: str) -> None:
    """Launch into out (R, I), contiguous, from gate_up (R, N)."""
    launch(_plan, out, gate_up, epilogue_body, layout)


def _plan(out: Tensor, gate_up: Tensor, epilogue_body: str, layout: str) -> Plan:
    only = launch_for(out, gate_up, epilogue_body, layout)
    key = ("act_and_mul", epilogue_body, layout, only.args[2:], *map(pointer_key, only.args[:2]))
    return Plan(key, (only,), lambda: (only,))
