"""Where these kernels serve, with which tiles, and their constants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor
from triton.experimental.gluon._runtime import jit

from compile_moe.ops.kernels.epilogue import build_epilogue, with_globals
from compile_moe.ops.kernels.quantized.few_rows.layouts import STEP_BYTES
from compile_moe.ops.kernels.quantized.few_rows.multiply import (
    COLUMNS_OF_SCALES,
    multiply,
    multiply_part,
    multiply_step,
)
from compile_moe.ops.kernels.quantized.operands import decodes_rows
from compile_moe.ops.kernels.quantized.weight_format import WeightFormat, decode_scale_16_bits
from compile_moe.ops.kernels.tiles import DeviceLimits, Tile, row_stride


class FewRowsTile(Tile):
    """A tile of these kernels."""

    __slots__ = ()


#: Rows of tokens, rows of weights; a step is deeper where these are packed.
WIDE = tuple(FewRowsTile(rows, 128, STEP_BYTES.value, 2, 4) for rows in (8, 16, 32))
#: More programs, with more loads under way in each, for where there are few. Of those for 32 rows a multiprocessor runs
#: four with three stages, three with four.
NARROW = tuple(
    FewRowsTile(rows, 64, STEP_BYTES.value, stages, 2) for rows, stages in ((8, 4), (16, 4), (32, 3))
)
MOST_ROWS = WIDE[-1].block_m
#: With fewer wide programs, and more bytes of a row of weights, than these, narrow ones pay: with fewer programs than
#: four for a multiprocessor of an H100, as many as it runs at a time. Mixtral in int8, with 14336 bytes, took 343
#: instead of 380 us at 8 tokens, 360 instead of 387 at 16, 370 instead of 421 at 32, and 443 instead of 461 at 64, rows
#: of tokens 8 to 32; in int4, with 7168, 292 instead of 288 at 32 (H200s, each pair from one run).
_NARROW_PAYS = (512, 8192)
#: The same of one row an expert, with fewer than two programs: a layer took 48 instead of 57 us at one token with 1440
#: bytes, 25 instead of 20 with 1024 and 384.
_NARROW_PAYS_FOR_ONE_ROW = (256, 1280)
#: The most rows of an average expert for which a tile is taken: so many that few experts need a second one. 32 was also
#: faster than the other kernels' tile of 64, at gpt-oss with 1024 tokens on an H200.
_AVERAGE_ROWS = {8: 5, 16: 12, 32: 32}
#: Of a thread: with so many, four programs share a multiprocessor. Tiles of up to 16 rows need hardly more.
_REGISTERS = 128
_SMALLEST_GROUP = 32
#: That of the largest tile and more; GPUs that copy asynchronously (sm_80) have 99 KiB.
_SHARED_MEMORY = 80 * 1024


def serve(weight_format: WeightFormat, x: Tensor, w: Tensor, w_scale: Tensor, limits: DeviceLimits) -> bool:
    """Whether x (rows, depth) and weights (E, rows of weights, ...) can be multiplied by them: decoded to the tokens'
    dtype, copied 16 bytes at a time, with whole groups in what a thread takes and in what shared memory has.
    """
    if limits.shared_memory < _SHARED_MEMORY:
        return False
    group = weight_format.group
    if weight_format.decode_words is None or not decodes_rows(weight_format, x, w, w_scale):
        return False
    if group and (group % _SMALLEST_GROUP or COLUMNS_OF_SCALES.value % group):
        return False
    sizes = (row_stride(x), *w.stride()[:2], w.size(2), x.data_ptr(), w.data_ptr())
    if x.stride(1) != 1 or w.stride(2) != 1 or any(size % 16 for size in sizes):
        return False
    # Distances within an expert's weights have 32 bits.
    return w.size(1) * w.stride(1) < 2**31


def _narrow_pays(programs: int, stored_depth: int, one_row: bool) -> bool:
    bounds = (_NARROW_PAYS, _NARROW_PAYS_FOR_ONE_ROW) if one_row else (_NARROW_PAYS,)
    return any(programs < few and stored_depth > deep for few, deep in bounds)


def candidates(num_columns: int, stored_depth: int, gated: bool) -> tuple[Tile, ...]:
    """Theirs, whose ``block_n`` counts columns of the result, for any number of slots and experts.

    Args:
        stored_depth: bytes of a row of weights.
    """
    wide, narrow = (
        [tile._replace(block_n=tile.block_n // 2 if gated else tile.block_n) for tile in tiles]
        for tiles in (WIDE, NARROW)
    )
    programs = triton.cdiv(num_columns, wide[0].block_n)
    return *wide, *(tile for tile in narrow if _narrow_pays(programs, stored_depth, tile.block_m == 8))


def choose(
    candidates: tuple[Tile, ...], num_slots: int, num_experts: int, num_columns: int, stored_depth: int
) -> Tile | None:
    """That of theirs among the candidates for the average expert's rows; None where these are too many."""
    experts = min(num_experts, max(num_slots, 1))
    rows = next((rows for rows, most in _AVERAGE_ROWS.items() if num_slots <= experts * most), None)
    if rows is None:
        return None
    wide, *narrow = (tile for tile in candidates if isinstance(tile, FewRowsTile) and tile.block_m == rows)
    programs = experts * triton.cdiv(num_columns, wide.block_n)
    return narrow[0] if _narrow_pays(programs, stored_depth, num_slots <= experts) else wide


def constants(weight_format: WeightFormat, has_zero: bool, tile: Tile, depth: int) -> dict[str, Any]:
    assert not has_zero or weight_format.group, "zero points belong to groups"
    return {
        "EVEN_K": depth % (STEP_BYTES.value * weight_format.packed) == 0,
        "HAS_ZERO": has_zero,
        "PACKED": weight_format.packed,
        "PACKED_ZEROS": weight_format.packed_zeros,
        "GROUP": weight_format.group,
        "STAGES": tile.num_stages,
        "WARPS": tile.num_warps,
        "maxnreg": _REGISTERS if tile.block_m <= 16 and tile.num_warps == 4 else None,
    }


@functools.cache
def with_format(
    kernel: Callable[..., None],
    weight_format: WeightFormat,
    epilogue_body: str,
    do_not_specialize: tuple[str, ...],
) -> Any:
    """``kernel``, undecorated, whose ``multiply`` has the functions of a scheme, and with an epilogue."""
    words = {"decode_words": weight_format.decode_words}
    scales = {
        "decode": weight_format.decode,
        "decode_scale_16_bits": weight_format.decode_scale_16_bits or decode_scale_16_bits,
    }
    part = {"multiply_part": jit(with_globals(multiply_part.fn, words))}
    step = {"multiply_step": jit(with_globals(multiply_step.fn, part))}
    replaced = {"multiply": jit(with_globals(multiply.fn, scales | step))}
    if epilogue_body:
        replaced["epilogue"] = build_epilogue(epilogue_body)
    return jit(with_globals(kernel, replaced), do_not_specialize=list(do_not_specialize))
