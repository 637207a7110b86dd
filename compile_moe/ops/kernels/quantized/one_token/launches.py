"""Where these kernels serve, with how many segments, and their launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon._runtime import jit

from compile_moe.ops.kernels.early_launch import early_launch
from compile_moe.ops.kernels.epilogue import build_epilogue, with_globals
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key
from compile_moe.ops.kernels.quantized.one_token.kernels import down_kernel, up_kernel
from compile_moe.ops.kernels.quantized.one_token.layouts import ROWS_OF_WARP, STEP_BYTES
from compile_moe.ops.kernels.quantized.one_token.multiply import multiply, multiply_eights
from compile_moe.ops.kernels.quantized.operands import decodes_rows, group_strides
from compile_moe.ops.kernels.quantized.weight_format import WeightFormat, decode, decode_scale_16_bits
from compile_moe.ops.kernels.tiles import row_stride

MOST_EXPERTS = 16
WORD = 4  # bytes that are loaded together at least
_SMALLEST_GROUP = 32
_WARPS = 2  # of up_kernel, each with a part of the depth
_MOST_SEGMENTS = 16
_SEGMENT_BYTES = 192  # of a row, at least
#: Of a thread: those of eight programs of two warps. With 96, one token of the Qwen3-30B shape took 16.8 us instead of
#: 15.8 in int8, Mixtral 71.2 instead of 66.6 in int4 (H200, one run).
_REGISTERS = 128


def serve(weight_format: WeightFormat, x: Tensor, w: Tensor, w_scale: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether x (rows, depth) and weights (E, rows of weights, ...) can be multiplied by them: decoded to the tokens'
    dtype, or both to float16 where tokens are quantized; in whole tiles, with rows in pieces of 16 bytes, each of which
    has one scale, or steps where tokens are quantized. Reads shapes, strides and dtypes only; weights must start at a
    multiple of 4 bytes, and are read faster from one of 16.
    """
    group = weight_format.group
    if weight_format.decode_registers is None:
        return False
    if weight_format.scales_sums:
        # Groups are a step's columns.
        if out_dtype.itemsize != 2 or x.dtype is not w.dtype or group not in (0, STEP_BYTES.value):
            return False
    elif not decodes_rows(weight_format, x, w, w_scale) or group % _SMALLEST_GROUP or group & (group - 1):
        return False
    sizes = (*w.stride()[:2], w.size(1), w.size(2), row_stride(x))
    return x.stride(1) == 1 == w.stride(2) and not any(size % 16 for size in sizes) and w.numel() > 0


