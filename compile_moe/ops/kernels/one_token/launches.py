"""Which blocks the kernels take, and their launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor

from compile_moe.ops.kernels.early_launch import early_launch
from compile_moe.ops.kernels.epilogue import with_epilogue
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key
from compile_moe.ops.kernels.one_token.kernels import down_kernel, rows_kernel
from compile_moe.ops.kernels.tiles import device_limits, is_vectorized

#: Experts a token for which the accumulators of ``down_kernel`` stay in registers.
MOST_EXPERTS = 16
_ELEMENTS = 8192  # of a step: eight loads of 16 bytes a thread
_FEWER_ELEMENTS = 1024  # where they are loaded one by one
_ROWS = 32  # of weights, of a program of ``rows_kernel``
_WARPS = 4
#: Of a thread of ``rows_kernel``, by the steps whose loads are issued together: for four programs and three.
_REGISTERS = {1: 128, 2: 168}


class Blocks(NamedTuple):
    """Rows of weights and depth of a step of a program, and steps whose loads are issued together."""

    rows: int
    block_k: int
    unrolled: int


class Problem(NamedTuple):
    """One of the GEMMs: rows of weights of an expert, experts of the token."""

    num_rows: int
    topk: int
    vectorized: bool
    multiprocessors: int


def row_blocks(problem: Problem) -> Blocks:
    """Of ``rows_kernel``: a thread has 16 bytes of each fourth row."""
    programs = triton.cdiv(problem.num_rows, _ROWS) * problem.topk
    # Three programs fit a multiprocessor, or four that issue the loads of one step at a time: where these are all.
    fourth = 3 * problem.multiprocessors < programs <= 4 * problem.multiprocessors
    elements = _ELEMENTS if problem.vectorized else _FEWER_ELEMENTS
    return Blocks(_ROWS, elements // _ROWS, 1 if fourth else 2)


def down_blocks(problem: Problem) -> Blocks:
    """Of ``down_kernel``: two rows of weights of each expert."""
    rows = 2 * triton.next_power_of_2(problem.topk)
    elements, most = (_ELEMENTS // 4, 128) if problem.vectorized else (_FEWER_ELEMENTS, 32)
    return Blocks(rows, max(elements // rows, min(most, _ELEMENTS // rows), 16), 4)


def _problem(x: Tensor, w: Tensor, topk: int) -> Problem:
    multiprocessors = device_limits(x.device.index).multiprocessors
    return Problem(w.size(1), topk, w.stride(2) == 1 and is_vectorized(x, w), multiprocessors)


def launches_for(
    out: Tensor,
    intermediate: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    epilogue_body: str,
    layout: str,
    apply_weights: bool,
    round_weights: bool,
) -> tuple[Launch, Launch]:
    """The launches in order, into intermediate (topk, I) and out (1, K)."""
    topk = topk_ids.size(1)
    ids = topk_ids, topk_ids if expert_map is None else expert_map
    sizes = topk, w2.size(0) if expert_map is None else expert_map.size(0), w2.size(0)
    has_map = expert_map is not None
    compiler = {"num_warps": _WARPS, **early_launch(out.device)}

    blocks = row_blocks(_problem(hidden_states, w1, topk))
    block_n = blocks.rows if layout == "ungated" else blocks.rows // 2
    num_columns, depth = w2.size(2), w1.size(2)
    args: tuple[Any, ...] = (
        intermediate,
        hidden_states,
        w1,
        w1 if w1_bias is None else w1_bias,
        *ids,
        *sizes,
        num_columns,
        depth,
        hidden_states.stride(1),
        topk_ids.stride(1),
        *w1.stride(),
        *((0, 0) if w1_bias is None else w1_bias.stride()),
    )
    options = {
        "LAYOUT": layout,
        "HAS_BIAS": w1_bias is not None,
        "HAS_MAP": has_map,
        "BLOCK_N": block_n,
        "BLOCK_K": blocks.block_k,
        "UNROLLED": blocks.unrolled,
        "EVEN_N": num_columns % block_n == 0,
        "EVEN_K": depth % blocks.block_k == 0,
        # Which the assembler takes or exceeds by some, as it happens.
        "maxnreg": _REGISTERS[blocks.unrolled],
        **compiler,
    }
    # At least one program: the kernel behind it counts on its having waited.
    grid = (max(1, triton.cdiv(num_columns, block_n)), topk)
    first = Launch(with_epilogue(rows_kernel, epilogue_body), grid, args, options)

    blocks, slots = down_blocks(_problem(intermediate, w2, topk)), triton.next_power_of_2(topk)
    block_n, num_columns, depth = blocks.rows // slots, w2.size(1), w2.size(2)
    args = (
        out,
        intermediate,
        w2,
        w2 if w2_bias is None else w2_bias,
        topk_weights,
        *ids,
        *sizes,
        num_columns,
        depth,
        topk_weights.stride(1),
        topk_ids.stride(1),
        *w2.stride(),
        *((0, 0) if w2_bias is None else w2_bias.stride()),
    )
    options = {
        "APPLY_WEIGHTS": apply_weights,
        "ROUND_WEIGHTS": round_weights,
        "HAS_BIAS": w2_bias is not None,
        "HAS_MAP": has_map,
        "SLOTS": slots,
        "BLOCK_N": block_n,
        "BLOCK_K": blocks.block_k,
        "UNROLLED": blocks.unrolled,
        "EVEN_K": depth % blocks.block_k == 0,
        **compiler,
    }
    return first, Launch(down_kernel, (triton.cdiv(num_columns, block_n),), args, options)


def one_token_experts(out: Tensor, *arguments: Any) -> None:
    """Launch into out (1, K), contiguous; arguments: those of :func:`launches_for` behind ``intermediate``."""
    _, _, w2, _, topk_ids, *_ = arguments
    launch(_plan, out, out.new_empty((topk_ids.size(1), w2.size(2))), *arguments)


def _plan(*arguments: Any) -> Plan:
    """Arguments: those of :func:`launches_for`."""
    launches = launches_for(*arguments)
    *_, epilogue_body, _, _, _ = arguments
    described = (
        pointer_key(argument) if isinstance(argument, Tensor) else argument
        for each in launches
        for argument in (*each.args, *each.options.values())
    )
    return Plan(("one_token_experts", epilogue_body, *described), launches, lambda: launches)