def parts_of_slots(topk: int, row_bytes: int) -> int:
    """Parts of the depth of each slot in ``down_kernel``."""
    slots = triton.next_power_of_2(topk)
    most = max(8 // slots, 2 if 2 * slots <= _MOST_SEGMENTS else 1)
    parts = 2 if slots == 1 else 1  # a warp has two segments
    while 2 * parts <= most and row_bytes >= 2 * parts * _SEGMENT_BYTES:
        parts *= 2
    return parts


def launches_for(
    out: Tensor,
    intermediate: Tensor,
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    w1: Tensor,
    w1_scale: Tensor,
    w1_zp: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor,
    w2_zp: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    weight_format: WeightFormat,
    tokens: str,
    largest: float,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    epilogue_body: str,
    layout: str,
    apply_weights: bool,
    round_weights: bool,
) -> tuple[Launch, Launch]:
    """Both launches.

    Args:
        out: (1, K). intermediate: (topk, I).
        tokens: "16 bits", or how those that are quantized share scales: per "token", "tensor" or "group".
        largest: magnitude of quantized ones.
    """
    topk = topk_ids.size(1)
    routing = topk_ids, topk_ids if expert_map is None else expert_map
    sizes = topk, w2.size(0) if expert_map is None else expert_map.size(0), w2.size(0)
    compiler = early_launch(out.device)

    def weights(w: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        return w, scale, w if zero is None else zero, w if bias is None else bias

    def strides(w: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
        of_bias = (0, 0) if bias is None else bias.stride()
        return *w.stride()[:2], *group_strides(scale, zero), *of_bias

    def constants(zero: Tensor | None, bias: Tensor | None) -> dict[str, Any]:
        return {
            "LARGEST": largest,
            "SCALE_ROWS": weight_format.rows,
            "HAS_BIAS": bias is not None,
            "HAS_MAP": expert_map is not None,
            "HAS_ZERO": zero is not None,
            "PACKED": weight_format.packed,
            "PACKED_ZEROS": weight_format.packed_zeros,
            "GROUP": weight_format.group,
        }

    first = w1, w1_scale, w1_zp, w1_bias
    up = Launch(
        with_format(up_kernel, weight_format, epilogue_body),
        (w1.size(1) // ROWS_OF_WARP.value, topk),
        (
            intermediate,
            hidden_states,
            hidden_states if hidden_states_scale is None else hidden_states_scale,
            *weights(*first),
            *routing,
            *sizes,
            intermediate.size(1),
            hidden_states.size(1),
            _group_stride(hidden_states_scale),
            topk_ids.stride(1),
            *strides(*first),
        ),
        {
            "LAYOUT": layout,
            "TOKENS": tokens if hidden_states_scale is None else "stored",
            **constants(w1_zp, w1_bias),
            "PARTS": _WARPS,
            "num_warps": _WARPS,
            "maxnreg": _REGISTERS,
            **compiler,
        },
    )
    second = w2, w2_scale, w2_zp, w2_bias
    parts = parts_of_slots(topk, w2.size(2))
    segments = triton.next_power_of_2(topk) * parts
    down = Launch(
        with_format(down_kernel, weight_format, ""),
        (2 * w2.size(1) // ROWS_OF_WARP.value,),
        (
            out,
            intermediate,
            *weights(*second),
            topk_weights,
            *routing,
            *sizes,
            intermediate.size(1),
            topk_weights.stride(1),
            topk_ids.stride(1),
            *strides(*second),
        ),
        {
            "APPLY_WEIGHTS": apply_weights,
            "ROUND_WEIGHTS": round_weights,
            "TOKENS": tokens,
            **constants(w2_zp, w2_bias),
            "PARTS": parts,
            "SEGMENTS": segments,
            "num_warps": segments // 2,
            "maxnreg": _REGISTERS,
            **compiler,
        },
    )
    return up, down


def _group_stride(scale: Tensor | None) -> int:
    """Of scales of a token; 0 where all its groups share one."""
    return scale.stride(1) if scale is not None and scale.dim() == 2 and scale.size(1) > 1 else 0


@functools.cache
def with_format(kernel: Callable[..., None], weight_format: WeightFormat, epilogue_body: str) -> Any:
    """``kernel``, undecorated, with the functions of a scheme and an epilogue."""
    registers = {"decode_registers": weight_format.decode_registers}
    scales = {
        "decode": weight_format.decode or decode,
        "decode_scale": weight_format.decode_scale,
        "decode_scale_16_bits": weight_format.decode_scale_16_bits or decode_scale_16_bits,
    }
    eights = {"multiply_eights": jit(with_globals(multiply_eights.fn, registers))}
    replaced = {"multiply": jit(with_globals(multiply.fn, eights | scales))}
    if epilogue_body:
        replaced["epilogue"] = build_epilogue(epilogue_body)
    return jit(with_globals(kernel, replaced))


def quantized_one_token_experts(out: Tensor, *arguments: Any) -> None:
    """Launch into out (1, K), contiguous; arguments: those of :func:`launches_for` behind the scratch memory."""
    _, _, w1, *_, layout, _, _ = arguments
    topk_ids = arguments[9]
    columns = w1.size(1) if layout == "ungated" else w1.size(1) // 2
    intermediate = out.new_empty((topk_ids.size(1), columns))
    launch(_plan, out, intermediate, *arguments)


def _plan(*arguments: Any) -> Plan:
    """Arguments: those of :func:`launches_for`."""
    launches = launches_for(*arguments)
    weight_format, epilogue_body = arguments[13], arguments[18]
    described = (
        pointer_key(argument) if isinstance(argument, Tensor) else argument
        for each in launches
        for argument in (*each.args, *each.options.values())
    )
    return Plan(
        ("quantized_one_token_experts", weight_format, epilogue_body, *described), launches, lambda: launches
    )
